# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`SelfDistillSFTTrainer`]: TRL's `SFTConfig` and the settings of the teacher."""

import math
from dataclasses import dataclass, field
from typing import Any

from .frozen_groups_sft_config import FrozenGroupsSFTConfig


REGULARIZERS = ("kl", "l2")
CACHE_DTYPES = ("bfloat16", "float32")


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

        regularizer (`str`, *optional*, defaults to `kl`):
            What pulls the student to the teacher: `"kl"`, or `"l2"`, the control that pulls its weights instead with
            `l2_weight / 2 * ||student - teacher||^2`. The latter is for full models on one device or DDP, and its
            teacher is the model as handed over.
        l2_weight (`float`, *optional*):
            Strength of `regularizer="l2"`. Without it the pull is made as strong as that of the KL with `kl_weight`
            and `temperature`: the two gradients have the same norm on the first batch, one step of Adam at
            `learning_rate` away from the teacher.

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
        precompute_teacher (`bool`, *optional*, defaults to `False`):
            Run the teacher once over the tokenised datasets before training, keep its last hidden states at the label
            positions on disk and its LM head in memory, and drop the rest of it. The KL stays that over the whole
            vocabulary, and no step pays for a forward of the teacher. Not for streams and snapshots.
        teacher_cache_dir (`str`, *optional*):
            Where these hidden states go, in a folder named after the teacher's weights and the data; other runs with
            the same use them too. Defaults to `trl_selfdistill/teacher_cache` in `HF_HOME`. Not inside `output_dir`,
            which is pushed to the Hub.
        teacher_cache_dtype (`str`, *optional*, defaults to `bfloat16`):
            `"bfloat16"` (2 bytes a number, rounded to 8 bits of precision) or `"float32"` (4 bytes, as computed).

        > Parameters that control the rehearsal

        rehearsal_dataset_name (`str`, *optional*):
            Prompts about what must not be forgotten: a dataset with a column `prompt` (texts or conversations) and a
            split `train`, by Hub id, as a folder, or as a JSON, JSONL, CSV or Parquet file. The model as handed over
            answers them greedily before training, and these rows are trained on among those of the training data. No
            labels are needed. The trainer's `rehearsal_dataset` argument takes a `Dataset` as well.
        rehearsal_max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest of these answers, in tokens. Prompts with longer ones are left out.
        rehearsal_stop_strings (`list[str]`, *optional*):
            What ends an answer beside the end of sequence, such as a newline for a model that has not learnt to stop
            after its answer. The answer is what comes before, and the end of sequence.

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

    regularizer: str = field(
        default="kl", metadata={"help": "What pulls the student to the teacher: `kl` or, as a control, `l2`."}
    )
    l2_weight: float | None = field(
        default=None, metadata={"help": "Strength of `regularizer=l2`. Matched to the KL's gradient by default."}
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

    precompute_teacher: bool = field(
        default=False,
        metadata={
            "help": "Run the teacher once over the datasets before training, keep its hidden states on disk, drop it."
        },
    )
    teacher_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the teacher's hidden states. Defaults to one in `HF_HOME`."},
    )
    teacher_cache_dtype: str = field(
        default="bfloat16", metadata={"help": "What they are stored in: `bfloat16` or `float32`."}
    )

    # Parameters that control the rehearsal
    rehearsal_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts (a dataset with a column `prompt`) that the model answers before training; its own "
            "answers are trained on among the rows, so that they are not forgotten."
        },
    )
    rehearsal_max_new_tokens: int = field(
        default=256,
        metadata={"help": "Longest of the model's own answers to these prompts, in tokens."},
    )
    rehearsal_stop_strings: list[str] | None = field(
        default=None, metadata={"help": "What ends such an answer beside the end of sequence, such as a newline."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rehearsal_max_new_tokens < 1:
            raise ValueError(f"`rehearsal_max_new_tokens` must be at least 1, got {self.rehearsal_max_new_tokens}.")
        stops = self.rehearsal_stop_strings
        if stops is not None and (isinstance(stops, str) or not all(stops)):
            raise ValueError(f"`rehearsal_stop_strings` must be a list of texts, none empty, got {stops!r}.")
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
        self._check_regularizer()
        self._check_cache_settings()

    def _check_regularizer(self) -> None:
        if self.regularizer not in REGULARIZERS:
            raise ValueError(f"`regularizer` must be one of {', '.join(REGULARIZERS)}, got {self.regularizer!r}.")
        if self.l2_weight is not None and not (math.isfinite(self.l2_weight) and self.l2_weight >= 0):
            raise ValueError(f"`l2_weight` must be a finite number >= 0, got {self.l2_weight}.")
        if self.regularizer == "kl":
            if self.l2_weight is not None:
                raise ValueError(f"`l2_weight={self.l2_weight}` is for `regularizer='l2'`, got 'kl'.")
            return
        names = ("teacher_model_name_or_path", "teacher_snapshot_steps", "teacher_snapshot_epochs")
        for name in (*names, "precompute_teacher"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` is for `regularizer='kl'`, got 'l2', which pulls the weights "
                    "to those of the model as handed over."
                )

    def _check_cache_settings(self) -> None:
        if self.teacher_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"`teacher_cache_dtype` must be one of {', '.join(CACHE_DTYPES)}, got {self.teacher_cache_dtype!r}."
            )
        if not self.precompute_teacher:
            if self.teacher_cache_dir is not None:
                raise ValueError(
                    f"`teacher_cache_dir={self.teacher_cache_dir!r}` says where `precompute_teacher=True` keeps the "
                    "teacher's hidden states, and `precompute_teacher` is not set. Set both or neither."
                )
            return
        if self.teacher_snapshot_steps is not None or self.teacher_snapshot_epochs is not None:
            raise ValueError(
                "`precompute_teacher=True` runs the teacher before training, and `teacher_snapshot_steps` and "
                "`teacher_snapshot_epochs` make it in the middle. Train stage 1 by itself and start this run from its "
                "model, or leave `precompute_teacher` unset."
            )
