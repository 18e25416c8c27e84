# SPDX-License-Identifier: Apache-2.0
"""The variants of the mechanism study: which synthetic facts a model is trained on in which experiment.

Three hypotheses on why fine-tuning on new facts makes a model forget (arXiv 2604.15574, section 5), an experiment
each. Its prediction is written down here, before there is a result; `verdict` holds the numbers to it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..arguments import check_different, setting


PREDICTIONS = {
    "capacity": "New facts push old ones out: the more new facts, the more is forgotten, whatever their keys look "
    "like.",
    "behaviour cloning": "Training on unknown facts teaches to make answers up: known facts are lost whenever there "
    "are unknown ones, whatever their keys look like.",
    "interference": "New facts overwrite old ones that share representations: the more tokens the new keys share with "
    "known names, the more is forgotten; keys that share none cost nothing.",
}


class MechanismVariant(NamedTuple):
    """
    A training run on Known facts and synthetic ones.

    Args:
        num_facts (`int`): Synthetic facts; 0 for training on the Known facts alone, for as many steps.
        keys (`str`): `"recombined"` from tokens of real names, `"pseudo"` of other tokens, `"overlap"` or `"uuid"`.
        values (`str`): `"real"` answers of the relation, or `"uuid"`.
        overlap (`float`, *optional*): For `keys="overlap"`, the share of tokens from real names.
        self_distillation (`bool`): Whether the student is pulled to the model that the run starts from.
        probe (`bool`): Whether the drift of held-out facts is measured.
    """

    num_facts: int
    keys: str = "recombined"
    values: str = "real"
    overlap: float | None = None
    self_distillation: bool = False
    probe: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        if not self.num_facts:
            return "known-only"
        keys = self.keys if self.overlap is None else f"overlap-{self.overlap:g}"
        method = "-selfdistill" if self.self_distillation else ""
        return f"{keys}-keys-{self.values}-values-{self.num_facts}{method}"

    @property
    def label(self) -> str:
        """Its name for readers, without the number of facts."""
        if not self.num_facts:
            return "Known facts only"
        keys = {"recombined": "name-like keys", "uuid": "UUID keys", "pseudo": "pseudo-word keys"}.get(self.keys)
        keys = keys or f"keys with overlap {self.overlap:g}"
        values = ", UUID values" if self.values == "uuid" else ""
        return f"{keys}{values}{', self-distillation' if self.self_distillation else ''}"


@dataclass
class MechanismArguments:
    """What the mechanism study compares. The training is set by the training configuration."""

    _argument_group_name = "mechanism study"

    synthetic_relation: str = setting("P17", "Relation of the synthetic facts.")
    num_synthetic_facts: list[int] = setting(
        [100, 300, 1000], "Capacity: numbers of synthetic facts, each with name-like and with UUID keys."
    )
    num_facts_of_overlap: int = setting(300, "Interference and behaviour cloning: number of synthetic facts.")
    overlaps: list[float] = setting(
        [0.0, 0.25, 0.5, 0.75, 1.0], "Interference: shares of the keys' tokens that come from real names, in [0, 1]."
    )
    uuid_values: bool = setting(True, "Whether keys come with UUID values too, which takes the longest runs.")
    seeds: list[int] = setting([0], "Seeds of the synthetic facts and of the training's order.")
    probe_steps: int = setting(20, "Optimizer steps between two measurements of the drift.")
    probe_layers: list[int] | None = setting(None, "Layers of the drift. By default the middle and the last.")
    max_probed_facts: int = setting(100, "Held-out facts that the drift is measured on.")

    def __post_init__(self):
        for name, at_least in (("num_synthetic_facts", 2), ("overlaps", 2), ("seeds", 1)):
            check_different(name, getattr(self, name), at_least)
        if not all(0 <= overlap <= 1 for overlap in self.overlaps):
            raise ValueError(f"`overlaps` are shares of tokens in [0, 1], got {self.overlaps}.")
        sizes = [*self.num_synthetic_facts, self.num_facts_of_overlap]
        if min(sizes) < 1:
            raise ValueError(f"`num_synthetic_facts` and `num_facts_of_overlap` must be at least 1, got {sizes}.")


def mechanism_variants(study: MechanismArguments) -> list[MechanismVariant]:
    """All runs of the study, none twice; the first is that on Known facts alone."""
    middle = study.num_facts_of_overlap
    runs = [MechanismVariant(0)]
    runs += [MechanismVariant(n, keys) for n in sorted(study.num_synthetic_facts) for keys in ("recombined", "uuid")]
    runs += [variant_of_overlap(middle, overlap) for overlap in sorted(study.overlaps)]
    runs += [MechanismVariant(middle, keys) for keys in ("recombined", "pseudo", "uuid")]
    if study.uuid_values:
        runs += [MechanismVariant(middle, keys, "uuid") for keys in ("recombined", "uuid")]
    runs += [MechanismVariant(middle, self_distillation=True)]
    return list(dict.fromkeys(run._replace(probe=_is_probed(run, middle)) for run in runs))


def variant_of_overlap(num_facts: int, overlap: float) -> MechanismVariant:
    """Keys with a share of tokens from real names; a share of 1 are the name-like keys, of 0 the pseudo-words."""
    keys = {0.0: "pseudo", 1.0: "recombined"}.get(overlap, "overlap")
    return MechanismVariant(num_facts, keys, overlap=overlap if keys == "overlap" else None)


def _is_probed(run: MechanismVariant, middle: int) -> bool:
    """The drift is compared between SFT, self-distillation and UUID keys, with real values."""
    return run.num_facts in (0, middle) and run.keys in ("recombined", "uuid") and run.values == "real"
