# SPDX-License-Identifier: Apache-2.0
"""The parameters of a causal language model in five groups, and what it takes to train only some of them.

Training the attention alone teaches a task without overwriting what the MLPs know (arXiv 2604.15574, Table 1).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from .structure import GROUPS, ParameterName, group_of, named_tensors


__all__ = [
    "GROUPS",
    "GroupRow",
    "GroupSpec",
    "GroupTable",
    "freeze_groups",
    "group_of_parameters",
    "parameter_table",
    "parse_group_specs",
]

_GROUP_SPEC = re.compile(rf"({'|'.join(GROUPS)})(?::(\d+)(?:-(\d+))?)?")
_SPEC_HELP = (
    f"Give one of {', '.join(GROUPS)}; a group in some layers, counted from 0, as 'mlp:5' or 'mlp:0-11'; or a regular "
    "expression that is searched in the names of the parameters, as 're:q_proj'."
)


@dataclass(frozen=True)
class GroupSpec:
    """
    One entry of `frozen_groups` or `trainable_groups`: a group, in some layers or in all, or a pattern of names.

    ```python
    >>> GroupSpec.parse("mlp:0-11").layers
    range(0, 12)
    >>> GroupSpec.parse("re:q_proj").pattern.pattern
    'q_proj'
    ```
    """

    text: str
    group: str | None = None
    layers: range | None = None
    pattern: re.Pattern | None = None

    @classmethod
    def parse(cls, text: str) -> "GroupSpec":
        """Reads one entry. Raises `ValueError` if it has none of the three forms."""
        if text.startswith("re:"):
            try:
                return cls(text, pattern=re.compile(text.removeprefix("re:")))
            except re.error as error:
                raise ValueError(f"{text!r} is not a regular expression: {error}. {_SPEC_HELP}") from error
        match = _GROUP_SPEC.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a group of parameters. {_SPEC_HELP}")
        group, first, last = match.groups()
        if first is None:
            return cls(text, group)
        if group in ("embeddings", "lm_head"):
            raise ValueError(f"{text!r} asks for layers, but '{group}' is outside of the layers: give '{group}'.")
        layers = range(int(first), int(last or first) + 1)
        if not layers:
            raise ValueError(f"{text!r} is an empty range of layers: give the lower one first, as 'mlp:0-11'.")
        return cls(text, group, layers)

    def selects(self, name: ParameterName) -> bool:
        if self.pattern is not None:
            return self.pattern.search(name.name) is not None
        return name.group == self.group and (self.layers is None or name.layer in self.layers)


class GroupRow(NamedTuple):
    """A line of a [`GroupTable`]: the tensors of a group, the numbers in them, and how many of these are trainable."""

    group: str
    tensors: int
    parameters: int
    trainable_parameters: int


class GroupTable(tuple[GroupRow, ...]):
    """The [`GroupRow`] of each group. `str()` renders it aligned, with a line for the total."""

    def __str__(self) -> str:
        total = GroupRow("total", *(sum(column) for column in list(zip(*self, strict=True))[1:]))
        lines = [f"{'group':<12}{'tensors':>9}{'parameters':>18}{'trainable':>18}"]
        for row in (*self, total):
            lines.append(f"{row.group:<12}{row.tensors:>9,}{row.parameters:>18,}{row.trainable_parameters:>18,}")
        return "\n".join(lines)


def group_of_parameters(model: PreTrainedModel) -> dict[str, str]:
    """
    The group of every parameter, under the names that `model.named_parameters()` yields.

    - `norm`: modules whose class is a normalisation, wherever they are: q_norm and k_norm of an attention too.
    - `lm_head`: the output embeddings and the head around them. Tied ones are counted in `embeddings`.
    - `embeddings`: the input embeddings, learned positions, projections beside the blocks.
    - `attention`: all of a softmax or linear attention: projections, latent projections, biases, sinks.
    - `mlp`: the rest of a block: dense MLP, experts, routers, layer scales, and what mixes the sequence without being
      attention (state-space, recurrent and convolution mixers: a Mamba model has no `attention`).

    Raises:
        ValueError: If parameters belong to none of them, such as those of a vision tower.
    """
    groups = {names[0].name: group_of(names) for _, names in named_tensors(model)}
    _refuse_unassigned(model, [name for name, group in groups.items() if group is None])
    return groups


def parameter_table(model: PreTrainedModel) -> GroupTable:
    """Counts each group of `GROUPS`. Parameters that belong to none are counted in a line `unassigned`."""
    counts = {group: [0, 0, 0] for group in GROUPS}
    for parameter, names in named_tensors(model):
        row = counts.setdefault(group_of(names) or "unassigned", [0, 0, 0])
        numel = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 the tensor itself is empty
        for column, count in enumerate((1, numel, numel if parameter.requires_grad else 0)):
            row[column] += count
    return GroupTable(GroupRow(group, *row) for group, row in counts.items())


def parse_group_specs(
    frozen_groups: Sequence[str] | None, trainable_groups: Sequence[str] | None
) -> tuple[str | None, list[GroupSpec]]:
    """
    Reads what is asked for, without a model: the name of the option that is set and its entries, or `(None, [])` if
    nothing is to be frozen (both `None`, or `frozen_groups=[]`). A lone string is a list of one entry.

    Raises:
        ValueError: If both options are set, an entry cannot be read, or `trainable_groups` is empty.
    """
    if frozen_groups and trainable_groups is not None:
        raise ValueError(
            f"`frozen_groups={frozen_groups!r}` and `trainable_groups={trainable_groups!r}` are both set. Each is the "
            "complement of the other: set one of them."
        )
    if trainable_groups is None:
        option, entries = "frozen_groups", frozen_groups
    else:
        option, entries = "trainable_groups", trainable_groups
        if not entries:
            raise ValueError("`trainable_groups=[]` leaves nothing to train. To train everything, leave it unset.")
    entries = [entries] if isinstance(entries, str) else entries or []
    return (option, [GroupSpec.parse(entry) for entry in entries]) if entries else (None, [])


def freeze_groups(
    model: PreTrainedModel,
    frozen_groups: Sequence[str] | None = None,
    trainable_groups: Sequence[str] | None = None,
) -> GroupTable:
    """
    Switches off the gradients of the parameters in `frozen_groups`, or of all that are not in `trainable_groups`.

    Gradients are never switched on: what was frozen before stays frozen. On an error no parameter has changed.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model, changed in place.
        frozen_groups (`list[str]`, *optional*): Entries as [`GroupSpec`] reads them. `None` and `[]` freeze nothing.
        trainable_groups (`list[str]`, *optional*): The same, for what is left trainable.

    Returns:
        [`GroupTable`]: The counts after freezing.

    Raises:
        ValueError: If both are set, an entry cannot be read or selects nothing, a tied tensor is selected by some of
            its names only, a group is asked for while parameters have no group, or nothing is left to train.
    """
    option, specs = parse_group_specs(frozen_groups, trainable_groups)
    if option is None:
        return parameter_table(model)
    # ProphetNet ties its embeddings to a module outside of its decoder, which has no group and no say
    tensors = [(tensor, [name for name in names if name.group] or names) for tensor, names in named_tensors(model)]
    for spec in specs:
        _refuse_empty(model, option, spec, [name for _, names in tensors for name in names])
    frozen, trainable, unassigned = [], [], []
    for parameter, names in tensors:
        selected = [name for name in names if any(spec.selects(name) for spec in specs)]
        if 0 < len(selected) < len(names):
            _refuse_half(option, specs, selected, names)
        (frozen if bool(selected) == (option == "frozen_groups") else trainable).append(parameter)
        if not selected and group_of(names) is None:
            unassigned.append(names[0].name)
    if any(spec.group is not None for spec in specs):
        _refuse_unassigned(model, unassigned)
    if not any(parameter.requires_grad for parameter in trainable):
        raise ValueError(
            f"`{option}={[spec.text for spec in specs]}` leaves nothing to train in {type(model).__name__}; what was "
            f"frozen before stays frozen. The model as it was handed over:\n{parameter_table(model)}"
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    return parameter_table(model)


def _refuse_empty(model: PreTrainedModel, option: str, spec: GroupSpec, names: list[ParameterName]) -> None:
    """Raises `ValueError` if `spec` selects none of `names`, or layers that the model does not have."""
    num_layers = 1 + max((name.layer for name in names if name.layer is not None), default=-1)
    selected = any(spec.selects(name) for name in names)
    if selected and (spec.layers is None or spec.layers[-1] < num_layers):
        return
    groups = sorted({name.group for name in names if name.group is not None}, key=GROUPS.index)
    model_name = type(model).__name__
    if spec.group == "attention" and "attention" not in groups:
        reason = f"{model_name} has no attention modules; what mixes the sequence in its blocks is counted in 'mlp'"
    elif spec.layers is not None and spec.layers[-1] >= num_layers:
        reason = f"{model_name} has {num_layers} layers, numbered from 0"
    else:
        reason = f"it matches no parameter of {model_name}"
    raise ValueError(
        f"`{option}` contains {spec.text!r}, but {reason}. The model has {', '.join(groups)} in {num_layers} layers; "
        f"its parameters are named like {names[len(names) // 2].name!r}. {_SPEC_HELP}"
    )


def _refuse_half(
    option: str, specs: list[GroupSpec], selected: list[ParameterName], names: list[ParameterName]
) -> None:
    groups = sorted({name.group for name in names}, key=GROUPS.index)
    what = " and ".join(repr(group) for group in groups) if len(groups) > 1 else "all of its names"
    raise ValueError(
        f"`{option}={[spec.text for spec in specs]}` selects half of a tied tensor: in this model "
        f"{[name.name for name in names]} are one tensor, and only {[name.name for name in selected]} is selected. "
        f"Select {what}, or none of them."
    )


def _refuse_unassigned(model: PreTrainedModel, names: list[str]) -> None:
    if names:
        modules = _outermost_modules(names, [name.name for _, found in named_tensors(model) for name in found])
        expression = "re:^" + (modules[0] if len(modules) == 1 else f"({'|'.join(modules)})")
        raise ValueError(
            f"{len(names)} parameters of {type(model).__name__} belong to none of {', '.join(GROUPS)}: {names[:3]}. "
            f"Select them too with a regular expression, as {expression!r}, or use regular expressions only."
        )


def _outermost_modules(names: list[str], all_names: list[str]) -> list[str]:
    """The outermost modules that hold parameters of `names` and no others."""
    others, modules = set(all_names) - set(names), set()
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        modules.add(next(path for path in paths if not any(f"{other}.".startswith(f"{path}.") for other in others)))
    return sorted(modules)
