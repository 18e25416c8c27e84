# SPDX-License-Identifier: Apache-2.0
"""How a callback logs numbers of its own through a trainer without touching those of the training."""

from transformers import Trainer

from ..slick.generation import evaluation_mode


def log_beside_training(trainer: Trainer, metrics: dict[str, float]) -> None:
    """
    Sends `metrics` to each of the trainer's reporters and into its log history.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer.
        metrics (`dict[str, float]`): The numbers; not changed.
    """
    should_log = trainer.control.should_log
    # In evaluation mode the SFT trainers' `log` leaves the pending training metrics alone
    with evaluation_mode(trainer.model):
        trainer.log(dict(metrics))
    # The step's own log may be still to come, and any log takes back the order for it
    trainer.control.should_log = should_log
