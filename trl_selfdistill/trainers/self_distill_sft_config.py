# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`SelfDistillSFTTrainer`]: TRL's `SFTConfig` and the settings of the teacher."""

import math
from dataclasses import dataclass, field
from typing import Any

from .frozen_groups_sft_config import FrozenGroupsSFTConfig


@dataclass
class SelfDistillSFTConfig(FrozenGroupsSFTConfig):
    # docstyle-ignore
    r"""
    Configuration class for the [`SelfDistillSFTTrainer`].

    This class includes only the parameters that are specific to self-distillation. `frozen_groups`, `trainable_groups`
    and `verify_frozen` are those of [`FrozenGroupsSFTConfig`]; for a full list of training arguments, please refer to
    the [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`] documentation.

    Parameters:
        > Parameters that control the distillation loss

        kl_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the KL term in `CE + λ τ² KL(teacher ‖ student)`. Higher values protect more of what the
            teacher knows and slow down the learning of what it does not. At `0.0` there is no teacher, and the run is
            [`~trl.SFTTrainer`]'s step for step. The default is the paper's.
        temperature (`float`, *optional*, defaults to `0.5`):
            Temperature τ of both models' distributions in the KL term only. Below 1 it sharpens them, so that the KL
            protects the teacher's top answers rather than its tail. The default is the paper's.

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Teacher to load by path or Hub id. Defaults to a frozen copy of the model as handed over. The trainer's
            `teacher_model` argument takes a model instance as well.
        teacher_model_revision (`str`, *optional*):
            Revision (branch, tag or commit) of the teacher on the Hub.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` when the teacher is loaded by name. `dtype` defaults to
            `"float32"`, as for the model itself.
        teacher_snapshot_steps (`int`, *optional*):
            Train plain SFT for this many optimizer steps, then freeze a snapshot of the model as the teacher (kept in
            `output_dir/_teacher` for resuming) and go on with distillation. For full models that are not sharded: with
            PEFT, FSDP or DeepSpeed train stage 1 by itself.
        teacher_snapshot_epochs (`float`, *optional*):
            The same in epochs: `1.0` is the paper's single run, one epoch of format learning before the snapshot.

    > [!NOTE]
    > The defaults of all inherited parameters are those of [`~trl.SFTConfig`].
    """

    _VALID_DICT_FIELDS = FrozenGroupsSFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    # Parameters that control the distillation loss
    kl_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the KL term in `CE + kl_weight * temperature**2 * KL(teacher || student)`. At 0 there "
            "is no teacher and the run is SFTTrainer's."
        },
    )
    temperature: float = field(
        default=0.5,
        metadata={"help": "Temperature of both models' distributions in the KL term (the CE is at temperature 1)."},
    )

    # Parameters that control the teacher
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the teacher. Defaults to a frozen copy of the model as handed over."},
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Revision (branch, tag or commit) of the teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `from_pretrained` when the teacher is loaded by name."},
    )
    teacher_snapshot_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of plain SFT after which a snapshot of the model becomes the teacher."},
    )
    teacher_snapshot_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of plain SFT after which a snapshot of the model becomes the teacher."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not (math.isfinite(self.kl_weight) and self.kl_weight >= 0):
            raise ValueError(f"`kl_weight` must be a finite number >= 0, got {self.kl_weight}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"`temperature` must be a finite number > 0, got {self.temperature}. The paper's value is 0.5; to "
                "switch the KL off set `kl_weight=0`."
            )
        for name in ("teacher_snapshot_steps", "teacher_snapshot_epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"`{name}` must be > 0, got {value}. To start from the model as it is, leave it unset."
                )
            if value is not None and self.teacher_model_name_or_path is not None:
                raise ValueError(
                    f"`{name}={value}` makes a snapshot of the model the teacher, and `teacher_model_name_or_path="
                    f"{self.teacher_model_name_or_path!r}` another model: set one of them."
                )
        if self.teacher_snapshot_steps is not None and self.teacher_snapshot_epochs is not None:
            raise ValueError(
                f"Set `teacher_snapshot_steps` (got {self.teacher_snapshot_steps}) or `teacher_snapshot_epochs` (got "
                f"{self.teacher_snapshot_epochs}), not both."
            )
