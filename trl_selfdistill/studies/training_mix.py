# SPDX-License-Identifier: Apache-2.0
"""From annotated facts to training data: which facts are trained on as Known, as new, and which are held out.

After the paper's protocol (arXiv 2604.15574): relations of which the model knows enough, HighlyKnown facts as the
Known ones, and as many other HighlyKnown facts of the same relations held out, on which forgetting is measured.
"""

import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from ..slick.prompts import answer_completion, question_prompt
from ..slick.slick import SlickCategory
from .facts.invented import invent_facts
from .facts.table import fold_name, load_facts


logger = logging.getLogger(__name__)

SPLITS = ("known", "new", "heldout")


@dataclass(frozen=True)
class MixSettings:
    """
    Settings of [`build_training_mix`].

    Args:
        num_known (`int`, *optional*, defaults to `120`):
            HighlyKnown facts to train on: alone in stage 1, with the new ones in stage 2.
        num_new (`int`, *optional*, defaults to `400`):
            New facts to train on in stage 2.
        num_heldout (`int`, *optional*, defaults to `500`):
            HighlyKnown facts never trained on, at most.
        min_heldout (`int`, *optional*, defaults to `1`):
            Fewest held-out facts to go on with: a rate over 25 facts is uncertain by 20 points, over 100 by 10.
        new_facts (`str`, *optional*, defaults to `"invented"`):
            `"invented"` for a fictitious atlas that no model can know ([`invent_facts`]), `"real"` for Unknown facts.
        relations (`list[str]`, *optional*):
            Relations to use. By default all of which the model knows enough.
        new_relations (`list[str]`, *optional*):
            Relations, among those used, that the new facts are of. By default all, in the proportions of the Known
            facts.
        min_known_share (`float`, *optional*, defaults to `0.3`):
            Least share of Known facts (in any of SLiCK's three Known categories) of a relation: the paper's 30 %.
        max_answer_share (`float`, *optional*, defaults to `0.1`):
            No answer makes up more than this share of a split, so that guessing the most frequent one does not pay.
    """

    _argument_group_name = "training mix"  # the heading of these flags in a script's help

    num_known: int = field(default=120, metadata={"help": "HighlyKnown facts to train on, in both stages."})
    num_new: int = field(default=400, metadata={"help": "New facts to train on in stage 2."})
    num_heldout: int = field(default=500, metadata={"help": "HighlyKnown facts to hold out, at most."})
    min_heldout: int = field(default=1, metadata={"help": "Fewest held-out facts to go on with."})
    new_facts: str = field(
        default="invented",
        metadata={
            "help": "New facts: `invented`, a fictitious atlas, or `real`, Unknown ones.",
            "choices": ["invented", "real"],
        },
    )
    relations: list[str] | None = field(
        default=None, metadata={"help": "Relations to use. By default all of which the model knows enough."}
    )
    new_relations: list[str] | None = field(
        default=None, metadata={"help": "Relations of the new facts, among those used. By default all."}
    )
    min_known_share: float = field(default=0.3, metadata={"help": "Least share of Known facts of a relation."})
    max_answer_share: float = field(default=0.1, metadata={"help": "Largest share of a split with the same answer."})

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
    Chooses relations, and facts of them at random, of which no answer makes up more than its share.

    Args:
        annotated (`Dataset`):
            Facts with their `slick_category`, as [`~trl_selfdistill.slick.slick.annotate_facts`] returns them.
        settings ([`MixSettings`]):
            How many of what.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice, the order and the invented facts.
        exclude (`Iterable[str]`, *optional*):
            Real names that no invented subject may have, beside those of `annotated`.

    Returns:
        `dict[str, Dataset]`: `known`, `new` and `heldout`, each with the facts' columns and `prompt` and
        `completion`. No subject of `heldout` occurs in `known` or `new`.

    Raises:
        ValueError: If a relation asked for does not exist or has too few Known facts, or there are not enough facts.
    """
    if "slick_category" not in annotated.column_names:
        raise ValueError(
            f"The facts have no column `slick_category` (found {annotated.column_names}). Annotate them first."
        )
    generator = random.Random(seed)
    relations = choose_relations(annotated, settings.relations or (), settings.min_known_share)
    facts = [fact for fact in annotated.to_list() if fact["relation"] in relations]
    generator.shuffle(facts)
    highly_known = [fact for fact in facts if fact["slick_category"] == SlickCategory.HIGHLY_KNOWN]
    known = _balanced(highly_known, settings.num_known, settings.max_answer_share)
    if len(known) < settings.num_known:
        raise ValueError(
            f"`num_known={settings.num_known}`, but the relations {', '.join(relations)} give {len(known)} "
            f"HighlyKnown facts with at most {settings.max_answer_share:.0%} of one answer. Lower `num_known`, raise "
            "`max_answer_share`, or annotate more facts."
        )
    if unused := set(settings.new_relations or ()) - set(relations):
        raise ValueError(
            f"`new_relations` asks for {', '.join(sorted(unused))}, which is not among the relations used: "
            f"{', '.join(relations)}."
        )
    new_relations = settings.new_relations or relations
    if settings.new_facts == "real":
        new = _real([fact for fact in facts if fact["relation"] in new_relations], settings)
    else:
        per_relation = Counter(fact["relation"] for fact in known if fact["relation"] in new_relations)
        new = _invented(annotated, per_relation or Counter(new_relations), settings, seed, exclude)
    trained = {fold_name(fact["subject"]) for fact in known + new}
    rest = [fact for fact in highly_known if fold_name(fact["subject"]) not in trained]
    heldout = _balanced_at_most(rest, settings.num_heldout, settings.max_answer_share)
    if len(heldout) < settings.min_heldout:
        raise ValueError(
            f"`min_heldout={settings.min_heldout}`, but {len(heldout)} HighlyKnown facts of {', '.join(relations)} "
            f"are left to hold out beside `num_known={settings.num_known}`. Lower one of the two, annotate more "
            "facts, or take a model that knows more."
        )
    return {name: _with_prompts(split) for name, split in zip(SPLITS, (known, new, heldout), strict=True)}


def load_mix(folder: str | Path) -> dict[str, Dataset]:
    """The splits of a mix that was written to `folder`, one JSONL file each, by name."""
    return {name: load_facts(Path(folder) / f"{name}.jsonl") for name in SPLITS}


def choose_relations(annotated: Dataset, wanted: Iterable[str], min_known_share: float) -> list[str]:
    """
    The relations of which at least `min_known_share` of the facts are Known, in the order of `annotated`.

    Raises:
        ValueError: If one of `wanted` is missing or below that share, or no relation reaches it.
    """
    categories = defaultdict(list)
    for relation, category in zip(annotated["relation"], annotated["slick_category"], strict=True):
        categories[relation].append(category)
    shares = {r: sum(c != SlickCategory.UNKNOWN for c in cs) / len(cs) for r, cs in categories.items()}
    found = ", ".join(f"{relation} ({share:.0%} Known)" for relation, share in shares.items())
    for relation in wanted:
        if relation not in shares:
            raise ValueError(f"`relations` asks for {relation!r}, which the facts do not have. They have: {found}.")
        if shares[relation] < min_known_share:
            raise ValueError(
                f"The relation {relation!r} has too few Known facts: {shares[relation]:.0%} of "
                f"{len(categories[relation])}, `min_known_share` is {min_known_share:.0%}. Leave it out, or lower "
                "`min_known_share`."
            )
    chosen = [r for r, share in shares.items() if (r in wanted if wanted else share >= min_known_share)]
    if not chosen:
        raise ValueError(
            f"No relation has enough Known facts (`min_known_share={min_known_share:.0%}`): {found}. The model knows "
            "too little of these facts for forgetting to show; take other facts, or another model."
        )
    for relation in shares.keys() - set(chosen):
        logger.info(f"Relation {relation} is left out: {shares[relation]:.0%} of its facts are Known.")
    return chosen


def _balanced(facts: list[dict], num_facts: int, max_answer_share: float) -> list[dict]:
    """The first `num_facts` of `facts`, skipping those whose answer has had its share."""
    most = max(1, math.ceil(max_answer_share * num_facts))
    counts, chosen = Counter(), []
    for fact in facts:
        if len(chosen) == num_facts:
            break
        if counts[fact["answer"]] < most:
            counts[fact["answer"]] += 1
            chosen.append(fact)
    return chosen


def _balanced_at_most(facts: list[dict], num_facts: int, max_answer_share: float) -> list[dict]:
    """As many of `facts` as can be had up to `num_facts`, no answer above its share of those that are chosen."""
    chosen = _balanced(facts, num_facts, max_answer_share)
    while len(chosen) < num_facts:  # fewer facts make the share of an answer a smaller number
        num_facts = len(chosen)
        chosen = _balanced(facts, num_facts, max_answer_share)
    return chosen


def _real(facts: list[dict], settings: MixSettings) -> list[dict]:
    """Unknown facts."""
    unknown = [fact for fact in facts if fact["slick_category"] == SlickCategory.UNKNOWN]
    new = _balanced(unknown, settings.num_new, settings.max_answer_share)
    if len(new) < settings.num_new:
        raise ValueError(
            f"`num_new={settings.num_new}`, but there are {len(new)} Unknown facts to be had with at most "
            f"{settings.max_answer_share:.0%} of one answer. Lower `num_new`, raise `max_answer_share`, or use "
            "`new_facts='invented'`."
        )
    return new


def _invented(
    annotated: Dataset, per_relation: Counter[str], settings: MixSettings, seed: int, exclude: Iterable[str]
) -> list[dict]:
    """Invented facts, spread over the relations in the proportions of `per_relation`."""
    num_new = settings.num_new
    exclude = set(exclude) | set(annotated["subject"])
    invented = []
    for i, (relation, count) in enumerate(sorted(per_relation.items()), start=1):
        rest = num_new - len(invented)
        num_facts = rest if i == len(per_relation) else min(rest, round(num_new * count / per_relation.total()))
        if not num_facts:
            continue
        try:
            facts = invent_facts(annotated, relation, num_facts, seed=seed, exclude=exclude)
        except ValueError as error:
            raise ValueError(
                f"`num_new={num_new}` asks for {num_facts} invented facts of the relation {relation!r}: {error}. "
                "Lower `num_new`, leave the relation out of `relations`, or use `new_facts='real'`."
            ) from error
        exclude |= set(facts["subject"])
        invented.extend({**fact, "slick_category": SlickCategory.UNKNOWN.value} for fact in facts.to_list())
    if len(_balanced(invented, num_new, settings.max_answer_share)) < num_new:
        raise ValueError(
            f"`num_new={num_new}`, but the relations {', '.join(per_relation)} have too few answers for that many "
            f"invented facts with at most {settings.max_answer_share:.0%} of one answer. Raise `max_answer_share` or "
            "add relations."
        )
    return invented


def _with_prompts(facts: list[dict]) -> Dataset:
    rows = [
        {**fact, "prompt": question_prompt(fact["question"]), "completion": answer_completion(fact["answer"])}
        for fact in facts
    ]
    # Invented facts lack the annotation's probabilities: every split has the columns that all of its rows have
    columns = [name for name in rows[0] if all(name in row for row in rows)]
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])
