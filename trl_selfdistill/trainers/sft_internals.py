# SPDX-License-Identifier: Apache-2.0
"""
The only file that relies on how TRL, transformers, accelerate and DeepSpeed work inside. What new versions could break
without an error is tested in tests/trainers/test_sft_internals.py, and with which in docs/compatibility.md.
"""

import copy
import functools
import re
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import Accelerator, DistributedType, skip_first_batches
from accelerate.utils import compare_versions
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from ..losses import IGNORE_INDEX
from ..parameters.structure import base_causal_lm


TESTED = {"trl": "1.15.0 to 1.16.0", "transformers": "4.56.2 to 5.24.0"}


@contextmanager
def private_names() -> Iterator[None]:
    """Where the block misses a name of TRL or transformers, an `ImportError` that names it and the tested versions."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        found = " and ".join(f"{name} {version(name)} (tested: {tested})" for name, tested in TESTED.items())
        raise ImportError(
            f"trl_selfdistill relies on a private name that is not there: {error}. Found {found}. Install tested "
            "versions, or a newer trl-selfdistill."
        ) from error


with private_names():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from trl.models.utils import prepare_deepspeed, prepare_fsdp
    from trl.trainer import sft_trainer
    from trl.trainer import utils as trl_utils
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head as add_fused_lm_head  # not used: tells TRL 1.15's loss
    from trl.trainer.utils import create_model_from_path as create_model_from_path
    from trl.trainer.utils import get_config_model_id as get_config_model_id
    from trl.trainer.utils import use_adapter as use_adapter

    # TRL 1.15 has none: its head sees the label positions only, on every device
    _use_triton = trl_utils._use_triton if compare_versions("trl", ">=", "1.16") else None


class HookedSFTTrainer(SFTTrainer):
    """`SFTTrainer` with public hooks for private methods. An override calls `super()`: mixins have them, too."""

    method_name: str = "SFT"  # in TRL's messages and in the default output folder
    tags: list[str] = ["trl", "sft"]  # of the trained model
    current_gradient_accumulation_steps: int = 1  # of the step; Trainer sets it in training
    summed_steps: dict[str, int] = {}  # that the last of the logged sums are of
    extra_columns: tuple[str, ...] = ()  # of the prepared dataset, which reach the collator beside TRL's

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, private_name in (("method_name", "_name"), ("tags", "_tag_names")):
            if name in cls.__dict__:  # a user's subclass may set the private ones, as TRL's own trainers do
                setattr(cls, private_name, cls.__dict__[name])

    def on_save_model(self, folder: Path) -> None:
        """Called on the processes that save, when the model's weights have been written into `folder`."""

    def on_save_checkpoint(self, folder: Path) -> None:
        """Called on the processes that save, before the checkpoint `folder`, which may exist, is written."""

    def log_means(self, mode: str, **values: float) -> None:
        """Adds values of this step (`mode="train"`) or batch (`"eval"`) to the means that the trainer logs next."""
        for name, value in values.items():
            self._metrics[mode][name].append(value)

    def log_step_sums(self, **values: float) -> None:
        """Adds what a micro-batch contributes to sums over its step. The trainer logs their mean over the steps."""
        for name, value in values.items():
            sums = self._metrics["train"][name]
            if self.summed_steps.get(name) != self.state.global_step or not sums:
                sums.append(0.0)
            sums[-1] += value
        self.summed_steps = self.summed_steps | dict.fromkeys(values, self.state.global_step)

    def count_input_tokens(self, mode: str, number: int) -> None:
        """Adds the input tokens of this step, over all processes, to the logged `num_tokens` of the run."""
        if mode == "train":
            self._total_train_tokens += number // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.extra_columns if name not in self._signature_columns]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.on_save_model(Path(self.args.output_dir if output_dir is None else output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result) -> None:
        if set(load_result.missing_keys) - {*(getattr(self.model, "all_tied_weights_keys", None) or ())}:
            # What `save_pretrained` renamed (experts), which `Trainer` would leave untrained, with a warning
            load_result = load_saved(self.model, self._loaded_from)
        super()._issue_warnings_after_load(load_result)

    def _inner_training_loop(self, *args, **kwargs):
        def skip_within_the_epoch(dataloader, num_batches=0):
            rest = skip_first_batches(dataloader, num_batches)
            rest.iteration = getattr(dataloader, "iteration", 0)
            return rest

        # accelerate before 1.15 forgets the epoch: transformers 4 would resume in the order of the first one
        with patch.object(transformers_trainer, "skip_first_batches", skip_within_the_epoch):
            return super()._inner_training_loop(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.on_save_checkpoint(folder)
        super()._save_checkpoint(model, trial)


with private_names():  # of a method with another name nobody would notice that it is not called any more
    _used = "_get_output_dir _get_train_sampler _remove_unused_columns"
    for _name in re.findall(r"\b_[a-z]\w+", " ".join([_used, *vars(HookedSFTTrainer)])):
        getattr(SFTTrainer, _name)


class LabelStates(NamedTuple):
    """What a backbone gives for a batch, at the label positions of all rows one after another."""

    hidden_states: torch.Tensor  # (num_label_tokens, hidden_size)
    shift_labels: torch.Tensor  # (num_label_tokens,), the token that each of them predicts
    aux_loss: torch.Tensor | None  # the MoE load-balancing loss, where router logits were asked for


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` for the teacher: without gradients, in evaluation mode, and with a forward of its own."""
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    try:
        teacher = _copy_partitioned(model) if partitioned else copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        advice = "A hook or an attribute of a module holds it: remove that, or pass a `teacher_model`"
        raise ValueError(f"The model cannot be copied for the teacher: {error}. {advice}.") from error
    # The forwards that TRL and accelerate bind to the student would run it, and accelerate would not prepare the copy
    for module in (teacher, base_causal_lm(teacher)):
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            module.__dict__.pop(name, None)
    return teacher.requires_grad_(False).eval()


def load_saved(model: PreTrainedModel, folder: str | Path):
    """Loads what `save_pretrained` wrote, under whatever names: the model keeps its dtypes and its attention."""
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    whole, found = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    # What has no other name either (one of two tensors that share memory) stays as it is in memory
    state = {name: value for name, value in whole.state_dict().items() if name not in found["missing_keys"]}
    return model.load_state_dict(state, strict=False)


def _copy_partitioned(model: PreTrainedModel) -> PreTrainedModel:
    if hasattr(model, "peft_config"):
        raise ValueError("ZeRO-3 has partitioned the adapter. Use ZeRO-2, FSDP, a `teacher_model` or `kl_weight=0`.")
    config = copy.deepcopy(model.config)
    # While ZeRO-3 is on, transformers partitions what it makes, in the same way
    with patch.object(PreTrainedModel, "initialize_weights"):  # it may index an embedding that is elsewhere
        twin = type(model)._from_config(config, dtype=model.dtype, attn_implementation=config._attn_implementation)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.ds_tensor.copy_(theirs.ds_tensor)
        for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
    return twin


def prepare_teacher(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """The teacher on the accelerator's device, in its mixed precision, and sharded as it shards models."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    # `Trainer.evaluate` prepares the student only if nothing has been prepared yet, and the teacher may be replaced
    accelerator._models.pop()
    return prepared


def add_label_head_forward(model: PreTrainedModel) -> None:
    """
    Lets `model(..., labels=labels, label_head=function)`, without a PEFT wrapper, return `function(model, states)` of
    the [`LabelStates`] of its backbone. It is a `forward`, as in TRL, because that is what DDP, FSDP, DeepSpeed, PEFT
    and accelerate's autocast wrap: parameters are gathered and cast, and prompt-learning tokens are added.
    """
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against this signature
    def forward(self, *args, label_head: Callable[[PreTrainedModel, LabelStates], Any] | None = None, **kwargs):
        if label_head is None:
            return original_forward(*args, **kwargs)
        shift_labels = kwargs.pop("labels")[:, 1:]
        # FSDP and PEFT may replace the backbone; a model with images is its own `base_model` in transformers 4
        backbone = self.model if self.base_model is self else self.base_model
        outputs = backbone(*args, **kwargs)
        mask = shift_labels != IGNORE_INDEX
        hidden_states = outputs.last_hidden_state[:, :-1]
        hidden_states = hidden_states[mask.to(hidden_states.device)]  # (num_label_tokens, hidden_size)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            # Only the model or only the config has both in some families
            owner = self if hasattr(self, "num_experts_per_tok") else self.config.get_text_config()
            try:
                experts = owner.num_experts, owner.num_experts_per_tok
                aux_loss = load_balancing_loss_func(outputs.router_logits, *experts, kwargs.get("attention_mask"))
            except (AttributeError, IndexError, RuntimeError, TypeError) as error:
                name = f"The load-balancing loss of {type(self).__name__}"
                raise ValueError(f"{name} is not Mixtral's ({error}). Set `router_aux_loss_coef=0`.") from error
        return label_head(self, LabelStates(hidden_states, shift_labels[mask], aux_loss))

    model.forward = types.MethodType(forward, model)


def peft_configs_made_by(make: Callable[[Any, PreTrainedModel], Any]) -> AbstractContextManager:
    """Lets `SFTTrainer` put the adapter of `make(peft_config, model)` on the model that it has loaded."""

    def get_peft_model(model: PreTrainedModel, config, **options):
        return original(model, make(config, model), **options)

    original = getattr(sft_trainer, "get_peft_model", None)  # without PEFT there are no configs
    return patch.object(sft_trainer, "get_peft_model", get_peft_model, create=True)


def name_experts(model: PreTrainedModel) -> None:
    """Lets TRL read `num_experts` of a mixture (Granite, Phi) whose config says `num_local_experts`, as Mixtral's."""
    config = model.config.get_text_config()
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        type(config).attribute_map = {**config.attribute_map, "num_experts": "num_local_experts"}


def label_positions_only() -> AbstractContextManager:
    """Lets `SFTTrainer` apply the LM head to the label positions only on a CPU too, as on a GPU. Same loss."""
    return patch.object(
        trl_utils, "_use_triton", lambda device: device.type == "cpu" or _use_triton(device), create=True
    )


def train_in_order(trainer: SFTTrainer) -> None:
    """Lets a trainer take the rows as they stand. transformers 5.0 and older have no option for that."""
    trainer._get_train_sampler = SequentialSampler


def without_unused_columns(trainer: SFTTrainer, dataset: Dataset) -> Dataset:
    """A prepared dataset with the columns that the trainer hands to its collator."""
    return trainer._remove_unused_columns(dataset, "training")


def prepare_rows(trainer: SFTTrainer, dataset: Dataset) -> Dataset:
    """Anchors as the trainer prepares its training data: tokens, labels (of answers those alone), packing."""
    args, guessed = trainer.args, trainer.completion_only_loss  # by the training rows
    trainer.completion_only_loss = args.completion_only_loss is not False
    try:
        return trainer._prepare_dataset(dataset, trainer.processing_class, args, args.packing, None, "anchor")
    finally:
        trainer.completion_only_loss = guessed
