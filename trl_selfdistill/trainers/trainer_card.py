# SPDX-License-Identifier: Apache-2.0
"""The model card that a trainer leaves with everything that it saves, in place of TRL's draft."""

from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..hub.environment import describe_environment
from ..hub.metadata import base_model_of, hub_id
from ..hub.model_card import read_record, update_model_card
from ..parameters.structure import base_causal_lm
from .paper import PAPER
from .sft_internals import get_config_model_id


_SETTINGS = (
    ("learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim")
    + ("seed", "data_seed", "bf16", "max_length", "packing", "loss_type")
    + ("kl_weight", "temperature", "trainable_groups", "frozen_groups")
)


class ModelCardMixin:
    """
    Writes the package's model card wherever the trainer saves a model, checkpoints included, and whenever
    `transformers` or TRL ask for a card, as `push_to_hub` does. It keeps the results of the same weights.
    """

    _paper = PAPER

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """The card of `args.output_dir`, with the arguments of [`~trl.SFTTrainer`]; the card names itself."""
        if self.is_world_process_zero():
            write_trainer_card(
                self, Path(self.args.output_dir), dataset_name, [tags] if isinstance(tags, str) else tags
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # after PEFT, which writes a card of its own with the local path of the base
            write_trainer_card(self, Path(self.args.output_dir if output_dir is None else output_dir))


def write_trainer_card(
    trainer: Trainer, folder: Path, dataset_name: str | None = None, tags: list[str] | None = None
) -> Path:
    """Writes the card of the model that `trainer` holds into `folder`. What is not given is kept from before."""
    earlier = read_record(folder).get("training") or {}
    training = describe_training(trainer)
    training["dataset_name"] = hub_id(dataset_name) or earlier.get("dataset_name")
    training["tags"] = sorted({*earlier.get("tags", []), *(tags or []), *trainer._tag_names} - {"trl"})
    training["environment"] = describe_environment()
    folder.mkdir(parents=True, exist_ok=True)
    return update_model_card(folder, training=training)


def describe_training(trainer: Trainer) -> dict[str, Any]:
    """
    What a trainer does, as JSON values: `trainer`, `settings`, `num_steps`, `parameters`, `trainable_parameters`,
    `is_adapter`, `base_model`, `license`, `teacher`, `groups` and `composition` (see [`describe_teacher`],
    `FrozenGroupsSFTTrainer.describe_groups` and [`count_categories`]).
    """
    args, model = trainer.args, trainer.model
    parameters = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    settings = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name, None) is not None}
    settings = {
        name: v.value if isinstance(v, Enum) else v for name, v in settings.items() if (name, v) != ("max_steps", -1)
    }
    if getattr(args, "regularizer", "kl") == "l2" and settings.get("kl_weight"):  # the strength that it has, or took
        weight = getattr(trainer.teacher, "weight", None)
        settings["l2_weight"] = "matched to the KL on the first batch" if weight is None else weight
    if rehearsal_rows := getattr(trainer, "num_rehearsal_rows", 0):
        settings["rehearsal_rows"] = rehearsal_rows
    settings["batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    groups = trainer.describe_groups() if getattr(trainer, "group_table", None) is not None else None
    return {
        "trainer": type(trainer).__name__,
        "settings": settings,
        "num_steps": trainer.state.global_step,
        "trainable_parameters": sum(numel for numel, is_trained in parameters if is_trained),
        "parameters": sum(numel for numel, _ in parameters),
        "is_adapter": hasattr(model, "peft_config"),
        **base_model_of(get_config_model_id(base_causal_lm(model).config)),
        "teacher": describe_teacher(trainer),
        "groups": groups,
        "composition": count_categories({"train": trainer.train_dataset}),
    }


def describe_teacher(trainer: Trainer) -> dict[str, str] | None:
    """Who the teacher is, as `identity` and `sha256`; `None` without a KL."""
    args = trainer.args
    if not getattr(args, "kl_weight", 0):
        return None
    if args.teacher_snapshot_steps is not None:
        identity = f"a snapshot of the model itself after {args.teacher_snapshot_steps} steps of plain SFT"
    elif args.teacher_snapshot_epochs is not None:
        identity = f"a snapshot of the model itself after {args.teacher_snapshot_epochs} epochs of plain SFT"
    elif args.teacher_model_name_or_path is None:
        # A teacher that was handed over as an instance, or else the model itself
        model = trainer.teacher_model if trainer.teacher_model is not None else trainer.model
        config = base_causal_lm(trainer.accelerator.unwrap_model(model)).config
        adapter = " with the student's first adapter" if getattr(trainer.teacher, "adapter_name", None) else ""
        identity = f"{_shown(get_config_model_id(config))}{adapter}, frozen when training started"
    else:
        identity = f"{_shown(args.teacher_model_name_or_path)}, revision {args.teacher_model_revision or 'main'}"
    return {"identity": identity, "sha256": trainer.teacher.sha256 if trainer.teacher else "not taken yet"}


def _shown(name_or_path: str) -> str:
    """A model by its Hub id; of a local folder only what it goes back to, as paths say nothing elsewhere."""
    base_model = base_model_of(name_or_path)["base_model"]
    if hub_id(name_or_path):
        return name_or_path
    return f"a local stage of {base_model}" if base_model else "the model as handed over"


def count_categories(splits: dict[str, Any]) -> dict[str, dict[str, int]]:
    """For each split that has a column `slick_category`, how many of its rows are of each category."""
    return {
        name: dict(Counter(str(category) for category in split["slick_category"] if category is not None))
        for name, split in splits.items()
        if "slick_category" in (getattr(split, "column_names", None) or ()) and hasattr(split, "__len__")
    }
