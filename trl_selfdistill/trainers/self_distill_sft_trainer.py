# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: SFT with a KL to a frozen snapshot of the model itself (arXiv 2604.15574, section 4.1)."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..parameters.structure import base_causal_lm
from .adapter_teacher import AdapterTeacher, fits_adapter_teacher
from .frozen_groups_sft_trainer import FrozenGroupsSFTTrainer
from .l2_to_teacher import L2ToTeacher
from .rehearsal import rehearse
from .self_distill_sft_config import SelfDistillSFTConfig
from .sft_internals import (
    DistillationTargets,
    add_distillation_forward,
    add_training_rows,
    config_from,
    count_input_tokens,
    frozen_copy,
    log_means,
    tokenizer_of,
)
from .teacher import ModelTeacher, Teacher, UntrainedStudent
from .teacher_loading import load_teacher
from .teacher_precomputation import precompute_teacher
from .teacher_record import TEACHER_FOLDER, check_teacher_record, write_teacher_record
from .teacher_rows import TEACHER_ROW
from .teacher_snapshot import TeacherSnapshotCallback
from .unsupported import (
    needs_own_ce,
    refuse_adapter_on_head,
    refuse_contradictions,
    refuse_joined_sequences,
    refuse_kl,
    refuse_l2,
    refuse_rehearsal,
    refuse_settings,
)


