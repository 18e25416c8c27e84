# SPDX-License-Identifier: Apache-2.0
"""
Writes a checkpoint with weights between those of a model before and after fine-tuning (WiSE-FT): the less of the
fine-tuning, the less is forgotten, and the less is learnt.

Input: two checkpoints of one model, or a LoRA adapter. Output: a checkpoint with its card in --output_dir.

    trl-selfdistill interpolate --start outputs/quickstart/stage1 --end outputs/quickstart/sft --alpha 0.6 \\
        --output_dir outputs/quickstart/sft-0.6

    trl-selfdistill interpolate --end outputs/adapter --alpha 0.5 --output_dir outputs/adapter-0.5
"""

from dataclasses import dataclass, field

from accelerate import PartialState

from trl_selfdistill.hub.interpolation import interpolate
from trl_selfdistill.studies.command_line import run_script


@dataclass
class InterpolationArguments:
    """Between which weights, and where."""

    _argument_group_name = "interpolation"

    end: str = field(metadata={"help": "Folder or Hub id of the fine-tuned model or adapter."})
    alpha: float = field(metadata={"help": "Share of the fine-tuned weights, in [0, 1]."})
    output_dir: str = field(metadata={"help": "Folder of the checkpoint, a new or an empty one."})
    start: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model before fine-tuning. None for an adapter."},
    )


def main(args: InterpolationArguments) -> None:
    """Writes the checkpoint."""
    if PartialState().is_main_process:
        print(f"Model: {interpolate(args.end, args.alpha, args.output_dir, args.start)}")


if __name__ == "__main__":
    run_script(main, (InterpolationArguments,), __doc__)
