# SPDX-License-Identifier: Apache-2.0
"""SFT of some groups of parameters, the others proved unchanged (arXiv 2604.15574, section 3)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTConfig

from ..files import warn_without, write_json
from ..parameters.groups import GroupTable, freeze_selection, refuse_adapters_elsewhere, restrict_peft_config
from ..parameters.hashes import digest, hash_parameters, verify_frozen
from ..parameters.structure import keep_trainable
from .frozen_groups_sft_config import FrozenGroupsSFTConfig, config_from
from .resume import ExactResumeMixin
from .sft_internals import HookedSFTTrainer, name_experts, peft_configs_made_by
from .trainer_card import ModelCardMixin


class FrozenGroupsSFTTrainer(ExactResumeMixin, ModelCardMixin, HookedSFTTrainer):
    """
    Trainer for supervised fine-tuning of some groups of parameters: `SFTTrainer` with the others frozen, so that they
    get no gradient, no optimizer state and no weight decay.

    The table of the groups is printed, kept in `group_table`, and saved with each model in `parameter_groups.json`,
    with the SHA-256 of what is frozen. With a `peft_config` the adapters go to the trainable groups.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.SFTTrainer`].
        args ([`FrozenGroupsSFTConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration. The values of a plain `SFTConfig` or `TrainingArguments` are kept, and nothing is frozen.
        kwargs: The other arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: If [`~trl_selfdistill.parameters.groups.freeze_selection`] cannot freeze the groups, adapters would
            train frozen ones, or the data have no rows or not the columns of a format of TRL.
    """

    tags = ["trl", "sft", "frozen-groups-sft"]
    method_name = "FrozenGroupsSFT"

    def __init__(self, model: str | PreTrainedModel, args: FrozenGroupsSFTConfig | None = None, *positional, **kwargs):
        args = config_from(args, FrozenGroupsSFTConfig, model, self.method_name)
        selection = args.group_selection
        self.group_table: GroupTable | None = None
        self._frozen_check = _FrozenCheck()
        given = signature(super().__init__).bind(model, args, *positional, **kwargs).arguments
        for name in ("train_dataset", "eval_dataset") if given.get("formatting_func") is None else ():
            data = given.get(name)
            for part in data.values() if isinstance(data, dict) else [data]:
                check_rows(args, f"`{name}`", part)
        with peft_configs_made_by(partial(restrict_peft_config, selection=selection)):
            super().__init__(model, args, *positional, **kwargs)
        keep_trainable(self.model)
        name_experts(self.model)
        if selection is None:
            return
        # After `SFTTrainer.__init__`, which may load the model and make new, trainable embeddings for a chat template
        if hasattr(self.model, "peft_config"):
            refuse_adapters_elsewhere(self.model, selection)
        self.group_table = freeze_selection(self.model, selection)
        # As `SFTTrainer` does for PEFT (https://github.com/huggingface/trl/issues/2514), until
        # https://github.com/deepspeedai/DeepSpeed/pull/8130 is released: frozen parameters break the other kind
        if args.gradient_checkpointing and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            checkpointing_kwargs = {**(args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
            args.gradient_checkpointing_kwargs = args.activation_checkpointing_kwargs = checkpointing_kwargs
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # Frozen embeddings would cut off the gradients of every layer without a word. transformers 5 does this.
            self.model.enable_input_require_grads()
        self.accelerator.print(f"{selection}\n{self.group_table}")
        if args.verify_frozen:
            self._frozen_check.names = {name for name, p in self.model.named_parameters() if not p.requires_grad}
            self.add_callback(self._frozen_check)

    def describe_run(self) -> dict:
        return {**super().describe_run(), **self.describe_groups()}

    def check_run(self, saved: dict, checkpoint: Path) -> None:
        """Also refuses other groups: an optimizer's state is stored by position, and would go to other parameters."""
        super().check_run(saved, checkpoint)
        for option in ("frozen_groups", "trainable_groups"):
            value, before = getattr(self.args, option) or None, saved.get(option)
            if sorted(before or []) != sorted(value or []):
                raise ValueError(f"{checkpoint} was trained with `{option}={before}`, not {value}. Resume with it.")
        rows = saved.get("groups", {})
        self._frozen_check.resumed = {group: row["frozen_sha256"] for group, row in rows.items()}

    def evaluation_loop(self, *args, **kwargs):
        # `bf16_full_eval` and `fp16_full_eval` round the weights themselves, which may be saved or trained on later
        is_rounded = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        with _unrounded_afterwards(self.model) if is_rounded else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        verify_frozen(self.model, self._frozen_check.expected)  # before the model is saved
        if self.args.should_save:  # of an earlier run in this folder, whose adapter loaders would take for the model
            for name in ("adapter_config.json", "adapter_model.safetensors", "parameter_groups.json"):
                if (path := Path(output_dir or self.args.output_dir) / name).is_file():
                    path.unlink()
        super().save_model(output_dir, _internal_call)

    def on_save_model(self, folder: Path) -> None:
        super().on_save_model(folder)
        if self.group_table is not None:
            with warn_without(folder / "parameter_groups.json"):
                write_json(folder / "parameter_groups.json", self.describe_groups())

    def describe_groups(self) -> dict:
        """The groups asked for, and the counts of each group with the SHA-256 of its frozen parameters."""
        digests, is_checked = {}, self.group_table is not None and self.args.verify_frozen
        # The hash of a shard is not that of the tensor in a file
        if is_checked and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            hashes = self._frozen_check.expected or hash_parameters(self.model)
            digests = {group: digest(members) for group, members in hashes.items()}
        rows = {row.group: row._asdict() | {"frozen_sha256": digests.get(row.group)} for row in self.group_table or ()}
        options = {"frozen_groups": self.args.frozen_groups or None, "trainable_groups": self.args.trainable_groups}
        return {**options, "groups": rows}


