# SPDX-License-Identifier: Apache-2.0
"""
The whole study: what does fine-tuning on new facts do to those that a model knows, and what do the two fixes change?

Stages, each kept in a folder of its own under --output_dir and not done again while its arguments and inputs stay the
same: facts, model, annotated (SLiCK), mix, stage1, one folder for each variant (sft, selfdistill, frozen). Output, in
--output_dir: report.md, curves.png and results.json; in the folder of each variant the checkpoint with its model card.
Interrupted, it goes on with the same command.

    trl-selfdistill study --config quickstart

    trl-selfdistill study --config quickstart \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --output_dir outputs/my_study --facts my_facts.jsonl \\
        --fact_relations founder --new_relations founder
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from trl import SFTTrainer

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTTrainer
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.publishing import publish_command
from trl_selfdistill.studies.results import VARIANT_LABELS
from trl_selfdistill.studies.runs import Variant, train_variant
from trl_selfdistill.studies.stages import STUDY_ARGUMENTS, facts_of_mix, prepare_study, report_stage


TRAINERS = {"sft": SFTTrainer, "selfdistill": SelfDistillSFTTrainer, "frozen": FrozenGroupsSFTTrainer}


@dataclass
class QuickstartArguments:
    """What the study compares. Its training is set by the training configuration."""

    _argument_group_name = "study"

    variants: list[str] = field(
        default_factory=lambda: [*TRAINERS],
        metadata={"help": "Variants of stage 2, among sft, selfdistill and frozen, the report's baseline first."},
    )

    eval_epochs: int = field(
        default=1,
        metadata={"help": "Epochs from one evaluation of a variant to the next. 0: before it and at its end only."},
    )

    def __post_init__(self):
        if self.eval_epochs < 0:
            raise ValueError(f"`eval_epochs` must be 0 or more, got {self.eval_epochs}.")
        if not self.variants or set(self.variants) - {*TRAINERS}:
            raise ValueError(f"`variants` may hold sft, selfdistill and frozen, got {self.variants}.")


def main(study: QuickstartArguments, *shared) -> None:
    """Runs the stages in their order and writes the report."""
    # 1. What does the model know? Known, new and held-out facts, and the format: the start of every variant
    setup = prepare_study(*shared)
    output = Path(setup.config.output_dir)

    # 2. The variants, on the same data with the same seed and steps. Only `frozen` freezes groups
    groups = {name: getattr(setup.config, name) for name in ("frozen_groups", "trainable_groups")}
    changes = {"selfdistill": dict.fromkeys(groups)}
    changes["frozen"] = groups if any(groups.values()) else {"trainable_groups": ["attention"]}
    folders = [output / name for name in study.variants]
    for name, folder in zip(study.variants, folders, strict=True):
        variant = Variant(name, VARIANT_LABELS[name], TRAINERS[name], changes.get(name, {}))
        options = {"eval_epochs": study.eval_epochs, "earlier": Path(setup.start)}
        train_variant(variant, setup, folder, lambda partial: facts_of_mix(setup.mix), **options)

    # 3. The report
    if PartialState().is_main_process:
        text = report_stage(folders, output)
        print(f"\n{text}\nReport: {output / 'report.md'}   figure: {output / 'curves.png'}")
        print("Model cards: " + "   ".join(str(folder / "README.md") for folder in folders))
        print(f"To publish the models:\n\n    {publish_command(folders)}\n")


if __name__ == "__main__":
    run_script(main, (QuickstartArguments, *STUDY_ARGUMENTS), __doc__)
