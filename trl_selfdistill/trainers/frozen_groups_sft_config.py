# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`FrozenGroupsSFTTrainer`]: TRL's `SFTConfig` and the groups of parameters to train."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..parameters.groups import parse_group_specs


@dataclass
class FrozenGroupsSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`FrozenGroupsSFTTrainer`].

    This class includes only the parameters that are specific to training a part of the model. For a full list of
    training arguments, please refer to the [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`] documentation.

    Parameters:
        > Parameters that control which parameters are trained

        frozen_groups (`list[str]`, *optional*):
            What not to train. Each entry is a group among `embeddings`, `attention`, `mlp`, `norm` and `lm_head`; a
            group in some layers, counted from 0, as `mlp:5` or `mlp:0-11` (both ends included); or a regular
            expression that is searched in the parameter names, as `re:q_proj`. Where the embeddings are tied,
            `embeddings` and `lm_head` are one tensor and go together. By default nothing is frozen, and the run is
            [`~trl.SFTTrainer`]'s step for step.
        trainable_groups (`list[str]`, *optional*):
            What to train, in the same form: everything else is frozen. The paper's setting where new facts are not
            wanted is `["attention"]`. Set this or `frozen_groups`, not both.
        verify_frozen (`bool`, *optional*, defaults to `True`):
            Whether to prove that the frozen parameters did not move: their SHA-256, taken when training starts, is
            compared whenever the model is saved and when training ends, and stored with the model in
            `parameter_groups.json`. Each comparison reads the frozen parameters once (about a second for 1 GB).

    > [!NOTE]
    > The defaults of all inherited parameters are those of [`~trl.SFTConfig`].
    """

    # Parameters that control which parameters are trained
    frozen_groups: list[str] | None = field(
        default=None,
        metadata={
            "help": "What not to train: groups among `embeddings`, `attention`, `mlp`, `norm`, `lm_head`, a group in "
            "some layers (`mlp:5`, `mlp:0-11`), or regular expressions over parameter names (`re:q_proj`)."
        },
    )
    trainable_groups: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to train, in the form of `frozen_groups`: everything else is frozen. Set one of the two."
        },
    )
    verify_frozen: bool = field(
        default=True,
        metadata={
            "help": "Whether to prove by SHA-256 that the frozen parameters did not move: compared at every save and "
            "at the end of training, and stored in `parameter_groups.json`."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        option, specs = parse_group_specs(self.frozen_groups, self.trainable_groups)  # before a model is loaded
        if option is not None:
            setattr(self, option, [spec.text for spec in specs])  # YAML may hold a lone string
