# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`SelfDistillSFTTrainer`]: TRL's `SFTConfig` and the settings of the teacher."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from .frozen_groups_sft_config import FrozenGroupsSFTConfig, check_options, help_from_docstring


PAPER_SETTING = {"kl_weight": 1.0, "temperature": 0.5}
"""Of arXiv 2604.15574: `SelfDistillSFTConfig(**PAPER_SETTING)`. The defaults learn more and keep as much."""
_CHOICES = {
    "teacher_cache_dtype": ("bfloat16", "float32"),
    "anchors": ("own_answers", "kl", "self", None),
    "logits_dtype": ("float32", None),
}
_SNAPSHOTS = ("teacher_snapshot_steps", "teacher_snapshot_epochs")
_TEACHERS = (*_SNAPSHOTS, "teacher_model_name_or_path")


@help_from_docstring
@dataclass
class SelfDistillSFTConfig(FrozenGroupsSFTConfig):
    # docstyle-ignore
    r"""
    Configuration class for the [`SelfDistillSFTTrainer`].

    This class includes only the parameters that are specific to self-distillation. For the others, please refer to
    [`FrozenGroupsSFTConfig`], [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the distillation loss

        kl_weight (`float`, *optional*, defaults to `0.3`):
            Weight λ of the KL in `CE + λ τ² KL(teacher ‖ student)`. Higher values protect more of what the teacher
            knows and slow down learning. At `0.0`, and without `anchors`, there is no teacher, and the run is
            `SFTTrainer`'s step for step. The paper's is in `PAPER_SETTING`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of both models in the KL. Below 1 the KL protects the teacher's top answers, not its tail.
        logits_dtype (`str`, *optional*):
            `"float32"` keeps both models' logits in fp32 in a bf16 or fp16 run on a GPU: a fifth of the rounding error
            in the gradients, for 1.2 times the time of the LM heads. Defaults to the dtype of the run.

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Path or Hub id of the teacher. Defaults to a frozen copy of the model that is passed to the trainer, whose
            `teacher_model` argument takes a model instance as well.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` when the teacher is loaded by name, such as its `revision`. `dtype`
            defaults to `"float32"`, as for the model itself.
        teacher_snapshot_steps (`int`, *optional*):
            Train plain SFT for this many steps, then freeze a snapshot of the model as the teacher (kept in
            `output_dir/_teacher`) and go on with the KL. For models that are not sharded, full or with one adapter.
        teacher_snapshot_epochs (`float`, *optional*):
            As `teacher_snapshot_steps`, in epochs of the whole data. The paper's stage 1 has its Known facts only.

        > Parameters that control the anchors, prompts or texts without labels against forgetting

        anchors (`str`, *optional*):
            `"own_answers"`: before training the model answers the prompts greedily, and trains on its answers, too.
            `"kl"`: each step takes as many anchors as rows, and adds `anchor_weight τ² KL(teacher ‖ student)`, where a
            prompt's answer begins and at each token of a text, but no CE; `kl_weight` may be 0 then. `"self"`: the
            same on texts that the teacher samples without a prompt (arXiv 2605.26097).
        anchor_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the KL of `"kl"` and `"self"`. Own answers count as the other rows do.
        anchor_dataset_name (`str`, *optional*):
            Hub id, folder or file (`.jsonl`, `.json`, `.csv`, `.parquet`) of the prompts, whose split `train` has a
            column `prompt` (texts or conversations), `messages` or `text`. Or pass `anchor_dataset` to the trainer.
        anchor_max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest own answer, or text of `"self"`, in tokens.

        > Parameters that control the teacher cache

        precompute_teacher (`bool`, *optional*, defaults to `False`):
            Whether to run the teacher once before training, and keep its last hidden states at the label positions on
            disk and only its LM head in memory: the same KL, without a forward pass of the teacher in each step. Not
            for streams, snapshots, `anchors="self"` and a `data_collator` of your own.
        teacher_cache_dir (`str`, *optional*):
            Folder for them, not inside `output_dir`, which is pushed to the Hub. Other runs with the same teacher and
            data use them too. Defaults to `trl_selfdistill/teacher_cache` in `HF_HOME`.
        teacher_cache_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            `"bfloat16"` (2 bytes a number, rounded to 8 bits of precision) or `"float32"` (4 bytes, as computed).
    """

    kl_weight: float = 0.3
    temperature: float = 1.0
    logits_dtype: str | None = None
    teacher_model_name_or_path: str | None = None
    teacher_model_init_kwargs: dict[str, Any] | str | None = None
    teacher_snapshot_steps: int | None = None
    teacher_snapshot_epochs: float | None = None
    anchors: str | None = None
    anchor_weight: float = 1.0
    anchor_dataset_name: str | None = None
    anchor_max_new_tokens: int = 256
    precompute_teacher: bool = False
    teacher_cache_dir: str | None = None
    teacher_cache_dtype: str = "bfloat16"

    def __post_init__(self):
        check_options(self, SelfDistillSFTConfig)
        if isinstance(self.teacher_model_init_kwargs, str):  # from the command line
            with suppress(ValueError):  # no JSON: refused below, as what it is
                self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)
        if not isinstance(self.teacher_model_init_kwargs, dict | None):
            raise ValueError(f"`teacher_model_init_kwargs` must be a dict, got {self.teacher_model_init_kwargs!r}.")
        if self.kl_weight < 0:
            raise ValueError(f"`kl_weight` must be >= 0, got {self.kl_weight!r}.")
        for name in ("temperature", "anchor_weight", "anchor_max_new_tokens", *_SNAPSHOTS):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be > 0, got {getattr(self, name)!r}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}.")
        given = [name for name in _TEACHERS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` each choose the teacher. Set one of them.")
        later = given if self.takes_snapshot else ["anchors"] if self.anchors == "self" else []
        if self.precompute_teacher and later:
            raise ValueError(f"`precompute_teacher` runs the teacher before training, `{later[0]}` in it: unset one.")
        metric = self.metric_for_best_model or "loss"
        if self.takes_snapshot and self.load_best_model_at_end and metric.endswith("loss"):
            raise ValueError(
                f"`load_best_model_at_end=True`: after the snapshot of `{given[0]}`, {metric!r} is another loss. Set "
                "`metric_for_best_model` to 'eval_mean_token_accuracy', for example."
            )
        super().__post_init__()

    def choose_teacher(self, teacher_model: Any) -> Any:
        """
        The teacher to load: the trainer's `teacher_model`, a name or a model, or that of this configuration. A
        `ValueError` if it is given twice, or there are options for loading one and none is loaded.
        """
        for name in _TEACHERS:
            if teacher_model is not None and getattr(self, name) is not None:
                raise ValueError(f"`teacher_model` and `args.{name}` each choose the teacher. Set one of them.")
        given = teacher_model if teacher_model is not None else self.teacher_model_name_or_path
        if isinstance(given, str | os.PathLike):
            given = os.path.expanduser(given)
        if self.teacher_model_init_kwargs is not None and not isinstance(given, str):
            raise ValueError("`teacher_model_init_kwargs` is for a teacher that is loaded by name. Leave it unset.")
        return given

    @property
    def takes_snapshot(self) -> bool:
        """Whether the teacher is a snapshot that is taken during training."""
        return self.teacher_snapshot_steps is not None or self.teacher_snapshot_epochs is not None

    @property
    def kl_options(self) -> dict[str, Any]:
        """What rows and anchors have in common of the arguments of [`~trl_selfdistill.losses.linear_ce_kl`]."""
        logits_dtype = None if self.logits_dtype is None else getattr(torch, self.logits_dtype)
        return {"temperature": self.temperature, "logits_dtype": logits_dtype}
