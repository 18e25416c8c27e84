# SPDX-License-Identifier: Apache-2.0
"""SFT of some groups of parameters, the others proved unchanged (arXiv 2604.15574, section 3)."""

import inspect
import json
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from ..parameters.groups import GroupSpec, freeze_groups, parse_group_specs
from ..parameters.hashes import digest_groups, hash_parameters, verify_frozen
from ..parameters.quantised import keep_trainable
from .adapter_groups import refuse_adapters_elsewhere, restrict_peft_config, skeleton
from .checkpoints import CheckpointMixin
from .frozen_groups_sft_config import FrozenGroupsSFTConfig
from .sft_internals import config_from
from .trainer_card import ModelCardMixin


PARAMETER_GROUPS_FILE = "parameter_groups.json"


class FrozenGroupsSFTTrainer(CheckpointMixin, ModelCardMixin, SFTTrainer):
    """
    Trainer for supervised fine-tuning of some groups of parameters: `SFTTrainer` with the others frozen before there
    is an optimizer, so that they get no gradient, no optimizer state and no weight decay.

    Which parameters are trained is printed as a table when the trainer is made, kept in `group_table`, and saved with
    the model and with each checkpoint in `parameter_groups.json`, together with the SHA-256 of what is frozen.

    Every argument of [`~trl.SFTTrainer`] works as it does there. With a `peft_config` the adapters go to the linear
    modules of the trainable groups; `target_modules` of its own that contradict the groups are refused.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.SFTTrainer`].
        args ([`FrozenGroupsSFTConfig`] or [`~transformers.TrainingArguments`], *optional*):
            Configuration. The values of a plain `SFTConfig` or `TrainingArguments` are kept, and nothing is frozen.
        kwargs:
            The other arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: If the groups cannot be frozen in this model (see
        [`~trl_selfdistill.parameters.groups.freeze_groups`]),
            if adapters would train frozen groups, or if an optimizer holds frozen parameters.

    Example:

    ```python
    from datasets import load_dataset
    from trl_selfdistill import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer

    trainer = FrozenGroupsSFTTrainer(
        model="Qwen/Qwen2.5-1.5B",
        args=FrozenGroupsSFTConfig(trainable_groups=["attention"]),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "frozen-groups-sft"]
    _name = "FrozenGroupsSFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: FrozenGroupsSFTConfig | None = None,
        *positional,
        **kwargs,
    ):
        args = config_from(args, FrozenGroupsSFTConfig, model, self._name)
        option, specs = parse_group_specs(args.frozen_groups, args.trainable_groups)
        self.group_table = None
        self._frozen_check = None
        if option is None:
            super().__init__(model, args, *positional, **kwargs)
            keep_trainable(self.model)
            return
        # By name, so that `peft_config` is found wherever it was given
        kwargs |= dict(zip(list(inspect.signature(SFTTrainer.__init__).parameters)[3:], positional, strict=False))
        if kwargs.get("peft_config") is not None and not _has_adapter(model):
            kwargs["peft_config"] = self._restrict_peft_config(kwargs["peft_config"], model, args, option, specs)
        super().__init__(model, args, **kwargs)
        keep_trainable(self.model)
        if _has_adapter(self.model):
            refuse_adapters_elsewhere(self.model, option, specs)
        # After `SFTTrainer.__init__`, which may load the model, and resize the embeddings for a new chat template:
        # that makes new parameters, which are trainable. Before the optimizer, which Trainer makes when training
        # starts.
        self.group_table = freeze_groups(self.model, args.frozen_groups, args.trainable_groups)
        self._refuse_frozen_in_optimizer(self.optimizer)
        self._use_reentrant_checkpointing_under_zero3()
        self.accelerator.print(f"`{option}={[spec.text for spec in specs]}`\n{self.group_table}")
        if args.verify_frozen:
            self._frozen_check = _FrozenCheck()
            self.add_callback(self._frozen_check)

    @staticmethod
    def _restrict_peft_config(config, model: str | PreTrainedModel, args, option: str, specs: list[GroupSpec]):
        if isinstance(model, str):  # the names of its modules are enough: `SFTTrainer` loads it
            given = args.model_init_kwargs or {}
            kwargs = {name: given[name] for name in ("revision", "token", "cache_dir") if name in given}
            model = skeleton(model, trust_remote_code=args.trust_remote_code, **kwargs)
        return restrict_peft_config(config, model, option, specs)

    def _refuse_frozen_in_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Optimizers with momentum or decoupled weight decay of their own may move parameters that get no gradient."""
        if optimizer is None or self.group_table is None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        frozen = sum(not parameter.requires_grad for parameter in parameters)
        if frozen:
            raise ValueError(
                f"{frozen} of the {len(parameters)} tensors in the optimizer are frozen. If it was passed as "
                "`optimizers`, call `freeze_groups` on the model first and build it from the parameters that have "
                "`requires_grad`, or pass `optimizer_cls_and_kwargs`; if it comes from `optim`, choose another one."
            )

    def _use_reentrant_checkpointing_under_zero3(self) -> None:
        # As `SFTTrainer` does for PEFT: under ZeRO-3, frozen parameters break non-reentrant checkpointing. See
        # https://github.com/huggingface/trl/issues/2514. Can be removed once
        # https://github.com/deepspeedai/DeepSpeed/pull/8130 is released.
        plugin = self.args.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3 and self.args.gradient_checkpointing:
            checkpointing_kwargs = {**(self.args.gradient_checkpointing_kwargs or {}), "use_reentrant": True}
            self.args.gradient_checkpointing_kwargs = checkpointing_kwargs
            self.args.activation_checkpointing_kwargs = checkpointing_kwargs

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._refuse_frozen_in_optimizer(optimizer)
        return optimizer

    def check_checkpoint(self, checkpoint: Path) -> None:
        super().check_checkpoint(checkpoint)
        if self.group_table is not None:
            self._compare_with_checkpoint(checkpoint)

    def _compare_with_checkpoint(self, folder: Path) -> None:
        """The state of the optimizer is stored by position: with other groups it would go to other parameters."""
        file = folder / PARAMETER_GROUPS_FILE
        if not file.is_file():  # a checkpoint of `SFTTrainer`, or none: Trainer says what is wrong with it
            return
        saved = json.loads(file.read_text(encoding="utf-8"))
        for option, value in self._groups_asked_for().items():
            if saved[option] != value:
                raise ValueError(
                    f"The checkpoint {folder} was trained with `{option}={saved[option]}`, and this run has `{option}="
                    f"{value}`. Resume with the same groups, or start a new run from the model in the checkpoint."
                )
        if self._frozen_check is not None and not self._is_sharded:
            self._frozen_check.resumed = {group: row["frozen_sha256"] for group, row in saved["groups"].items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.group_table is not None:
            # Before the model, so that one whose frozen parameters moved is not saved
            self._save_parameter_groups(Path(self.args.output_dir if output_dir is None else output_dir))
        super().save_model(output_dir, _internal_call)

    def _save_parameter_groups(self, folder: Path) -> None:
        if self._frozen_check is not None:
            self._frozen_check.verify(self.model)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self.describe_groups(), indent=2)
            (folder / PARAMETER_GROUPS_FILE).write_text(content + "\n", encoding="utf-8")

    def describe_groups(self) -> dict:
        """The groups asked for, and the counts of each group with the SHA-256 of its frozen parameters."""
        digests = {}
        if self._frozen_check is not None and not self._is_sharded:
            digests = digest_groups(self._frozen_check.expected or hash_parameters(self.model))
        rows = {row.group: row._asdict() for row in self.group_table}
        for row in rows.values():
            row["frozen_sha256"] = digests.get(row.pop("group"))
        return {**self._groups_asked_for(), "groups": rows}

    def _groups_asked_for(self) -> dict[str, list[str] | None]:
        return {"frozen_groups": self.args.frozen_groups, "trainable_groups": self.args.trainable_groups}

    @property
    def _is_sharded(self) -> bool:
        """Whether this process may hold shards, whose hashes are not those of the tensors in a file."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


def _has_adapter(model: str | PreTrainedModel) -> bool:
    return not isinstance(model, str) and (is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False))


class _FrozenCheck(TrainerCallback):
    """Hashes the frozen parameters when training starts (a checkpoint is loaded by then), and compares when it
    ends."""

    def __init__(self):
        self.expected: dict[str, dict[str, str]] | None = None
        self.resumed: dict[str, str | None] = {}  # the hash of each group in the checkpoint that training resumes from

    def verify(self, model: PreTrainedModel) -> None:
        """Compares with the start of training, if there was one."""
        if self.expected is not None:
            verify_frozen(model, self.expected)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.expected = hash_parameters(model)
        for group, digest in digest_groups(self.expected).items():
            if self.resumed.get(group) not in (None, digest):
                raise ValueError(
                    f"The frozen parameters in '{group}' are not those that the checkpoint's {PARAMETER_GROUPS_FILE} "
                    "was written for: its weights were changed after they were saved. Resume from another checkpoint."
                )

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.verify(model)
