# SPDX-License-Identifier: Apache-2.0
"""The snapshot of the student that becomes its teacher in the middle of a run."""

import math

from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..files import written_whole
from .adapter_teacher import fits_adapter_teacher
from .sft_internals import frozen_copy, load_saved
from .teachers import ModelTeacher, check_teacher


logger = logging.get_logger(__name__)


class TeacherSnapshotCallback(TrainerCallback):
    """
    Freezes the student of a [`SelfDistillSFTTrainer`] as its teacher after the steps or epochs of plain SFT, and keeps
    it in `output_dir/_teacher`, where a resumed run finds it. A `ValueError` if the model is sharded, its adapter
    cannot be held twice, the data's length is unknown, or the run ends before it.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.folder = trainer.teacher_folder
        self._is_adapter = fits_adapter_teacher(trainer.model)
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if is_sharded or (is_peft_model(trainer.model) and not self._is_adapter):
            raise ValueError(
                "A snapshot is of a model that is not sharded, full or with one adapter that can be held twice. Train "
                "stage 1 first, and a second run from its checkpoint."
            )
        num_batches = None  # at most: the data loader tells when training starts
        if has_length(trainer.train_dataset):
            num_batches = math.ceil(len(trainer.train_dataset) / trainer.args.train_batch_size)
        self._choose_step(num_batches, trainer.args.max_steps)

    def _choose_step(self, num_batches: int | None, max_steps: int) -> None:
        """Chooses the step of the snapshot. Raises `ValueError` if the run is over by then."""
        args = self.trainer.args
        if num_batches is not None:
            steps_per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
            max_steps = max_steps if max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
        self._step = args.teacher_snapshot_steps
        if self._step is None:
            if num_batches is None:
                epochs = args.teacher_snapshot_epochs
                raise ValueError(f"`teacher_snapshot_epochs={epochs}` of a stream: set `teacher_snapshot_steps`.")
            self._step = max(1, math.ceil(args.teacher_snapshot_epochs * steps_per_epoch - 1e-6))
        if self._step >= max_steps:
            raise ValueError(
                f"The teacher's snapshot would come after step {self._step} of {max_steps}, so that there would be no "
                "distillation. Take it earlier, or set `kl_weight=0`."
            )

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._choose_step(len(train_dataloader) if has_length(train_dataloader) else None, state.max_steps)
        trainer, saved = self.trainer, self.trainer.saved_teacher
        trainer.teacher = None
        if state.global_step >= self._step:  # resumed after the snapshot: the student has moved on since
            if self._is_adapter:
                trainer.teacher = trainer.freeze_student()
                trainer.teacher.restore(trainer.model, self.folder, saved)
            elif not self.folder.is_dir():
                raise ValueError(f"{self.folder}, the teacher of {trainer.resumed_from}, is gone. Put it back.")
            else:
                model = frozen_copy(trainer.accelerator.unwrap_model(trainer.model))
                load_saved(model, self.folder)
                trainer.teacher = ModelTeacher(model, trainer.accelerator)
        if trainer.resumed_from is not None:
            check_teacher(trainer.teacher, saved, trainer.resumed_from)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.teacher is not None or state.global_step < self._step:
            return
        self.trainer.teacher = self.trainer.freeze_student()
        if args.should_save and self._is_adapter:
            self.trainer.teacher.keep(self.folder)
        elif args.should_save:
            with written_whole(self.folder) as partial:
                self.trainer.model.save_pretrained(partial)
        logger.info(f"Step {state.global_step}: the teacher is a snapshot of the model ({self.folder}).")
