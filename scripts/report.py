# SPDX-License-Identifier: Apache-2.0
"""
Compares trained arms: what each forgot, with a bootstrap interval and the paired difference from the first of them.

Input: folders that self_distill_sft.py or frozen_groups_sft.py trained with --mix, on the same mix and from the same
start; the first is the baseline. Output, in --output_dir: report.md, curves.png and results.json; and a model card in
the folder of each arm. Arms called sft, selfdistill and frozen get their full names.

    accelerate launch --quiet scripts/report.py --output_dir outputs/study \\
        --arms outputs/study/sft outputs/study/selfdistill outputs/study/frozen

    accelerate launch --quiet scripts/report.py --output_dir outputs/sweep \\
        --arms outputs/sweep/sft outputs/sweep/kl_weight_0.3 outputs/sweep/kl_weight_3
"""

from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.studies.arguments import ReportArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.stages import report_stage


def main(args: ReportArguments) -> None:
    """Writes the report and prints its table."""
    output = Path(args.output_dir)
    if PartialState().is_main_process:
        print(f"\n{report_stage([Path(arm) for arm in args.arms], output)}\nReport: {output / 'report.md'}")


if __name__ == "__main__":
    run_script(main, (ReportArguments,), __doc__)
