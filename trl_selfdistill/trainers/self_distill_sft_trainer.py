# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: SFT with a KL to a frozen snapshot of the model itself (arXiv 2604.15574, section 4.1)."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..parameters.structure import base_causal_lm
from ..slick.generation import forked
from .adapter_teacher import AdapterTeacher, fits_adapter_teacher
from .anchors import Anchors, draw_anchors, load_anchors, prepare_anchors
from .frozen_groups_sft_config import config_from
from .frozen_groups_sft_trainer import FrozenGroupsSFTTrainer
from .label_head import check_label_head, student_ce_kl
from .self_distill_sft_config import SelfDistillSFTConfig
from .sft_internals import add_label_head_forward, frozen_copy
from .teacher_cache import CACHE_COLUMN, precompute_teacher
from .teacher_snapshot import TeacherSnapshotCallback
from .teachers import ModelTeacher, Teacher, check_teacher, load_teacher, refuse_adapter_on_head


class SelfDistillSFTTrainer(FrozenGroupsSFTTrainer):
    """
    Trainer for supervised fine-tuning that does not make the model forget: `SFTTrainer` with the loss
    `CE + kl_weight * temperature**2 * KL(teacher ‖ student)`, where the teacher is a frozen snapshot of the model.

    Unlike [`~trl.DistillationTrainer`] and `SDFTTrainer` it needs no generation: it learns the dataset's labels, and
    both terms are taken at the label positions, with the same denominator. Every argument of [`~trl.SFTTrainer`] works
    as it does there, and groups of parameters can be frozen as in [`FrozenGroupsSFTTrainer`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.SFTTrainer`].
        args ([`SelfDistillSFTConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration. The values of a plain `SFTConfig` or `TrainingArguments` are kept.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, by path, Hub id or instance, which is frozen in place. Defaults to
            `args.teacher_model_name_or_path`, and without that to a frozen copy of `model`.
        anchor_dataset (`Dataset`, *optional*):
            Prompts or texts for `args.anchors`, in a column `prompt`, `messages` or `text`.
        kwargs: The other arguments of [`~trl.SFTTrainer`].

    Attributes:
        teacher ([`~trl_selfdistill.trainers.teachers.Teacher`]): `None` without a KL and before its snapshot.
        teacher_folder (`pathlib.Path`): Where a teacher is kept that a resumed run could not load from elsewhere.

    Raises:
        ValueError: If the teacher does not fit the student or is given twice, the KL does not work with another
            setting, a model's logits are not those of its LM head, or the anchors are not what `args.anchors` needs.

    Example:

    ```python
    from datasets import load_dataset
    from trl_selfdistill import SelfDistillSFTTrainer

    dataset = load_dataset("trl-lib/Capybara", split="train")
    SelfDistillSFTTrainer("Qwen/Qwen2.5-1.5B", train_dataset=dataset).train()
    ```
    """

    tags = ["trl", "sft", "self-distill-sft"]
    method_name = "SelfDistillSFT"
    extra_columns = (CACHE_COLUMN,)

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SelfDistillSFTConfig | None = None,
        *positional,
        teacher_model: str | PreTrainedModel | None = None,
        anchor_dataset: Dataset | None = None,
        **kwargs,
    ):
        args = config_from(args, SelfDistillSFTConfig, model, self.method_name)
        given = args.choose_teacher(teacher_model)
        anchor_dataset = load_anchors(args, anchor_dataset)
        super().__init__(model, args, *positional, **kwargs)
        self.anchors: Anchors | None = None  # those with a KL of their own
        evaluated = kwargs.get("eval_dataset", positional[2] if len(positional) > 2 else None)
        self.anchor_settings = prepare_anchors(self, anchor_dataset, evaluated)
        self.teacher: Teacher | None = None
        self.saved_teacher: dict | None = None  # of the checkpoint that training resumes from
        # Trainer does not push names that start with "_"
        self.teacher_folder = Path(args.output_dir) / "_teacher"
        self._teacher_name = given if isinstance(given, str) else None
        self._awaits_teacher = args.kl_weight > 0 or self.anchors is not None
        if not self._awaits_teacher:
            return
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled):
            raise ValueError("No KL with sequence or context parallelism: unset it, or set `kl_weight=0`.")
        refuse_adapter_on_head(self.model, "model")
        student = base_causal_lm(self.model)
        add_label_head_forward(student)
        weight = student.get_input_embeddings().weight
        # FSDP and DeepSpeed place a model when training starts: then the teacher alone is checked, mostly its copy
        if weight.numel() and weight.device.type == self.accelerator.device.type:
            check_label_head(student, self.accelerator, "model")
        if args.takes_snapshot:
            self.add_callback(TeacherSnapshotCallback(self))
        elif given is None:
            self.teacher = self.freeze_student()
        else:
            self.teacher = ModelTeacher(load_teacher(given, self), self.accelerator)
        if args.precompute_teacher:
            self.teacher = precompute_teacher(self)

    def freeze_student(self) -> Teacher:
        """The student as it is now as a teacher: its adapter, if the model can hold two of them, or a copy."""
        if fits_adapter_teacher(self.model):
            return AdapterTeacher(self.model)
        return ModelTeacher(frozen_copy(self.accelerator.unwrap_model(self.model)), self.accelerator)

    def train(self, *args, **kwargs):
        if self.teacher is not None and self.args.takes_snapshot:  # of an earlier call
            self.teacher.release(self.model)
            self.teacher = None
        return super().train(*args, **kwargs)

    @property
    def teacher_model(self) -> PreTrainedModel | None:
        """The teacher as a model; `None` where there is none, or where it is no model of its own."""
        return self.teacher.model if self.teacher is not None else None

    def describe_run(self) -> dict:
        teacher = self.teacher and {"sha256": self.teacher.sha256, "name_or_path": self._teacher_name}
        return {**super().describe_run(), "teacher": teacher, "anchors": self.anchor_settings}

    def check_run(self, saved: dict, checkpoint: Path) -> None:
        if saved.get("anchors") != self.anchor_settings:
            raise ValueError(
                f"{checkpoint} was trained with the anchors {saved.get('anchors')}, not {self.anchor_settings}. "
                "Resume with the same ones, or start a new run from that model."
            )
        super().check_run(saved, checkpoint)
        self.saved_teacher = saved.get("teacher")
        if self.teacher is not None:
            self.teacher.restore(self.model, self.teacher_folder, self.saved_teacher)
        if not (self.args.takes_snapshot and self._awaits_teacher):  # else the snapshot's callback does it
            check_teacher(self.teacher, self.saved_teacher, checkpoint)

    def on_save_checkpoint(self, folder: Path) -> None:
        super().on_save_checkpoint(folder)
        if self.teacher is not None:
            self.teacher.keep(self.teacher_folder)

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.anchors is not None and self.teacher is not None:
            draw_anchors(self, batches)
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs}  # a subclass may ask twice
        anchors = inputs.pop("anchors", None)  # of a step of training, which asks for the loss alone
        if self.teacher is None:
            if self.args.kl_weight > 0 and not self._awaits_teacher:
                now = f"is {self.args.kl_weight} now, and was 0 when the trainer was made, without a teacher therefore"
                raise ValueError(f"`kl_weight` {now}. Start with a small one, such as 1e-6.")
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss = self._distillation_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss if anchors is None else loss + self._anchor_loss(model, *anchors, num_items_in_batch)

    def _anchor_loss(self, model, inputs, num_tokens: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """What a micro-batch adds to the mean of `anchor_weight τ² KL` over the `num_tokens` of the step's anchors."""
        inputs["use_cache"] = False
        options = {"ce_weight": 0.0, "kl_weight": self.args.anchor_weight, **self.args.kl_options}
        with forked(self.accelerator.device):  # the rows get the random numbers that they get without anchors
            teacher = self.teacher.targets(model, inputs)
            ce_kl, _ = student_ce_kl(model, inputs, teacher, **options, num_items_in_batch=num_tokens)
        ranks = self.accelerator.num_processes // self.get_tp_size()  # over which DDP averages the gradients
        share = ce_kl.num_tokens * ranks / num_tokens.clamp(min=1)
        self.log_step_sums(anchor_kl_loss=self.accelerator.gather(share * ce_kl.kl_loss).mean().item())
        # Without `num_items_in_batch`, Trainer divides the loss by the steps
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is None else 1
        return ce_kl.loss * ranks * steps

    def _distillation_loss(self, model, inputs, return_outputs, num_items_in_batch):
        args = self.args
        # Another loss than the CE is left to `SFTTrainer`: the KL is added to it, from a forward of its own
        own_ce = args.loss_type != "nll" or self.label_smoother is not None or self.compute_loss_func is not None
        if own_ce and args.kl_weight == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        inputs["use_cache"] = False
        teacher = self.teacher.targets(model, inputs) if args.kl_weight else None
        sft_loss, outputs = 0.0, None
        if own_ce:
            sft_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            sft_loss, outputs = sft_loss if return_outputs else (sft_loss, None)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        options = {"ce_weight": 0.0 if own_ce else 1.0, "kl_weight": args.kl_weight, **args.kl_options}
        ce_kl, aux_loss = student_ce_kl(model, inputs, teacher, **options, num_items_in_batch=num_items_in_batch)
        loss, share = ce_kl.loss, 1.0  # share: what this micro-batch counts of the logged loss, next to its rank's
        if num_items_in_batch is not None:
            # It counts the tokens of every rank, and DDP averages the gradients over the ranks
            ranks = self.accelerator.num_processes // self.get_tp_size() if args.average_tokens_across_devices else 1
            loss, share = loss * ranks, ce_kl.num_tokens * ranks / max(1, num_items_in_batch)
        elif mode == "train":
            share = 1 / self.current_gradient_accumulation_steps  # by which Trainer divides the loss then
        if aux_loss is not None and not own_ce:
            # A mean over the micro-batch: with `num_items_in_batch`, Trainer leaves accumulation to the loss
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
        if args.kl_weight:
            self._record_losses(mode, share * torch.stack([ce_kl.ce_loss, ce_kl.kl_loss]))
        if not own_ce:  # else its pass has recorded them
            self._record_metrics(mode, inputs, ce_kl, aux_loss)
        if return_outputs and outputs is None:
            with torch.no_grad():  # for `compute_metrics`: the logits do not exist in the fused pass
                outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        return (sft_loss + loss, outputs) if return_outputs else sft_loss + loss

    def _record_losses(self, mode: str, ce_and_kl: torch.Tensor) -> None:
        """Keeps `ce_loss` and `kl_loss` so that they add up to the loss that Trainer logs."""
        if mode == "train":
            ce_loss, kl_loss = self.accelerator.gather(ce_and_kl[None]).mean(0).tolist()
            self.log_step_sums(ce_loss=ce_loss, kl_loss=kl_loss)
            return
        rows = ce_and_kl.repeat(self.args.eval_batch_size, 1)  # batches count by their rows
        for ce_loss, kl_loss in self.accelerator.gather_for_metrics(rows).tolist():
            self.log_means(mode, ce_loss=ce_loss, kl_loss=kl_loss)

    def _record_metrics(self, mode, inputs, ce_kl, aux_loss) -> None:
        """Keeps the other metrics as `SFTTrainer` does: means over the tokens of all ranks, whose mean is logged."""
        # Without a mask: padding-free, one row of real tokens
        num_input_tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        means = torch.stack([ce_kl.entropy, ce_kl.top1_accuracy]).float()
        counts = torch.stack([ce_kl.num_tokens, num_input_tokens])
        local = torch.cat([means * counts[0], counts]).unsqueeze(0)
        *sums, num_tokens, num_input_tokens = self.accelerator.gather_for_metrics(local).sum(0).tolist()
        entropy, accuracy = (total / max(num_tokens, 1.0) for total in sums)
        self.log_means(mode, entropy=entropy, mean_token_accuracy=accuracy)
        self.count_input_tokens(mode, int(num_input_tokens))
        if aux_loss is not None:
            self.log_means(mode, aux_loss=self.accelerator.gather_for_metrics(aux_loss).mean().item())
