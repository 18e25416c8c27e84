# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-selfdistill[peft] @ git+https://github.com/your-name/trl-selfdistill"]
# ///
"""
Trains with self-distillation (SelfDistillSFTTrainer): SFT with a KL to a frozen snapshot of the model as handed over.

With --kl_weight 0 it is plain SFT, as stage 1 (format learning) and the baseline need it.

Input: a model, and either --mix (a folder of `mix`) with the --splits to train on, or --dataset_name
(any dataset of SFTTrainer). Output, in --output_dir: the checkpoint; with --mix also accuracy.jsonl (the answers to
each split after each epoch) and training.json. With --mix an interrupted run goes on with the same command;
with --dataset_name add --resume_from_checkpoint FOLDER.

    trl-selfdistill self-distill --model_name_or_path outputs/study/model \\
        --mix outputs/study/mix --splits known --kl_weight 0 --num_train_epochs 1 --learning_rate 5e-5 \\
        --output_dir outputs/study/stage1

    trl-selfdistill self-distill --model_name_or_path outputs/study/stage1 \\
        --mix outputs/study/mix --splits known new --num_train_epochs 8 --learning_rate 2e-4 --save_strategy epoch \\
        --output_dir outputs/study/selfdistill

    trl-selfdistill self-distill --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name my_chats.jsonl --output_dir outputs/my_model
"""

from accelerate import PartialState

from trl_selfdistill import SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.studies.arguments import TrainingDataArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.dataset_training import train_as_asked
from trl_selfdistill.studies.models import ModelArguments


def main(data: TrainingDataArguments, model_args: ModelArguments, config: SelfDistillSFTConfig) -> None:
    """Trains the model, and prints where it is and how to find out what it lost."""
    folder = train_as_asked(SelfDistillSFTTrainer, config, data, model_args)
    if PartialState().is_main_process:
        models = f"--before {model_args.model_name_or_path} --after {folder}"
        print(f"Model: {folder}   card: {folder / 'README.md'}")
        print(f"What it forgot: trl-selfdistill check {models}   (with --chat false if its prompts are texts)")


if __name__ == "__main__":
    run_script(main, (TrainingDataArguments, ModelArguments, SelfDistillSFTConfig), __doc__)
