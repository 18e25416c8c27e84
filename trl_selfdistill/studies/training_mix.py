# SPDX-License-Identifier: Apache-2.0
"""From annotated facts to training data: which facts are trained on as Known, as new, and which are held out.

After arXiv 2604.15574: of relations that the model knows enough of, HighlyKnown facts are trained on and held out.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from ..slick.prompts import answer_completion, question_prompt
from ..slick.slick import SlickCategory
from .arguments import setting
from .facts.invented import invent_facts
from .facts.table import facts_table, fold_name, load_facts


SPLITS = ("known", "new", "heldout")


@dataclass(frozen=True)
class MixSettings:
    """What [`build_training_mix`] chooses. The help of each field says what it sets."""

    _argument_group_name = "training mix"  # the heading of these flags in a script's help

    num_known: int = setting(120, "HighlyKnown facts to train on: alone in stage 1, with the new ones in stage 2.")
    num_new: int = setting(400, "New facts to train on in stage 2.")
    num_heldout: int = setting(500, "HighlyKnown facts never trained on, at most.")
    # A rate over 25 facts is uncertain by 20 points, over 100 by 10
    min_heldout: int = setting(2, "Fewest held-out facts to go on with; one gives no interval.")
    new_facts: str = setting("invented", "`invented`, a fictitious atlas, or `real`, Unknown facts.")
    relations: list[str] | None = setting(None, "Relations to use. By default all of which the model knows enough.")
    new_relations: list[str] | None = setting(None, "Relations of the new facts. By default as of the Known facts.")
    min_known_share: float = setting(0.3, "Least share of facts that are not Unknown in a relation, as in the paper.")
    # Guessing the most frequent answer must not pay
    max_answer_share: float = setting(0.1, "Largest share of a split with the same answer.")

    def __post_init__(self):
        for name in ("num_known", "num_new", "num_heldout", "min_heldout"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.min_heldout > self.num_heldout:
            raise ValueError(f"`min_heldout={self.min_heldout}` is more than `num_heldout={self.num_heldout}`.")
        for name in ("min_known_share", "max_answer_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share in [0, 1], got {getattr(self, name)}.")
        if self.new_facts not in ("invented", "real"):
            raise ValueError(f"`new_facts` must be 'invented' or 'real', got {self.new_facts!r}.")


def build_training_mix(
    annotated: Dataset, settings: MixSettings, seed: int = 0, exclude: Iterable[str] = ()
) -> dict[str, Dataset]:
    """
    Chooses relations, and draws facts of them of which no answer makes up more than its share. The `annotated` ones
    come from [`~trl_selfdistill.slick.slick.annotate_facts`]. No invented one has a name of theirs or of `exclude`.

    Returns:
        `dict[str, Dataset]`: `known`, `new` and `heldout`, each with the facts' columns and `prompt` and
        `completion`. No subject of `heldout` occurs in `known` or `new`.

    Raises:
        ValueError: If a relation asked for does not exist or has too few Known facts, or there are not enough facts.
    """
    if "slick_category" not in annotated.column_names:
        raise ValueError(f"no column `slick_category` (found {annotated.column_names}); annotate the facts first")
    relations = _choose_relations(annotated, settings.relations or (), settings.min_known_share)
    new_relations = settings.new_relations or relations
    if not set(new_relations) <= set(relations):
        raise ValueError(f"`new_relations={new_relations}` are not all among the relations used: {relations}.")
    facts = [fact for fact in annotated.to_list() if fact["relation"] in relations]
    random.Random(seed).shuffle(facts)
    highly_known = [fact for fact in facts if fact["slick_category"] == SlickCategory.HIGHLY_KNOWN]
    known = _enough(highly_known, settings, "num_known", f"HighlyKnown facts of {', '.join(relations)}")
    if settings.new_facts == "real":
        unknown = [fact for fact in facts if fact["slick_category"] == SlickCategory.UNKNOWN]
        new = [fact for fact in unknown if fact["relation"] in new_relations]
    else:
        per_relation = Counter(fact["relation"] for fact in known if fact["relation"] in new_relations)
        new = _invented(annotated, per_relation or Counter(new_relations), settings, seed, exclude)
    new = _enough(new, settings, "num_new", f"{settings.new_facts} new facts of {', '.join(new_relations)}")
    trained = {fold_name(fact["subject"]) for fact in known + new}
    rest = [fact for fact in highly_known if fold_name(fact["subject"]) not in trained]
    num_heldout = settings.num_heldout
    while len(heldout := _balanced(rest, num_heldout, settings.max_answer_share)) < num_heldout:
        num_heldout = len(heldout)  # of fewer facts, the share of an answer is fewer
    if len(heldout) < settings.min_heldout:
        raise ValueError(
            f"`min_heldout={settings.min_heldout}`, but {len(heldout)} HighlyKnown facts are left beside `num_known="
            f"{settings.num_known}`. Lower one, or take more facts or a model that knows more."
        )
    return {name: _with_prompts(split) for name, split in zip(SPLITS, (known, new, heldout), strict=True)}


def load_mix(folder: str | Path) -> dict[str, Dataset]:
    """The splits of a mix in `folder`, one JSONL file each, by name. They are checked: a user may have edited them."""
    return {name: load_facts(Path(folder) / f"{name}.jsonl") for name in SPLITS}


def _choose_relations(annotated: Dataset, wanted: Collection[str], min_known_share: float) -> list[str]:
    """The relations of `wanted`, or of all if it is empty, of which enough facts are Known; in `annotated`'s order."""
    known = defaultdict(list)
    for relation, category in zip(annotated["relation"], annotated["slick_category"], strict=True):
        known[relation].append(category != SlickCategory.UNKNOWN)
    shares = {relation: fmean(values) for relation, values in known.items()}
    chosen = [name for name, share in shares.items() if share >= min_known_share and (name in wanted or not wanted)]
    if not chosen or not set(wanted) <= set(chosen):
        found = ", ".join(f"{relation} ({share:.0%} Known)" for relation, share in shares.items())
        raise ValueError(
            f"`relations={[*wanted]}`, `min_known_share={min_known_share}`, and the facts are of {found}. Leave out "
            "relations below the share, lower it, or take other facts or a model that knows more."
        )
    return chosen


