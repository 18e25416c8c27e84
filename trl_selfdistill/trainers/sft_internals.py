# SPDX-License-Identifier: Apache-2.0
"""The only file that relies on how TRL's `SFTTrainer` and transformers' models work inside.

What it relies on, and what happens when a TRL release moves it:
- `SFTTrainer.__init__` binds a `forward` to the model instance (`add_fused_lm_head`). A deep copy of the model would
  go on running the original's weights, so [`frozen_copy`] unbinds it. Were TRL to stop, unbinding does nothing.
- `create_model_from_path` loads a model given by name as `SFTTrainer` does. Were it gone, importing this file fails.
- `prepare_fsdp` and `prepare_deepspeed` shard the teacher like TRL's reference models. Were they gone, importing this
  file fails.
- `use_adapter` switches a PEFT model to another adapter, or to none. Were it gone, importing this file fails.
- `_prepare_dataset` truncates, packs and shuffles rows that are tokens already. Were it gone, `rehearsal_dataset`
  fails when the trainer is made.
- `get_config_model_id` reads the name that a model was loaded by. Were it gone, importing this file fails.
- `compute_loss` gets `inputs` with `labels`, and `aux_loss_enabled` asks for `output_router_logits`, of which
  transformers' `load_balancing_loss_func` makes the loss that `router_aux_loss_coef` weighs.
- `_metrics`, `_total_train_tokens` and `_tp_size` are what `SFTTrainer.log` reports from. Were they gone, the first
  step with a teacher fails.
- `_tokenizer` is the tokenizer, also of a processor. Were it gone, making a trainer with another teacher, or with
  `rehearsal_dataset`, fails.
- `_use_triton` decides whether the LM head is applied to the label positions only. Were it gone,
  [`label_positions_only`] fails.
"""

import copy
import dataclasses
import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTTrainer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer import utils as trl_utils
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from ..losses import IGNORE_INDEX, CEKLOutput, LMHead, ModelSide, linear_ce_kl
from ..parameters.structure import base_causal_lm
from .zero3 import copy_partitioned, is_partitioned


__all__ = [
    "DistillationOutput",
    "DistillationTargets",
    "add_distillation_forward",
    "add_training_rows",
    "config_from",
    "count_input_tokens",
    "create_model_from_path",
    "frozen_copy",
    "get_config_model_id",
    "label_positions_only",
    "lm_head_of",
    "log_means",
    "prepare_deepspeed",
    "prepare_fsdp",
    "tokenizer_of",
    "use_adapter",
]


class DistillationTargets(NamedTuple):
    """What the student's forward needs to compute the loss inside the DDP / FSDP / DeepSpeed wrapper."""

    teacher: ModelSide  # hidden states of shape (num_label_tokens, teacher_hidden_size)
    ce_weight: float
    kl_weight: float
    temperature: float
    num_items_in_batch: int | torch.Tensor | None


class DistillationOutput(NamedTuple):
    """What a forward returns that was called with [`DistillationTargets`]."""

    ce_kl: CEKLOutput
    aux_loss: torch.Tensor | None  # the MoE load-balancing loss, where router logits were asked for


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """
    A copy of `model` for the teacher: no gradients, evaluation mode, and a forward of its own.

    TRL and accelerate bind wrapped `forward`s to the instance, whose closures hold the original: in a plain deep copy
    they would keep running the weights of the student in training, and accelerate would not prepare it anew.
    """
    partitioned = any(map(is_partitioned, model.parameters()))
    teacher = copy_partitioned(model) if partitioned else copy.deepcopy(model)
    for module in (teacher, base_causal_lm(teacher)):
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            module.__dict__.pop(name, None)
    return teacher.requires_grad_(False).eval()


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """
    The LM head of a causal language model with the logit post-processing of its architecture, read from its config
    under the names that TRL's `add_fused_lm_head` knows. FSDP2 shards stay shards: `linear_ce_kl` gathers them.
    """
    config = model.config.get_text_config()
    logit_scale = None
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse Glimmer; Falcon-H1
        if logit_scale is None:
            logit_scale = getattr(config, name, None)
    if logit_scale is None and getattr(config, "logits_scaling", None) is not None:
        # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
        logit_scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    head = model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(head.weight, head.bias, 1.0 if logit_scale is None else logit_scale, softcap)


