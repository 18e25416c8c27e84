# SPDX-License-Identifier: Apache-2.0
"""How far a training run is."""

import sys

from transformers import PrinterCallback, ProgressCallback, Trainer

from ..slick.progress import Progress


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
