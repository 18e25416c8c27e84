# SPDX-License-Identifier: Apache-2.0
"""The snapshot of the student that becomes its teacher in the middle of a run."""

import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..parameters.structure import base_causal_lm
from .adapter_teacher import ADAPTER_WEIGHTS, fits_adapter_teacher
from .checkpoints import explain_full_disk, find_damage
from .sft_internals import frozen_copy
from .teacher_record import TEACHER_FOLDER


logger = logging.get_logger(__name__)


def refuse_best_of_two_objectives(args) -> None:
    """
    Refuses to choose the best checkpoint by a loss that is another one before the snapshot than after it.

    Raises:
        ValueError: If `metric_for_best_model` is a loss, as it is by default.
    """
    metric = args.metric_for_best_model or "loss"
    if args.load_best_model_at_end and metric.endswith("loss"):
        raise ValueError(
            f"`load_best_model_at_end=True` compares checkpoints by `metric_for_best_model={metric!r}`, which is the "
            "cross-entropy before the teacher's snapshot and holds the KL after it. Set `metric_for_best_model` to "
            "'eval_mean_token_accuracy' or to the accuracy of a callback."
        )


class TeacherSnapshotCallback(TrainerCallback):
    """
    Freezes a snapshot of the student as the teacher, once, after the configured steps or epochs of plain SFT: of an
    adapter, a second one in the same model.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir) / TEACHER_FOLDER
        self._has_adapter = hasattr(trainer.model, "peft_config")
        unsuited = {
            "FSDP": trainer.is_fsdp_enabled,
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "a PEFT model that cannot hold a second adapter": self._has_adapter
            and not fits_adapter_teacher(trainer.model),
        }
        if what := [name for name, applies in unsuited.items() if applies]:
            raise ValueError(
                "`teacher_snapshot_steps` and `teacher_snapshot_epochs` take models that are not sharded, full or "
                f"with one adapter that can be held twice, got {what[0]}. Train stage 1 first, then start a run from "
                "its checkpoint: the teacher is then the model as handed over."
            )
        refuse_best_of_two_objectives(trainer.args)
        if trainer.args.teacher_snapshot_epochs is not None and not has_length(trainer.train_dataset):
            raise ValueError(
                f"`teacher_snapshot_epochs={trainer.args.teacher_snapshot_epochs}` needs a `train_dataset` of known "
                "length, got a stream. Set `teacher_snapshot_steps`."
            )

    def _is_due(self, args, state) -> bool:
        if args.teacher_snapshot_steps is not None:
            return state.global_step >= args.teacher_snapshot_steps
        return state.epoch is not None and state.epoch >= args.teacher_snapshot_epochs - 1e-6

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.teacher = None
        if (args.teacher_snapshot_steps or 0) >= state.max_steps or (
            (args.teacher_snapshot_epochs or 0) >= state.num_train_epochs
        ):
            raise ValueError(
                f"The teacher's snapshot would come after the last step, so that there would be no distillation: got "
                f"`teacher_snapshot_steps={args.teacher_snapshot_steps}`, `teacher_snapshot_epochs="
                f"{args.teacher_snapshot_epochs}` and {state.max_steps} steps in {state.num_train_epochs} epochs. "
                "Train longer or take it earlier, or set `kl_weight=0` for plain SFT."
            )
        if self._is_due(args, state):  # resumed after the snapshot: the student has moved on since
            if not (self.folder / (ADAPTER_WEIGHTS if self._has_adapter else "config.json")).is_file():
                raise FileNotFoundError(
                    f"Resuming at step {state.global_step}, after the teacher's snapshot, but {self.folder} does not "
                    "hold it. Put the folder back, or start the run anew."
                )
            if damage := find_damage(self.folder):
                raise ValueError(
                    f"The teacher's snapshot cannot be read: {damage}. Put it back, or start the run anew."
                )
            if self._has_adapter:
                self.trainer.set_teacher_to_student()
                self.trainer.teacher.restore(self.trainer.model, self.folder)
            else:
                self.trainer.set_teacher(type(base_causal_lm(self.trainer.model)).from_pretrained(self.folder))
        self.trainer.check_teacher_of_checkpoint()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.teacher is None and self._is_due(args, state):
            if self._has_adapter:
                self.trainer.set_teacher_to_student()
                if args.should_save:
                    with explain_full_disk(self.folder):
                        self.trainer.teacher.keep(self.folder)
            else:
                with explain_full_disk(self.folder):
                    self._save_snapshot()
                self.trainer.set_teacher(frozen_copy(self.trainer.accelerator.unwrap_model(self.trainer.model)))
            logger.info(f"Step {state.global_step}: the teacher is a snapshot of the model ({self.folder}).")

    def _save_snapshot(self) -> None:
        """Whole or not at all: a run that is killed meanwhile takes it anew, from the checkpoint before."""
        accelerator = self.trainer.accelerator
        partial = self.folder.with_name(self.folder.name + ".partial")
        if self.trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.trainer.save_model(str(partial), _internal_call=True)  # a teacher is not pushed
        accelerator.wait_for_everyone()
        if self.trainer.args.should_save:
            shutil.rmtree(self.folder, ignore_errors=True)
            partial.rename(self.folder)
        accelerator.wait_for_everyone()
