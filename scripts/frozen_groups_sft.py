# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-selfdistill[peft] @ git+https://github.com/your-name/trl-selfdistill"]
# ///
"""
Trains some groups of parameters and freezes the others (FrozenGroupsSFTTrainer).

The groups are embeddings, attention, mlp, norm and lm_head: name what to train (--trainable_groups) or what not to
(--frozen_groups). Training the attention alone learns a task or a format, and new facts more slowly than all
parameters do, not never: it suits few steps at a small rate.

Input: a model, and either --mix (a folder of `mix`) with the --splits to train on, or --dataset_name
(any dataset of SFTTrainer). Output, in --output_dir: the checkpoint and parameter_groups.json; with --mix also
accuracy.jsonl (the answers to each split after each epoch) and training.json. With --mix an interrupted run
goes on with the same command; with --dataset_name add --resume_from_checkpoint FOLDER.

    trl-selfdistill frozen-groups --model_name_or_path outputs/study/stage1 \\
        --mix outputs/study/mix --splits known new --trainable_groups attention --num_train_epochs 8 \\
        --learning_rate 2e-4 --save_strategy epoch --output_dir outputs/study/frozen

    trl-selfdistill frozen-groups --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name my_chats.jsonl --frozen_groups mlp embeddings --output_dir outputs/my_model
"""

from accelerate import PartialState

from trl_selfdistill import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer
from trl_selfdistill.studies.arguments import TrainingDataArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.dataset_training import train_as_asked
from trl_selfdistill.studies.models import ModelArguments


def main(data: TrainingDataArguments, model_args: ModelArguments, config: FrozenGroupsSFTConfig) -> None:
    """Trains the model, and prints where it is and how to find out what it lost."""
    if config.group_selection is None:
        raise ValueError("Nothing would be frozen: pass `--trainable_groups attention`, say, or `--frozen_groups`.")
    folder = train_as_asked(FrozenGroupsSFTTrainer, config, data, model_args)
    if PartialState().is_main_process:
        models = f"--before {model_args.model_name_or_path} --after {folder}"
        print(f"Model: {folder}   card: {folder / 'README.md'}\nWhat it forgot: trl-selfdistill check {models}")


if __name__ == "__main__":
    run_script(main, (TrainingDataArguments, ModelArguments, FrozenGroupsSFTConfig), __doc__)
