# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: SFT with a KL to a frozen snapshot of the model itself (arXiv 2604.15574, section 4.1)."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging
from trl import SFTTrainer

from .self_distill_sft_config import SelfDistillSFTConfig
from .sft_internals import (
    DistillationTargets,
    add_distillation_forward,
    base_causal_lm,
    config_from,
    create_model_from_path,
    frozen_copy,
    get_config_model_id,
    lm_head_of,
)
from .trainer_card import ModelCardMixin


logger = logging.get_logger(__name__)

# Trainer's push to the Hub leaves out names that start with an underscore
TEACHER_FOLDER = "_teacher"


class SelfDistillSFTTrainer(ModelCardMixin, SFTTrainer):
    """
    Trainer for supervised fine-tuning that does not make the model forget: `SFTTrainer` with the loss
    `CE + kl_weight * temperature**2 * KL(teacher ‖ student)`, where the teacher is a frozen snapshot of the model.

    Unlike [`~trl.DistillationTrainer`] and `SDFTTrainer` it needs no generation: it learns the dataset's labels, and
    both terms are taken at the label positions, with the same denominator.

    Every argument of [`~trl.SFTTrainer`] works as it does there.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.SFTTrainer`].
        args ([`SelfDistillSFTConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration. The values of a plain `SFTConfig` or `TrainingArguments` are kept.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Teacher, by path, Hub id or instance. Defaults to `args.teacher_model_name_or_path`, and without that to a
            frozen copy of the model as handed over. An instance is frozen in place.
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
        **kwargs,
    ):
        args = config_from(args, SelfDistillSFTConfig, model, self._name)
        if teacher_model is not None and args.teacher_model_name_or_path is not None:
            raise ValueError(
                f"The teacher is given twice: `teacher_model` and `args.teacher_model_name_or_path="
                f"{args.teacher_model_name_or_path!r}`. Set one of them."
            )
        snapshot = args.teacher_snapshot_steps or args.teacher_snapshot_epochs
        if teacher_model is not None and snapshot:
            raise ValueError(
                "`teacher_model` was given together with `teacher_snapshot_steps` or `teacher_snapshot_epochs`, "
                "which make a snapshot of the model the teacher. Set one of them."
            )
        by_name = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
            if getattr(args, name) is not None and not isinstance(by_name, str):
                raise ValueError(
                    f"`{name}` is for a teacher that is loaded by name, and no teacher is. Name it in `teacher_model` "
                    f"or `args.teacher_model_name_or_path`, or leave `{name}` unset."
                )
        super().__init__(model, args, *positional, **kwargs)
        self.teacher_model = None
        if args.kl_weight == 0:
            return
        self._refuse_what_has_no_kl()
        # The copy comes after `SFTTrainer.__init__`, which may resize the embeddings for a new chat template
        if snapshot:
            self.add_callback(_SnapshotCallback(self))
        else:
            teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
            teacher = frozen_copy(self.model) if teacher_model is None else self._load_teacher(teacher_model)
            self.set_teacher(teacher)
        add_distillation_forward(base_causal_lm(self.model))

    def _refuse_what_has_no_kl(self) -> None:
        plugin = self.args.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "`kl_weight > 0` is not supported with DeepSpeed ZeRO-3: the teacher would be partitioned too. Use "
                "ZeRO-2, or FSDP, which shards the student and leaves the teacher whole, or set `kl_weight=0`."
            )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.sp_enabled or parallelism.cp_enabled):
            raise ValueError(
                "`kl_weight > 0` is not supported with sequence or context parallelism (`sp_size` or `cp_size` > 1): "
                "each rank holds a part of the sequence. Use FSDP or ZeRO-2 without it, or set `kl_weight=0`."
            )

    def _load_teacher(self, teacher: str | PreTrainedModel) -> PreTrainedModel:
        """Loads (or takes) a given teacher and refuses one whose vocabulary or tokenizer is not the student's."""
        if isinstance(teacher, str):
            init_kwargs = dict(self.args.teacher_model_init_kwargs or {})
            if self.args.teacher_model_revision is not None:
                init_kwargs.setdefault("revision", self.args.teacher_model_revision)
            init_kwargs.setdefault("trust_remote_code", self.args.trust_remote_code)
            # As `SFTTrainer` does for the model: each process holds the whole of it
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init_kwargs["device_map"] = None
            teacher = create_model_from_path(teacher, **init_kwargs)
        if not set(teacher.parameters()).isdisjoint(self.model.parameters()):
            raise ValueError(
                "`teacher_model` is the model in training itself, or shares parameters with it, which would make it a "
                "moving teacher. Leave `teacher_model` unset to take a frozen copy of the model."
            )
        self._check_vocabulary(teacher)
        return frozen_copy(teacher) if "forward" in base_causal_lm(teacher).__dict__ else teacher

    def _check_vocabulary(self, teacher: PreTrainedModel) -> None:
        sizes = [base_causal_lm(m).get_output_embeddings().weight.shape[0] for m in (self.model, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The model has a vocabulary of {sizes[0]} tokens and `teacher_model` one of {sizes[1]}. The KL "
                "compares whole next-token distributions: take a teacher of the same vocabulary, or resize its "
                "embeddings (`teacher_model.resize_token_embeddings`) where the difference is padding."
            )
        name = get_config_model_id(teacher.config)
        if not name:
            return  # built in memory: there is no tokenizer to compare with
        try:
            teacher_tokenizer = AutoTokenizer.from_pretrained(
                name, revision=self.args.teacher_model_revision, trust_remote_code=self.args.trust_remote_code
            )
        except (OSError, ValueError) as error:
            logger.warning(f"The tokenizer of the teacher {name!r} could not be compared with the student's: {error}")
            return
        if teacher_tokenizer.get_vocab() != self._tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer of the teacher {name!r} is not the student's: the same ids would mean other tokens. "
                "Use a teacher that was trained with the student's tokenizer."
            )

    def set_teacher(self, teacher: PreTrainedModel) -> None:
        """Makes `teacher` the frozen teacher from the next step on."""
        teacher.requires_grad_(False).eval()
        add_distillation_forward(base_causal_lm(teacher))
        # For its mixed precision the teacher is treated as the student. Under FSDP accelerate would leave it to the
        # sharding to place a model, but the teacher is not sharded
        placement = True if self.is_fsdp_enabled else None
        self.teacher_model = self.accelerator.prepare_model(teacher, device_placement=placement, evaluation_mode=True)

    def _teacher_targets(self, inputs: dict, **weights) -> DistillationTargets:
        with torch.no_grad():
            hidden_states = self.teacher_model(**inputs, distillation="hidden_states")
            lm_head = lm_head_of(base_causal_lm(self.accelerator.unwrap_model(self.teacher_model)))
        return DistillationTargets(hidden_states, lm_head, temperature=self.args.temperature, **weights)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher_model is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # What SFTTrainer computes otherwise than by one pass of the fused head keeps its own loss, to which the KL is
        # added
        own_ce = self.args.loss_type != "nll" or self.label_smoother is not None or self.compute_loss_func is not None
        sft_loss, outputs = 0.0, None
        if own_ce:
            sft_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            sft_loss, outputs = sft_loss if return_outputs else (sft_loss, None)

        mode = "train" if self.model.training else "eval"
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        targets = self._teacher_targets(
            inputs,
            ce_weight=0.0 if own_ce else 1.0,
            kl_weight=self.args.kl_weight,
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
        metrics = self._metrics[mode]
        metrics["ce_loss"].append(ce_loss)
        metrics["kl_loss"].append(kl_loss)
        if not sft_metrics:  # SFTTrainer's own pass recorded the others
            return
        metrics["entropy"].append(entropy)
        metrics["mean_token_accuracy"].append(accuracy)
        if mode == "train":
            self._total_train_tokens += int(num_input_tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        if aux_loss is not None:
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())


class _SnapshotCallback(TrainerCallback):
    """Freezes a snapshot of the student as the teacher, once, after the configured steps or epochs of plain SFT."""

    def __init__(self, trainer: SelfDistillSFTTrainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir) / TEACHER_FOLDER
        unsuited = {
            "a PEFT model": hasattr(trainer.model, "peft_config"),
            "FSDP": trainer.is_fsdp_enabled,
            "DeepSpeed": trainer.is_deepspeed_enabled,
        }
        if what := [name for name, applies in unsuited.items() if applies]:
            raise ValueError(
                "`teacher_snapshot_steps` and `teacher_snapshot_epochs` take full models that are not sharded, got "
                f"{what[0]}. Train stage 1 first, then start a run from its checkpoint: the teacher is then the model "
                "as handed over."
            )
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
        self.trainer.teacher_model = None
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
            if not (self.folder / "config.json").is_file():
                raise FileNotFoundError(
                    f"Resuming at step {state.global_step}, after the teacher's snapshot, but {self.folder} does not "
                    "hold it. Put the folder back, or start the run anew."
                )
            self.trainer.set_teacher(type(base_causal_lm(self.trainer.model)).from_pretrained(self.folder))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.teacher_model is None and self._is_due(args, state):
            self.trainer.save_model(str(self.folder), _internal_call=True)  # a teacher is not pushed
            self.trainer.set_teacher(frozen_copy(self.trainer.accelerator.unwrap_model(self.trainer.model)))
            logger.info(f"Step {state.global_step}: the teacher is a snapshot of the model ({self.folder}).")
