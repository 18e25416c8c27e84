# SPDX-License-Identifier: Apache-2.0
"""Which groups of parameters a run trains (arXiv 2604.15574, Table 1): freezing the others, adapters on these."""

import copy
import re
from collections.abc import Sequence, Set
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from .structure import GROUPS, ParameterName, group_of, named_tensors


_GROUP_SPEC = re.compile(rf"({'|'.join(GROUPS)})(?::(\d+)(?:-(\d+))?)?")
_SPEC_HELP = (
    f"Give one of {', '.join(GROUPS)}; a group in some layers, counted from 0, as 'mlp:5' or 'mlp:0-11'; or a regular "
    "expression that is searched in the names of the parameters, as 're:q_proj'."
)


class GroupSpec(NamedTuple):
    """One entry of `frozen_groups` or `trainable_groups`: a group, in some layers or in all, or a pattern of names."""

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
        layers = None if first is None else range(int(first), int(last or first) + 1)
        return cls(text, group, layers)

    def selects(self, name: ParameterName) -> bool:
        if self.pattern is not None:
            return self.pattern.search(name.name) is not None
        return name.group == self.group and (self.layers is None or name.layer in self.layers)


class GroupSelection(NamedTuple):
    """What a run freezes or trains: the option, `"frozen_groups"` or `"trainable_groups"`, with its entries."""

    option: str
    specs: tuple[GroupSpec, ...]

    @classmethod
    def parse(
        cls, frozen_groups: Sequence[str] | None = None, trainable_groups: Sequence[str] | None = None
    ) -> "GroupSelection | None":
        """
        Reads lists of entries as [`GroupSpec`] does; a lone string is a list of one. `None` if nothing is to be
        frozen. Raises `ValueError` if both are set or an entry cannot be read.
        """
        for option, entries in (("frozen_groups", frozen_groups), ("trainable_groups", trainable_groups)):
            is_list = isinstance(entries, Sequence | Set) and all(isinstance(entry, str) for entry in entries)
            if entries is not None and not is_list:
                raise ValueError(f"`{option}` must be a list of texts, got {entries!r}. {_SPEC_HELP}")
        if frozen_groups and trainable_groups is not None:
            raise ValueError(f"`frozen_groups={frozen_groups}`, `trainable_groups={trainable_groups}`: set one.")
        option, entries = ("frozen_groups", frozen_groups) if frozen_groups else ("trainable_groups", trainable_groups)
        if entries is None:
            return None
        return cls(option, tuple(map(GroupSpec.parse, [entries] if isinstance(entries, str) else entries)))

    @property
    def entries(self) -> list[str]:
        return [spec.text for spec in self.specs]

    def __str__(self) -> str:
        return f"`{self.option}={self.entries}`"

    def selects(self, name: ParameterName) -> bool:
        """Whether an entry selects the parameter, be it to train or to freeze."""
        return any(spec.selects(name) for spec in self.specs)

    def trains(self, name: ParameterName) -> bool:
        """Whether the parameter is to be trained."""
        return self.selects(name) == (self.option == "trainable_groups")


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
        rows = ["{:<12}{:>9,}{:>18,}{:>18,}".format(*row) for row in (*self, total)]
        return "\n".join([f"{'group':<12}{'tensors':>9}{'parameters':>18}{'trainable':>18}", *rows])


def parameter_table(model: PreTrainedModel) -> GroupTable:
    """Counts each group of `GROUPS`. Parameters that belong to none are counted in a line `unassigned`."""
    counts = {group: [0, 0, 0] for group in GROUPS}
    for parameter, names in named_tensors(model):
        row = counts.setdefault(group_of(names) or "unassigned", [0, 0, 0])
        numel = getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 the tensor itself is empty
        for column, count in enumerate((1, numel, numel if parameter.requires_grad else 0)):
            row[column] += count
    return GroupTable(GroupRow(group, *row) for group, row in counts.items())


