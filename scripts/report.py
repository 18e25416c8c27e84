# SPDX-License-Identifier: Apache-2.0
"""
Compares trained variants: what each forgot, with its interval and the paired difference from the first of them.

Input: folders that `self-distill` or `frozen-groups` trained with --mix, on the same mix and from the same
start; the first is the baseline. Output, in --output_dir: report.md, curves.png and results.json; and a model card in
the folder of each variant. Variants called sft, selfdistill and frozen get their full names.

    trl-selfdistill report --output_dir outputs/study \\
        --variants outputs/study/sft outputs/study/selfdistill outputs/study/frozen

    trl-selfdistill report --output_dir outputs/sweep \\
        --variants outputs/sweep/sft outputs/sweep/kl_weight_0.3 outputs/sweep/kl_weight_3
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.stages import report_stage


@dataclass
class ReportArguments:
    """Which variants to compare, and where the report goes."""

    _argument_group_name = "report"

    variants: list[str] = field(metadata={"help": "Folders of trained variants, the baseline first."})
    output_dir: str = field(
        default="outputs/study", metadata={"help": "Folder of `report.md`, `curves.png` and `results.json`."}
    )


def main(args: ReportArguments) -> None:
    """Writes the report and prints its table."""
    output = Path(args.output_dir)
    if PartialState().is_main_process:
        print(f"\n{report_stage([Path(folder) for folder in args.variants], output)}\nReport: {output / 'report.md'}")


if __name__ == "__main__":
    run_script(main, (ReportArguments,), __doc__)