class SelfDistillSFTTrainer(FrozenGroupsSFTTrainer):
    """
    Trainer for supervised fine-tuning that does not make the model forget: `SFTTrainer` with the loss
    `CE + kl_weight * temperature**2 * KL(teacher ‖ student)`, where the teacher is a frozen snapshot of the model.

    Unlike [`~trl.DistillationTrainer`] and `SDFTTrainer` it needs no generation: it learns the dataset's labels, and
    both terms are taken at the label positions, with the same denominator.

    Every argument of [`~trl.SFTTrainer`] works as it does there, and groups of parameters can be frozen as in
    [`FrozenGroupsSFTTrainer`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.SFTTrainer`].
        args ([`SelfDistillSFTConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration. The values of a plain `SFTConfig` or `TrainingArguments` are kept.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, by path, Hub id or instance. Defaults to `args.teacher_model_name_or_path`, and without that to a
            frozen copy of the model as handed over. An instance is frozen in place.
        rehearsal_dataset (`Dataset`, *optional*):
            Prompts (column `prompt`, texts or conversations) that the model as handed over answers before training, to
            train on its own answers too. Defaults to the dataset of `args.rehearsal_dataset_name`. The answers are
            kept in `output_dir/_rehearsal.json` for resuming.
        kwargs:
            The other arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: If the teacher's vocabulary or tokenizer is not the student's, or the teacher is given twice.

    Example:

    ```python
    from datasets import load_dataset
    from trl_selfdistill import SelfDistillSFTTrainer

    trainer = SelfDistillSFTTrainer(
        model="Qwen/Qwen2.5-1.5B",
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "self-distill-sft"]
    _name = "SelfDistillSFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SelfDistillSFTConfig | None = None,
        *positional,
        teacher_model: str | PreTrainedModel | None = None,
        rehearsal_dataset: Dataset | None = None,
        **kwargs,
    ):
        args = config_from(args, SelfDistillSFTConfig, model, self._name)
        refuse_settings(args)
        refuse_contradictions(args, teacher_model, rehearsal_dataset)
        given = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        snapshot = args.teacher_snapshot_steps or args.teacher_snapshot_epochs
        super().__init__(model, args, *positional, **kwargs)
        self.teacher: Teacher | L2ToTeacher | None = None
        self.num_rehearsal_rows = 0
        self._takes_snapshot = bool(snapshot)
        self._teacher_name = given if isinstance(given, str) else None
        if rehearsal_dataset is not None or args.rehearsal_dataset_name is not None:
            refuse_rehearsal(self)
            rows = rehearse(self, rehearsal_dataset)
            self.num_rehearsal_rows = len(rows)
            add_training_rows(self, rows)
        if args.kl_weight == 0:
            return
        refuse_kl(self)
        refuse_adapter_on_head(self.model)
        # The copy comes after `SFTTrainer.__init__`, which may resize the embeddings for a new chat template
        if args.regularizer == "l2":
            self._set_l2(given)
            return
        if snapshot:
            self.add_callback(TeacherSnapshotCallback(self))
        elif given is None:
            self.set_teacher_to_student()
        else:
            self.set_teacher(load_teacher(given, self.model, tokenizer_of(self), args))
        refuse_joined_sequences(self, self.teacher_model)
        add_distillation_forward(base_causal_lm(self.model))
        if args.precompute_teacher:
            precompute_teacher(self)

    def _set_l2(self, given) -> None:
        refuse_l2(self, given)
        add_distillation_forward(base_causal_lm(self.model))  # for the KL that its strength is matched to
        self.teacher = L2ToTeacher(self.model, self.args.l2_weight)

    def set_teacher(self, teacher: PreTrainedModel) -> None:
        """Makes `teacher` the frozen teacher from the next step on."""
        self.teacher = ModelTeacher(teacher, self.accelerator)

    def set_teacher_to_student(self) -> None:
        """Makes the student as it is now the teacher: its adapter, if it has one of which a model can hold two."""
        if fits_adapter_teacher(self.model):
            self.teacher = AdapterTeacher(self.model, self.accelerator)
        elif self.args.precompute_teacher and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.teacher = UntrainedStudent(self.model)
        else:
            self.set_teacher(frozen_copy(self.accelerator.unwrap_model(self.model)))

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if TEACHER_ROW not in self._signature_columns:
            self._signature_columns.append(TEACHER_ROW)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The teacher as a model; `None` where there is none, or where it is no model of its own."""
        return getattr(self.teacher, "model", None)

    def check_checkpoint(self, checkpoint: Path) -> None:
        super().check_checkpoint(checkpoint)
        if self.teacher is not None and not self._takes_snapshot:
            if isinstance(self.teacher, AdapterTeacher):
                self.teacher.restore(self.model, Path(self.args.output_dir) / TEACHER_FOLDER)
            record = check_teacher_record(self.teacher, checkpoint)
            if isinstance(self.teacher, L2ToTeacher):  # matched on the first batch of the run
                self.teacher.weight = record["l2_weight"]

    def check_teacher_of_checkpoint(self) -> None:
        """Refuses to go on with another teacher than that of the checkpoint that training resumed from."""
        if self._checkpoint is not None:
            check_teacher_record(self.teacher, Path(self._checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        # Not in `_save`, which FSDP does not call where the checkpoints are sharded
        if self.teacher is not None and self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(self.teacher, AdapterTeacher):
                self.teacher.keep(Path(self.args.output_dir) / TEACHER_FOLDER)
            write_teacher_record(self.teacher, folder, self._teacher_name)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(self.teacher, L2ToTeacher):
            return self._compute_l2_loss(model, inputs, return_outputs, num_items_in_batch)
        own_ce = needs_own_ce(self)
        mode = "train" if self.model.training else "eval"
        inputs["use_cache"] = False
        teacher = self.teacher.targets(model, inputs)
        sft_loss, outputs = 0.0, None
        if own_ce:
            sft_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            sft_loss, outputs = sft_loss if return_outputs else (sft_loss, None)

        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        targets = DistillationTargets(
            teacher,
            ce_weight=0.0 if own_ce else 1.0,
            kl_weight=self.args.kl_weight,
            temperature=self.args.temperature,
            num_items_in_batch=num_items_in_batch,
        )
        ce_kl, aux_loss = model(**inputs, distillation=targets)
        loss = ce_kl.loss
        # `num_items_in_batch` counts the tokens of every rank, and DDP averages the gradients over the ranks
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if aux_loss is not None and not own_ce:
            # A mean over the micro-batch: with `num_items_in_batch`, Trainer leaves accumulation to the loss
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        self._record_metrics(mode, inputs, ce_kl, aux_loss, sft_metrics=not own_ce)

        if return_outputs and outputs is None:
            with torch.no_grad():  # for `compute_metrics`: the logits do not exist in the fused pass
                outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        return (sft_loss + loss, outputs) if return_outputs else sft_loss + loss

    def _compute_l2_loss(self, model, inputs, return_outputs, num_items_in_batch):
        student = self.accelerator.unwrap_model(model)
        mode = "train" if self.model.training else "eval"
        if self.teacher.weight is None and mode == "eval":  # before the first step there is nothing to pull
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.teacher.weight is None:
            batch = {**inputs, "use_cache": False}
            args = self.args
            weight = self.teacher.calibrate(student, batch, args.kl_weight, args.temperature, args.learning_rate)
            # Each process has a batch of its own
            mean = self.accelerator.reduce(torch.tensor(weight, device=self.accelerator.device), "mean")
            self.teacher.weight = mean.item()
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = loss if return_outputs else (loss, None)
        penalty = self.teacher.penalty(student)
        log_means(self, mode, l2_loss=penalty.item())
        # A term of the whole step: with `num_items_in_batch`, Trainer leaves accumulation to the loss
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = loss + penalty / steps
        return (loss, outputs) if return_outputs else loss

    def _record_metrics(self, mode, inputs, ce_kl, aux_loss, sft_metrics: bool) -> None:
        """Keeps the metrics of `SFTTrainer`, and `ce_loss` and `kl_loss`, averaged over the tokens of all ranks."""
        if "attention_mask" in inputs:
            num_input_tokens = inputs["attention_mask"].sum()
        else:  # padding-free: one row of real tokens
            num_input_tokens = torch.tensor(inputs["position_ids"].size(1))
        means = torch.stack([ce_kl.ce_loss, ce_kl.kl_loss, ce_kl.entropy, ce_kl.top1_accuracy]).float()
        counts = torch.stack([ce_kl.num_tokens.to(means.device), num_input_tokens.to(means.device)])
        local = torch.cat([means * counts[0], counts]).unsqueeze(0)
        *sums, num_tokens, num_input_tokens = self.accelerator.gather_for_metrics(local).sum(0).tolist()
        ce_loss, kl_loss, entropy, accuracy = (total / max(num_tokens, 1.0) for total in sums)
        log_means(self, mode, ce_loss=ce_loss, kl_loss=kl_loss)
        if sft_metrics:  # otherwise SFTTrainer's own pass has recorded them
            log_means(self, mode, entropy=entropy, mean_token_accuracy=accuracy)
            count_input_tokens(self, mode, int(num_input_tokens))
            if aux_loss is not None:
                log_means(self, mode, aux_loss=self.accelerator.gather_for_metrics(aux_loss).mean().item())
