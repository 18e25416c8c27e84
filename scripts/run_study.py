# SPDX-License-Identifier: Apache-2.0
"""
The whole study: what does fine-tuning on new facts do to those that a model knows, and what do the two fixes change?

Stages, each kept in a folder of its own under --output_dir and not done again while its arguments and inputs stay the
same: model, facts, annotated (SLiCK), mix, stage1, one folder for each arm (sft, selfdistill, frozen). Output, in
--output_dir: report.md, curves.png and results.json; in the folder of each arm the checkpoint with its model card.
Interrupted, it goes on with the same command.

    accelerate launch --quiet scripts/run_study.py --config scripts/configs/quickstart.yaml

    accelerate launch --quiet scripts/run_study.py --config scripts/configs/quickstart.yaml \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --facts my_facts.jsonl --output_dir outputs/my_study
"""

from pathlib import Path

from accelerate import PartialState
from trl import SFTConfig, SFTTrainer

from trl_selfdistill import (
    FrozenGroupsSFTConfig,
    FrozenGroupsSFTTrainer,
    SelfDistillSFTConfig,
    SelfDistillSFTTrainer,
)
from trl_selfdistill.studies.arguments import (
    AdapterArguments,
    ModelAndFactsArguments,
    SlickArguments,
    Stage1Arguments,
    StudyArguments,
)
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.publishing import publish_command
from trl_selfdistill.studies.stages import (
    annotate_stage,
    facts_stage,
    mix_stage,
    model_stage,
    report_stage,
    stage1_stage,
    train_stage,
)
from trl_selfdistill.studies.training_mix import MixSettings
from trl_selfdistill.studies.training_stage import copy_config


def main(
    study: StudyArguments,
    facts_args: ModelAndFactsArguments,
    slick_args: SlickArguments,
    mix_settings: MixSettings,
    stage1_args: Stage1Arguments,
    adapter: AdapterArguments,
    config: SelfDistillSFTConfig,
) -> None:
    """Runs the stages in their order and writes the report."""
    output = Path(config.output_dir)

    # 1. What does the model know?
    model = model_stage(facts_args.model_name_or_path, output / "model")
    facts = facts_stage(facts_args, output / "facts")
    annotated = annotate_stage(
        model, facts, slick_args, output / "annotated", config.bf16, config.seed, load_in_4bit=adapter.load_in_4bit
    )

    # 2. Known, new and held-out facts
    mix = mix_stage(annotated, mix_settings, output / "mix", seed=config.seed)

    # 3. Stage 1, format learning: the start of every arm, and the teacher
    stage1 = stage1_stage(stage1_args, config, model, mix, output / "stage1", adapter)

    # 4. Stage 2: the arms, on the same data with the same seed and steps. Groups are frozen in the arm `frozen` alone
    selfdistill_config = copy_config(SelfDistillSFTConfig, config, frozen_groups=None, trainable_groups=None)
    groups = {} if config.frozen_groups or config.trainable_groups else {"trainable_groups": ["attention"]}
    setups = {
        "sft": (SFTTrainer, copy_config(SFTConfig, config)),
        "selfdistill": (SelfDistillSFTTrainer, selfdistill_config),
        "frozen": (FrozenGroupsSFTTrainer, copy_config(FrozenGroupsSFTConfig, config, **groups)),
    }
    folders = []
    for arm in study.arms:
        trainer_class, arm_config = setups[arm]
        folder = output / arm
        train_stage(trainer_class, arm_config, str(stage1), mix, ("known", "new"), folder, stage1, adapter)
        folders.append(folder)

    # 5. The report
    if PartialState().is_main_process:
        text = report_stage(folders, output)
        print(f"\n{text}\nReport: {output / 'report.md'}   figure: {output / 'curves.png'}")
        print("Model cards: " + "   ".join(str(folder / "README.md") for folder in folders))
        print(f"To publish the models:\n\n    {publish_command(folders)}\n")


if __name__ == "__main__":
    types = (StudyArguments, ModelAndFactsArguments, SlickArguments, MixSettings, Stage1Arguments, AdapterArguments)
    run_script(main, (*types, SelfDistillSFTConfig), __doc__)