def check_rows(args: SFTConfig, name: str, data: Any) -> None:
    """A `ValueError` if `data`, which messages call `name`, has no rows, or columns of none of TRL's formats."""
    if isinstance(data, Dataset) and not len(data):
        raise ValueError(f"{name} has no rows: add some.")
    columns, text = {*(getattr(data, "column_names", None) or ())}, args.dataset_text_field
    is_prepared = (args.dataset_kwargs or {}).get("skip_prepare_dataset") or columns & {"input_ids", "image", "images"}
    # With a prompt, TRL asks for a completion, whatever else there is
    accepted = {"completion"} if "prompt" in columns else {"messages", "conversations", text}
    if columns and not is_prepared and not columns & accepted:
        found = ", ".join(sorted(columns))
        raise ValueError(f"{name} has the columns {found}: give prompt and completion, messages, or {text}.")


class _FrozenCheck(TrainerCallback):
    """Hashes the frozen parameters when training starts (a checkpoint is loaded by then), and compares at its end."""

    names: set[str] = set()  # of what the trainer froze
    expected: dict[str, dict[str, str]] = {}  # nothing before training, or where nothing is checked
    resumed: dict[str, str | None] = {}  # the hash of each group in the checkpoint that training resumes from

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if freed := [name for name, p in model.named_parameters() if p.requires_grad and name in self.names]:
            found = f"{len(freed)} parameters that the trainer froze are trainable now: {freed[:3]}"
            raise ValueError(f"{found}. Remove what sets their `requires_grad`, or train other groups.")
        self.expected = hash_parameters(model)
        for group, members in self.expected.items():
            if self.resumed.get(group) not in (None, digest(members)):
                raise ValueError(
                    f"The frozen parameters in '{group}' are not those of the checkpoint: its weights, or its base "
                    "model, changed since. Resume from another one."
                )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        verify_frozen(model, self.expected)


@contextmanager
def _unrounded_afterwards(model: torch.nn.Module) -> Iterator[None]:
    """Gives parameters and buffers back the numbers that they had before a cast of the model to another dtype."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module, *named) for module in model.modules() for named in module.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