def freeze_selection(model: PreTrainedModel, selection: GroupSelection) -> GroupTable:
    """
    Switches off the gradients of the parameters that a selection does not train, and returns the counts afterwards.
    What was frozen stays so. A `ValueError`, and nothing has changed, if an entry selects nothing or a part of a tied
    tensor's names, a group is asked for while parameters have none, or nothing is left to train.
    """
    # ProphetNet ties its embeddings to a module outside of its decoder, which has no group and no say
    tensors = [(tensor, [name for name in names if name.group] or names) for tensor, names in named_tensors(model)]
    all_names = [name for _, names in tensors for name in names]
    num_layers = 1 + max((name.layer for name in all_names if name.layer is not None), default=-1)
    for spec in selection.specs:
        beyond = spec.layers is not None and spec.layers.stop > num_layers
        if beyond or not any(spec.selects(name) for name in all_names):
            groups = sorted({name.group for name in all_names if name.group is not None}, key=GROUPS.index)
            raise ValueError(
                f"`{selection.option}` contains {spec.text!r}, which matches no parameter of {type(model).__name__} "
                f"or not in all its layers. There are {', '.join(groups)} in {num_layers} layers, from 0, as in "
                f"{all_names[len(all_names) // 2].name!r}. Mixers without attention are counted in 'mlp'."
            )
    for _, names in tensors:
        selected = [name.name for name in names if selection.selects(name)]
        if 0 < len(selected) < len(names):
            raise ValueError(
                f"{selection} selects {selected} alone of the tied {[name.name for name in names]}. Select all; of "
                "tied embeddings both 'embeddings' and 'lm_head', or none."
            )
    unassigned = [names[0].name for _, names in tensors if names[0].group is None and not selection.selects(names[0])]
    if unassigned and any(spec.group is not None for spec in selection.specs):
        raise ValueError(
            f"{len(unassigned)} parameters of {type(model).__name__} belong to none of {', '.join(GROUPS)}: "
            f"{unassigned[:3]}. `{selection.option}` must say something of them too, by an expression such as "
            "'re:vision_tower'. `frozen_groups` freezes them, `trainable_groups` trains them."
        )
    if not any(tensor.requires_grad and selection.trains(names[0]) for tensor, names in tensors):
        raise ValueError(
            f"{selection} leaves nothing to train in {type(model).__name__}; what was frozen before stays frozen. "
            f"The model as it was handed over:\n{parameter_table(model)}"
        )
    for tensor, names in tensors:
        if not selection.trains(names[0]):
            tensor.requires_grad_(False)
    return parameter_table(model)


def restrict_peft_config(config, model: PreTrainedModel, selection: GroupSelection | None):
    """
    A copy of a [`~peft.PeftConfig`] with adapters on the trainable groups of `model` alone. `target_modules` that are
    unset or `"all-linear"` become the linear modules of these groups in the `layers_to_transform`; a `ValueError` if
    there are none. The user's own, and `target_parameters` alone, stay: [`refuse_adapters_elsewhere`] sees what they
    make. Without a selection all stays.
    """
    if selection is None:
        return config
    if not hasattr(config, "target_modules"):
        raise ValueError(f"{selection} needs a PEFT method with `target_modules`, got {type(config).__name__}.")
    config = copy.deepcopy(config)
    if config.target_modules is None and getattr(config, "target_parameters", None):
        config.target_modules = set()  # else PEFT would add modules of its own choice
    if config.target_modules not in (None, "all-linear"):
        return config
    layers = getattr(config, "layers_to_transform", None)  # which PEFT does not apply to whole names
    layers = [layers] if isinstance(layers, int) else layers
    modules, trainable = dict(model.named_modules()), set()
    for _, names in named_tensors(model):
        for name in names:
            path, _, attribute = name.name.rpartition(".")
            is_linear = isinstance(modules[path], nn.Linear) or type(modules[path]).__name__ == "Conv1D"
            # The loss of self-distillation reads no adapter of the LM head
            is_reached = selection.trains(name) and name.group != "lm_head" and (not layers or name.layer in layers)
            if attribute == "weight" and is_linear and is_reached:
                trainable.add(path)
    if not trainable:
        where = f" in `layers_to_transform={layers}`" if layers else ""
        raise ValueError(f"{selection} leaves no linear module for an adapter{where}. Train 'attention' or 'mlp'.")
    config.target_modules = trainable
    return config


def refuse_adapters_elsewhere(model: nn.Module, selection: GroupSelection) -> None:
    """Raises `ValueError` if a PEFT model trains something in frozen groups: adapters, biases, copies of modules."""
    trained = [names[0] for parameter, names in named_tensors(model) if parameter.requires_grad]
    if elsewhere := [name.name for name in trained if not selection.trains(name)]:
        raise ValueError(
            f"{selection}, and the PEFT model trains {len(elsewhere)} tensors in frozen groups: {elsewhere[:3]}. Pass "
            "a `peft_config` without `target_modules` and `modules_to_save`, and the model without adapters."
        )