def _balanced(facts: list[dict], num_facts: int, max_answer_share: float) -> list[dict]:
    """The first `num_facts` of `facts`, skipping those whose answer has had its share."""
    most = max(1, math.ceil(max_answer_share * num_facts))
    counts, chosen = Counter(), []
    for fact in facts:
        counts[fact["answer"]] += 1
        if counts[fact["answer"]] <= most:
            chosen.append(fact)
    return chosen[:num_facts]


def _enough(facts: list[dict], settings: MixSettings, number: str, what: str) -> list[dict]:
    """As many of `facts` as the setting `number` asks for."""
    asked, share = getattr(settings, number), settings.max_answer_share
    chosen = _balanced(facts, asked, share)
    if len(chosen) < asked:
        raise ValueError(
            f"`{number}={asked}`, but there are {len(chosen)} {what} with at most {share:.0%} of one answer. Lower "
            f"`{number}`, raise `max_answer_share`, or add facts or relations."
        )
    return chosen


def _invented(
    annotated: Dataset, per_relation: Counter[str], settings: MixSettings, seed: int, exclude: Iterable[str]
) -> list[dict]:
    """Invented facts, spread over the relations in the proportions of `per_relation`."""
    exclude = set(exclude)
    invented, weight_left = [], per_relation.total()
    for relation, weight in sorted(per_relation.items()):
        num_facts = round((settings.num_new - len(invented)) * weight / weight_left)  # all the rest of the last one
        weight_left -= weight
        if not num_facts:
            continue
        try:
            facts = invent_facts(annotated, relation, num_facts, seed=seed, exclude=exclude)
        except ValueError as error:
            raise ValueError(f"`num_new={settings.num_new}`, relation {relation!r}: {error}") from error
        exclude |= set(facts["subject"])
        invented.extend({**fact, "slick_category": SlickCategory.UNKNOWN.value} for fact in facts.to_list())
    return invented


def _with_prompts(facts: list[dict]) -> Dataset:
    return facts_table(
        {**fact, "prompt": question_prompt(fact["question"]), "completion": answer_completion(fact["answer"])}
        for fact in facts
    )
