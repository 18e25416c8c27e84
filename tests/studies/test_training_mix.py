# SPDX-License-Identifier: Apache-2.0
import math
import random
from collections import Counter

import pytest
from datasets import Dataset

from trl_selfdistill.studies.facts.table import facts_from_rows, fold_name, save_facts
from trl_selfdistill.studies.training_mix import SPLITS, MixSettings, build_training_mix, choose_relations, load_mix


CONSONANTS, VOWELS = "bdfgklmnprst", "aeiou"


def invent_names(num_names: int, generator: random.Random) -> list[str]:
    """Names of four syllables, so that there are enough to be joined anew."""
    names = set()
    while len(names) < num_names:
        syllables = (generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in range(3))
        names.add("".join(syllables).capitalize() + generator.choice(CONSONANTS))
    return sorted(names)


def annotated_facts(
    num_relations: int = 3, num_facts: int = 100, num_answers: int = 20, known_share: float = 0.6, seed: int = 0
) -> Dataset:
    """Facts as SLiCK leaves them. Answers are the more frequent the lower their number; relations share subjects."""
    generator = random.Random(seed)
    names = invent_names(num_facts, generator)
    rows = []
    for relation in range(num_relations):
        for subject in names:
            answer = int(num_answers * generator.random() ** 2)
            category = "Unknown"
            if generator.random() < known_share:
                category = generator.choice(["HighlyKnown"] * 8 + ["MaybeKnown", "WeaklyKnown"])
            rows.append(
                {
                    "relation": f"R{relation}",
                    "subject": subject,
                    "question": f"What is R{relation} of {subject}?",
                    "answer": f"Answer {relation}.{answer}",
                    "p_correct_greedy": float(category == "HighlyKnown"),
                    "slick_category": category,
                }
            )
    return facts_from_rows(rows)


def settings(**changes) -> MixSettings:
    return MixSettings(**{"num_known": 40, "num_new": 60, "num_heldout": 80, "max_answer_share": 0.1, **changes})


def subjects(split: Dataset) -> set[str]:
    return {fold_name(subject) for subject in split["subject"]}


@pytest.fixture(scope="module")
def annotated():
    return annotated_facts()


@pytest.mark.parametrize("new_facts", ["invented", "real"])
@pytest.mark.parametrize("seed", [0, 1])
def test_splits_hold_what_they_are_called(annotated, new_facts, seed):
    mix = build_training_mix(annotated, settings(new_facts=new_facts), seed)
    assert list(mix) == list(SPLITS)
    assert len(mix["known"]) == 40 and len(mix["new"]) == 60 and 0 < len(mix["heldout"]) <= 80
    assert set(mix["known"]["slick_category"]) == set(mix["heldout"]["slick_category"]) == {"HighlyKnown"}
    assert set(mix["new"]["slick_category"]) == {"Unknown"}
    ids = [fact_id for split in mix.values() for fact_id in split["fact_id"]]
    assert len(set(ids)) == len(ids)
    assert subjects(mix["heldout"]).isdisjoint(subjects(mix["known"]) | subjects(mix["new"]))
    for split in mix.values():
        assert split["prompt"][:] == [f"Q: {question}\nA:" for question in split["question"]]
        assert split["completion"][:] == [f" {answer}" for answer in split["answer"]]
    real = set(annotated["fact_id"])
    assert set(mix["known"]["fact_id"]) | set(mix["heldout"]["fact_id"]) <= real
    assert real.isdisjoint(mix["new"]["fact_id"]) == (new_facts == "invented")


@pytest.mark.parametrize("num_heldout", [20, 80, 500])
@pytest.mark.parametrize("share", [0.06, 0.2])
@pytest.mark.parametrize("new_facts", ["invented", "real"])
def test_no_answer_has_more_than_its_share_of_a_split(annotated, new_facts, share, num_heldout):
    asked = settings(num_heldout=num_heldout, max_answer_share=share, new_facts=new_facts, num_new=30, num_known=30)
    for name, split in build_training_mix(annotated, asked).items():
        most = Counter(split["answer"]).most_common(1)[0][1]
        assert most <= math.ceil(share * len(split)), name


def test_held_out_facts_are_as_many_as_asked_for_if_they_can_be_had(annotated):
    assert len(build_training_mix(annotated, settings(num_heldout=50))["heldout"]) == 50


def test_the_seed_decides_and_nothing_else_does(annotated):
    random.seed(1)
    first, again, other = (build_training_mix(annotated, settings(), seed) for seed in (0, 0, 1))
    for name in SPLITS:
        assert first[name].to_list() == again[name].to_list()
        assert set(first[name]["fact_id"]) != set(other[name]["fact_id"])


def test_invented_subjects_are_nobodys_name(annotated):
    real = set(annotated["subject"])
    excluded = set(build_training_mix(annotated, settings())["new"]["subject"][:30])
    new = build_training_mix(annotated, settings(), exclude=excluded)["new"]
    assert len(set(new["subject"])) == 60
    assert set(new["subject"]).isdisjoint(real | excluded)
    assert set(new["answer"]) <= set(annotated["answer"])


def test_invented_facts_are_spread_over_the_relations_as_the_known_ones(annotated):
    mix = build_training_mix(annotated, settings())
    known, new = (Counter(mix[name]["relation"]) for name in ("known", "new"))
    assert all(abs(new[relation] - 60 * known[relation] / 40) <= 2 for relation in known)


def test_rounding_the_shares_of_many_relations_gives_as_many_invented_facts_as_asked_for():
    rows = annotated_facts(num_relations=7, num_facts=40).to_list()
    for row in rows:
        if row["slick_category"] == "HighlyKnown":
            row["answer"] = f"The only one of {row['relation']}"  # one Known fact of each relation, therefore
    asked = settings(num_known=7, num_new=11, max_answer_share=1 / 7)
    mix = build_training_mix(Dataset.from_list(rows), asked)
    assert {*Counter(mix["known"]["relation"]).values()} == {1}
    assert len(mix["new"]) == 11  # not the 7 x 2 of rounding 11 / 7