def add_distillation_forward(model: PreTrainedModel) -> None:
    """
    Lets `model(..., labels=labels, distillation=...)` run the backbone and the head on the label positions only.

    With `distillation=DistillationTargets(...)` it returns a [`DistillationOutput`], with `"hidden_states"` the last
    hidden states at the label positions, of shape `(num_label_tokens, hidden_size)`, without it what it returned
    before. It is a `forward`, as in TRL, because that is what DDP, FSDP, DeepSpeed, PEFT and accelerate's
    autocast wrap: parameters are gathered and cast, and prompt-learning tokens added, as in any other forward.
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against this signature
    def forward(self, *args, distillation=None, **kwargs):
        if distillation is None:
            return original_forward(*args, **kwargs)
        shift_labels = kwargs.pop("labels")[:, 1:]
        # The backbone is looked up on each call: FSDP and PEFT replace it after this function has run
        outputs = self.base_model(*args, **kwargs)
        mask = shift_labels != IGNORE_INDEX
        hidden_states = outputs.last_hidden_state[:, :-1]
        hidden_states = hidden_states[mask.to(hidden_states.device)]  # (num_label_tokens, hidden_size)
        if isinstance(distillation, str):
            return hidden_states
        ce_kl = _head_loss(self, hidden_states, shift_labels[mask], distillation)
        return DistillationOutput(ce_kl, _aux_loss(self, outputs, kwargs))

    model.forward = types.MethodType(forward, model)


def _head_loss(
    model: PreTrainedModel, hidden_states: torch.Tensor, shift_labels: torch.Tensor, targets: DistillationTargets
) -> CEKLOutput:
    if len(hidden_states) != len(targets.teacher.hidden_states):
        raise ValueError(
            f"The student has {len(hidden_states)} label positions and the teacher "
            f"{len(targets.teacher.hidden_states)} in the same batch. A prompt-learning adapter (virtual tokens) "
            "shifts the positions: pass a `teacher_model` with the same adapter, or train another kind of adapter."
        )
    lm_head = lm_head_of(model)
    device = lm_head.weight.device  # with `device_map`, the backbone may end on another device than the head
    return linear_ce_kl(
        hidden_states.to(device),
        lm_head,
        targets.teacher.hidden_states.to(device),
        targets.teacher.lm_head.map_tensors(lambda x: x.to(device)),
        shift_labels.to(device),
        ce_weight=targets.ce_weight,
        kl_weight=targets.kl_weight,
        temperature=targets.temperature,
        num_items_in_batch=targets.num_items_in_batch,
    )


@contextmanager
def label_positions_only() -> Iterator[None]:
    """
    Lets `SFTTrainer` apply the LM head to the label positions only on a CPU too, as it does on a GPU: elsewhere TRL
    1.16 scores every position, for devices that recompile when a shape changes. The loss is the same; a step of a
    small model on short answers takes half as long.
    """
    uses_triton = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or uses_triton(device)
    try:
        yield
    finally:
        trl_utils._use_triton = uses_triton


def _aux_loss(model: PreTrainedModel, outputs, kwargs: dict) -> torch.Tensor | None:
    """The MoE load-balancing loss, which the model's own forward would have computed from the router logits."""
    if not kwargs.get("output_router_logits"):
        return None
    config = model.config.get_text_config()
    return load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )


def add_training_rows(trainer: SFTTrainer, rows: Dataset) -> None:
    """Adds rows of tokens and labels to the trainer's dataset, truncated and packed as it is."""
    args = trainer.args
    prepared = trainer._prepare_dataset(rows, trainer.processing_class, args, args.packing, None, "rehearsal")
    # Columns that do not reach the model are empty in the new rows
    trainer.train_dataset = concatenate_datasets([trainer.train_dataset, prepared])


def tokenizer_of(trainer: SFTTrainer) -> PreTrainedTokenizerBase:
    """The tokenizer of a trainer's `processing_class`, which may be a processor."""
    return trainer._tokenizer


def log_means(trainer: SFTTrainer, mode: str, **values: float) -> None:
    """Adds values of this step (`mode="train"`) or batch (`"eval"`) to the means that the trainer logs next."""
    for name, value in values.items():
        trainer._metrics[mode][name].append(value)


def count_input_tokens(trainer: SFTTrainer, mode: str, number: int) -> None:
    """Adds the input tokens of this step, over all processes, to the logged `num_tokens` of the run."""
    if mode == "train":
        trainer._total_train_tokens += number // trainer._tp_size
    trainer._metrics[mode]["num_tokens"] = [trainer._total_train_tokens]


def config_from(args: TrainingArguments | None, config_class: type, model, suffix: str) -> TrainingArguments:
    """
    The `config_class` that a trainer works with, from what `SFTTrainer` accepts as `args`: its own config, a plain
    `TrainingArguments` or `SFTConfig` (whose values are kept), or `None` (`output_dir` is then `<model
    name>-<suffix>`).
    """
    if isinstance(args, config_class):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{name.split('/')[-1]}-{suffix}")
    values = args.to_dict()
    # `to_dict` masks every name that ends in `_token`, be it `hub_token` or `eos_token`
    values |= {name: getattr(args, name) for name in values if name.endswith("_token")}
    names = {field.name for field in dataclasses.fields(config_class)}
    config = config_class(**{name: value for name, value in values.items() if name in names})
    for name in values.keys() - names:  # of a config class of the user's own
        setattr(config, name, getattr(args, name))
    return config
