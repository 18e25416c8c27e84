# SPDX-License-Identifier: Apache-2.0
"""The model card that a trainer leaves with everything that it saves, in place of TRL's draft."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from transformers import Trainer

from ..files import warn_without
from ..hallucination.metric import SlickCategory
from ..hub.environment import describe_environment
from ..hub.model_card import CARD_FILE, base_model_of, hub_id, read_record, update_model_card
from ..parameters.structure import base_causal_lm
from .sft_internals import get_config_model_id


_SETTINGS = "learning_rate num_train_epochs max_steps lr_scheduler_type warmup_steps warmup_ratio weight_decay optim "
_SETTINGS += "seed data_seed bf16 max_length packing loss_type trainable_groups frozen_groups "
_TEACHER_SETTINGS = "kl_weight temperature"


class ModelCardMixin:
    """Writes the package's model card with every model that is saved, and when transformers or TRL ask for one."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the card of `args.output_dir`, named after the base, with this data's Hub id and these tags, too."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), dataset_name, tags)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # PEFT would write a card before the weights, with the local path of the base
        model = self.accelerator.unwrap_model(self.model)
        with patch.object(model, "create_or_update_model_card", lambda output_dir: None, create=True):
            super().save_model(output_dir, _internal_call)

    def on_save_model(self, folder: Path) -> None:
        super().on_save_model(folder)
        self._write_card(folder)

    def _write_card(self, folder: Path, dataset_name: str | None = None, tags: str | list[str] | None = None) -> None:
        with warn_without(folder / CARD_FILE):
            earlier = read_record(folder).get("training", {})
            training = describe_training(self)
            training["dataset_name"] = hub_id(dataset_name) or earlier.get("dataset_name")
            training["tags"] = sorted({*earlier.get("tags", []), *([tags] if isinstance(tags, str) else tags or [])})
            training["environment"] = describe_environment()
            update_model_card(folder, training=training)


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """What a trainer does, as JSON values: its settings, sizes, base model, teacher, groups and training data."""
    args, model = trainer.args, trainer.model
    values = args.to_dict()
    # A trainer without a teacher may get a configuration with one
    names = _SETTINGS + (_TEACHER_SETTINGS if hasattr(trainer, "teacher") else "")
    settings = {name: values[name] for name in names.split() if values.get(name) not in (None, -1)}
    settings |= getattr(trainer, "anchor_settings", None) or {}
    batch_size = trainer.state.train_batch_size or args.train_batch_size  # `auto_find_batch_size` lowers it
    settings["batch_size"] = batch_size * args.gradient_accumulation_steps * args.world_size
    parameters = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {
        "trainer": type(trainer).__name__,
        "settings": settings,
        "precision": "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else str(model.dtype)[6:],
        "num_steps": trainer.state.global_step,
        "trainable_parameters": sum(numel for numel, is_trained in parameters if is_trained),
        "parameters": sum(numel for numel, _ in parameters),
        "is_adapter": hasattr(model, "peft_config"),
        **base_model_of(get_config_model_id(base_causal_lm(model).config)),
        "teacher": describe_teacher(trainer),
        "groups": trainer.describe_groups() if getattr(trainer, "group_table", None) is not None else None,
        "composition": count_categories({"train": trainer.train_dataset}),
    }


def describe_teacher(trainer: Trainer) -> dict[str, str] | None:
    """Which model the teacher is, as `identity` and `sha256`; `None` without a KL."""
    args = trainer.args
    if not hasattr(trainer, "teacher") or (args.kl_weight == 0 and trainer.anchors is None):
        return None
    steps, epochs = args.teacher_snapshot_steps, args.teacher_snapshot_epochs
    if steps or epochs:
        identity = f"the model itself after {steps or epochs} {'steps' if steps else 'epochs'} of plain SFT on all "
        identity += "of the data (in the paper, on its Known facts only)"
    else:
        model = trainer.model if trainer.teacher_model is None else trainer.teacher_model
        model = trainer.accelerator.unwrap_model(model)
        name = args.teacher_model_name_or_path or get_config_model_id(base_causal_lm(model).config)
        base_model = base_model_of(name)["base_model"]
        identity = hub_id(name) or (f"a local stage of {base_model}" if base_model else "the model as handed over")
        identity += f"{' with its adapter' if hasattr(model, 'peft_config') else ''}, frozen when training started"
    return {"identity": identity, "sha256": trainer.teacher.sha256 if trainer.teacher else "not taken yet"}


def count_categories(splits: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For each split whose column `slick_category` holds categories, how many of its rows are of each."""
    counts = {
        name: dict(Counter(str(value) for value in split["slick_category"] if str(value) in {*SlickCategory}))
        for name, split in splits.items()
        if isinstance(split, Dataset) and "slick_category" in split.column_names
    }
    return {name: count for name, count in counts.items() if count}
