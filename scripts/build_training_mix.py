# SPDX-License-Identifier: Apache-2.0
"""
Chooses the training data out of annotated facts: Known facts, new ones, and held-out ones to measure forgetting on.

Input: the annotated facts of `annotate`. Output, in --output_dir: known.jsonl (HighlyKnown facts to train on),
new.jsonl (facts that the model does not know: invented, or Unknown real ones) and heldout.jsonl (HighlyKnown facts of
the same relations, never trained on), each with the columns prompt and completion, as SFTTrainer takes them.

    trl-selfdistill mix --annotated outputs/study/annotated/facts.jsonl \\
        --output_dir outputs/study/mix --num_known 80 --num_new 240

    trl-selfdistill mix --annotated outputs/study/annotated/facts.jsonl \\
        --output_dir outputs/study/mix_real --new_facts real --relations P17 P36
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.stages import mix_stage
from trl_selfdistill.studies.training_mix import MixSettings, load_mix


@dataclass
class MixArguments:
    """What the mix is built from, and where it goes."""

    _argument_group_name = "run"

    annotated: str = field(metadata={"help": "Annotated facts: the `annotated/facts.jsonl` of `annotate`."})
    output_dir: str = field(default="outputs/study/mix", metadata={"help": "Folder of the splits."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice, the order and the invented facts."})


def main(args: MixArguments, settings: MixSettings) -> None:
    """Writes the splits and prints their sizes."""
    mix = mix_stage(Path(args.annotated), settings, Path(args.output_dir), seed=args.seed)
    if PartialState().is_main_process:
        print(", ".join(f"{name}: {len(split)} facts" for name, split in load_mix(mix).items()))
        print(f"Mix: {mix}")


if __name__ == "__main__":
    run_script(main, (MixArguments, MixSettings), __doc__)