@pytest.mark.parametrize("new_facts", ["invented", "real"])
def test_new_facts_of_chosen_relations(annotated, new_facts):
    asked = settings(new_relations=["R2", "R0"], num_new=30, new_facts=new_facts)
    mix = build_training_mix(annotated, asked)
    assert set(mix["new"]["relation"]) == {"R0", "R2"}
    assert set(mix["known"]["relation"]) == set(mix["heldout"]["relation"]) == {"R0", "R1", "R2"}


def test_new_facts_of_a_relation_without_a_known_fact_in_the_mix():
    annotated = annotated_facts()
    known = build_training_mix(annotated, settings(num_known=1))["known"]["relation"][0]
    (other,) = {"R0", "R1", "R2"} - {known} - {"R1" if known != "R1" else "R2"}
    new = build_training_mix(annotated, settings(num_known=1, num_new=20, new_relations=[other]))["new"]
    assert new["relation"][:] == [other] * 20


def test_relations_below_the_share_of_known_facts_are_left_out():
    rows = annotated_facts(num_relations=2).to_list() + [
        {**row, "relation": "dark", "fact_id": f"dark/{row['subject']}", "question": f"Dark {row['subject']}?"}
        for row in annotated_facts(num_relations=1, known_share=0.1).to_list()
    ]
    annotated = Dataset.from_list(rows)
    assert choose_relations(annotated, (), 0.3) == ["R0", "R1"]
    assert choose_relations(annotated, ("R1",), 0.3) == ["R1"]
    assert choose_relations(annotated, ("dark",), 0.01) == ["dark"]
    for name, split in build_training_mix(annotated, settings()).items():
        assert "dark" not in split["relation"][:], name
    with pytest.raises(ValueError, match="'dark' has too few Known facts.*`min_known_share` is 30%.*Leave it out"):
        choose_relations(annotated, ("dark", "R0"), 0.3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_known": 200},
            r"`num_known=200`, but .*R0, R1, R2.* give \d+ .*Lower `num_known`, raise `max_answer_share`",
        ),
        ({"num_new": 500, "new_facts": "real"}, r"`num_new=500`, but there are \d+ Unknown facts.*Lower `num_new`"),
        ({"num_new": 100_000}, r"`num_new=100000` asks for \d+ invented facts of .*Lower `num_new`"),
        ({"num_new": 300, "max_answer_share": 0.015}, "too few answers for that many invented.*`max_answer_share`"),
        ({"new_relations": ["R9"]}, "`new_relations` asks for R9, which is not among .*R0, R1, R2"),
        ({"relations": ["R0"], "new_relations": ["R1"], "num_known": 9}, "asks for R1, which is not among .*: R0"),
        ({"relations": ["R9"]}, r"`relations` asks for 'R9'.*They have: R0 \(\d+% Known\)"),
        ({"relations": ["R0"], "min_known_share": 0.95}, "'R0' has too few Known facts.*lower `min_known_share`"),
        ({"min_known_share": 0.95}, "No relation has enough Known facts.*R0.*R1.*another model"),
    ],
)
def test_errors_name_what_to_change(annotated, changes, message):
    with pytest.raises(ValueError, match=message):
        build_training_mix(annotated, settings(**changes))


def test_nothing_left_to_hold_out():
    annotated = annotated_facts(num_relations=1, num_facts=20, num_answers=10)
    num_known = Counter(annotated["slick_category"])["HighlyKnown"]
    with pytest.raises(ValueError, match=f"left to hold out beside `num_known={num_known}`. Lower one"):
        build_training_mix(annotated, settings(num_known=num_known, num_new=5, max_answer_share=1.0))


def test_facts_that_were_not_annotated(annotated):
    with pytest.raises(ValueError, match="no column `slick_category`.*Annotate them first"):
        build_training_mix(annotated.remove_columns("slick_category"), settings())


def test_too_few_to_judge_by(annotated):
    available = len(build_training_mix(annotated, settings(num_heldout=500))["heldout"])
    enough = build_training_mix(annotated, settings(num_heldout=500, min_heldout=available))
    assert len(enough["heldout"]) == available
    with pytest.raises(ValueError, match=rf"`min_heldout={available + 1}`, but {available} HighlyKnown facts of R0"):
        build_training_mix(annotated, settings(num_heldout=500, min_heldout=available + 1))
    with pytest.raises(ValueError, match="`min_heldout=81` is more than `num_heldout=80`"):
        settings(min_heldout=81)


@pytest.mark.parametrize("name", ["num_known", "num_new", "num_heldout", "min_heldout"])
def test_counts_below_one(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        MixSettings(**{name: 0})


@pytest.mark.parametrize("name", ["min_known_share", "max_answer_share"])
@pytest.mark.parametrize("value", [-0.1, 30])
def test_shares_outside_of_the_unit_interval(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is a share in .*got {value}"):
        MixSettings(**{name: value})


def test_new_facts_of_another_kind():
    with pytest.raises(ValueError, match="`new_facts` must be 'invented' or 'real', got 'fake'"):
        MixSettings(new_facts="fake")


def test_a_mix_comes_back_from_its_files(annotated, tmp_path):
    mix = build_training_mix(annotated, settings())
    for name, split in mix.items():
        save_facts(split, tmp_path / f"{name}.jsonl")
    loaded = load_mix(tmp_path)
    assert {name: split.to_list() for name, split in loaded.items()} == {n: s.to_list() for n, s in mix.items()}
