# SPDX-License-Identifier: Apache-2.0
"""What a study is about to do, how long that takes on this machine, and how far a run is."""

import logging
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer
from trl import ModelConfig, SFTConfig

from ..slick.likelihood import score_answers
from ..slick.progress import Progress
from ..slick.prompts import question_prompt
from ..slick.slick import SlickSettings
from .arguments import rows_per_step
from .models import load_model_and_tokenizer
from .training_mix import MixSettings


logger = logging.getLogger(__name__)

_TRIAL_SIZE = 64  # facts
# Measured on CPUs, in units of an answer that is scored without exemplars: one that is generated, a question of SLiCK
# with samples (without: 1), and a row of training (fp32 a fifth less, bf16 a fifth more)
_ANSWER_COST = 1.4
_SAMPLED_QUESTION_COST = 1.8
_ROW_COSTS = {"stage1": 5, "sft": 5, "selfdistill": 6.3, "frozen": 3.3}
_LATER_PROMPTS = 0.25  # of the facts get them, where only HighlyKnown ones are looked for


class RunProgress(ProgressCallback):
    """
    transformers' bar of a training run, as a [`~trl_selfdistill.slick.progress.Progress`].

    Args:
        name (`str`): Name of the run.
        prints_logs (`bool`, *optional*, defaults to `False`): Whether what the trainer logs is printed, too.
    """

    def __init__(self, name: str, prints_logs: bool = False):
        super().__init__()
        self.name, self.prints_logs = name, prints_logs

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:
            steps = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = Progress(desc=self.name, unit="step", dynamic_ncols=True, **steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.prints_logs:
            callback = ProgressCallback if sys.stderr.isatty() else PrinterCallback  # it clears its bar
            callback.on_log(self, args, state, control, logs=logs, **kwargs)
        elif "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=logs["loss"], refresh=False)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if sys.stderr.isatty():  # a file would hold it in all its states
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)


def show_progress(trainer: Trainer, name: str, prints_logs: bool = False) -> None:
    """Puts a [`RunProgress`] in the place of transformers' bar, unless `disable_tqdm` has taken that away."""
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(RunProgress(name, prints_logs))


def announce_plan(
    model: str,
    facts: Dataset,
    variants: list[str],
    eval_epochs: int,
    model_args: ModelConfig,
    slick: SlickSettings,
    mix: MixSettings,
    config: SFTConfig,
) -> None:
    """
    Logs the stages that have no folder yet, with estimates of their times from a trial on some of the facts.

    Args:
        model (`str`): Hub id or folder of the model.
        facts (`Dataset`): The facts that it will be asked.
        variants (`list[str]`): The runs after stage 1.
        eval_epochs (`int`): Epochs of a run from one evaluation to the next; 0: the end only.
        model_args, slick, mix, config: What the study was told.
    """
    left = [name for name in ("annotated", "stage1", *variants) if not Path(config.output_dir, name).is_dir()]
    if not left:
        return
    times = [time.perf_counter()]
    options = config.trust_remote_code, config.model_init_kwargs
    loaded, tokenizer = load_model_and_tokenizer(model, model_args, *options)
    loaded.to(PartialState().device)
    sample = facts.shuffle(seed=config.seed).select(range(min(_TRIAL_SIZE, len(facts))))
    prompts = [question_prompt(question) for question in sample["question"]]
    accepted = [[answer] for answer in sample["answer"]]
    with torch.autocast(loaded.device.type, torch.bfloat16, enabled=bool(config.bf16)):
        for _ in range(2):  # the first time some things are slow
            times.append(time.perf_counter())
            score_answers(loaded, tokenizer, prompts, accepted, greedy_only=True)
    loading = times[1] - times[0]
    answer = (time.perf_counter() - times[2]) / len(sample) / PartialState().num_processes  # they share the work

    questions = slick.num_prompts * _SAMPLED_QUESTION_COST
    if slick.only_highly_known:
        questions = 1 + (slick.num_prompts - 1) * _LATER_PROMPTS
    plan = {"annotated": loading + answer * questions * len(facts)}
    evaluation = answer * _ANSWER_COST * (mix.num_known + mix.num_new + mix.num_heldout)
    plan["stage1"] = 4 * loading + answer * _ROW_COSTS["stage1"] * mix.num_known + evaluation
    num_epochs, num_rows = config.num_train_epochs, mix.num_known + mix.num_new
    if config.max_steps > 0:
        num_epochs = config.max_steps * rows_per_step(config) / num_rows
    for name in variants:
        training = answer * _ROW_COSTS[name] * num_epochs * num_rows
        num_evaluations = -(-num_epochs // eval_epochs) if eval_epochs else 1
        plan[name] = 4 * loading + training + evaluation * num_evaluations
    shown = [f"{name} {Progress.format_interval(plan[name])}" for name in left]
    total = Progress.format_interval(sum(plan[name] for name in left))
    if PartialState().is_main_process:
        logger.info(f"Plan, with estimated times: {', '.join(shown)}; {total} in all.")
