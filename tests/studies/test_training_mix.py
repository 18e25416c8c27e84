# SPDX-License-Identifier: Apache-2.0
"""The training mix: splits of the right facts, none of which gives another away."""

import math
import random
from collections import Counter

import pytest
from datasets import Dataset
from fact_rows import facts_from_rows

from trl_selfdistill.files import read_jsonl, write_jsonl
from trl_selfdistill.studies.facts.table import fold_name
from trl_selfdistill.studies.stages import mix_stage
from trl_selfdistill.studies.training_mix import SPLITS, MixSettings, build_training_mix, load_mix


CONSONANTS, VOWELS = "bdfgklmnprst", "aeiou"


def annotated_facts(num_relations: int = 3, known_share: float = 0.6) -> Dataset:
    """Facts as SLiCK leaves them. Answers are the more frequent the lower their number; relations share subjects."""
    generator = random.Random(0)
    # Names of three syllables, so that there are enough to be joined anew
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    names = ["".join(generator.sample(syllables, 3)).capitalize() + "n" for _ in range(100)]
    rows = []
    for relation in range(num_relations):
        for subject in names:
            answer = int(20 * generator.random() ** 2)
            category = "Unknown"
            if generator.random() < known_share:
                category = generator.choice(["HighlyKnown"] * 8 + ["MaybeKnown", "WeaklyKnown"])
            row = {"relation": f"R{relation}", "subject": subject, "question": f"What is R{relation} of {subject}?"}
            rows.append({**row, "answer": f"Answer {relation}.{answer}", "slick_category": category})
    return facts_from_rows(rows)


def settings(**changes) -> MixSettings:
    return MixSettings(**{"num_known": 40, "num_new": 60, "num_heldout": 80, "max_answer_share": 0.1, **changes})


@pytest.fixture(scope="module")
def annotated():
    return annotated_facts()


@pytest.mark.parametrize("new_facts", ["invented", "real"])
def test_splits_hold_what_they_are_called(annotated, new_facts):
    mix = build_training_mix(annotated, settings(new_facts=new_facts, num_heldout=45))
    assert list(mix) == list(SPLITS)
    assert len(mix["known"]) == 40 and len(mix["new"]) == 60 and len(mix["heldout"]) == 45
    assert set(mix["known"]["slick_category"]) == set(mix["heldout"]["slick_category"]) == {"HighlyKnown"}
    assert set(mix["new"]["slick_category"]) == {"Unknown"}
    ids = [fact_id for split in mix.values() for fact_id in split["fact_id"]]
    assert len(set(ids)) == len(ids)
    subjects = {name: {fold_name(subject) for subject in split["subject"]} for name, split in mix.items()}
    assert not subjects["heldout"] & (subjects["known"] | subjects["new"])
    for split in mix.values():
        assert split["prompt"][:] == [f"Q: {question}\nA:" for question in split["question"]]
        assert split["completion"][:] == [f" {answer}" for answer in split["answer"]]
    real = set(annotated["fact_id"])
    assert set(mix["known"]["fact_id"]) | set(mix["heldout"]["fact_id"]) <= real
    assert real.isdisjoint(mix["new"]["fact_id"]) == (new_facts == "invented")


def test_what_a_user_annotates_or_edits_by_hand_is_checked(tmp_path, annotated):
    rows = annotated.remove_columns(["fact_id", "aliases"]).to_pandas().assign(aliases="The one| the other")
    rows.to_csv(tmp_path / "annotated.csv", index=False)
    mix = mix_stage(tmp_path / "annotated.csv", settings(), tmp_path / "mix")
    known = load_mix(mix)["known"]
    assert {*known["fact_id"]} <= {*annotated["fact_id"]} and known["aliases"][0] == ["The one", "the other"]
    first, *others = read_jsonl(mix / "known.jsonl")
    write_jsonl(mix / "known.jsonl", [first | {"aliases": "his|hers"}, *others[1:]])
    assert load_mix(mix)["known"].to_list() == [first | {"aliases": ["his", "hers"]}, *others[1:]]
    write_jsonl(mix / "known.jsonl", [first, others[0] | {"answer": ""}])
    with pytest.raises(ValueError, match="known.jsonl, line 2: answer must be a text that is not empty"):
        load_mix(mix)


@pytest.mark.parametrize(("new_facts", "share", "num_heldout"), [("invented", 0.06, 500), ("real", 0.2, 20)])
def test_no_answer_has_more_than_its_share_of_a_split(annotated, new_facts, share, num_heldout):
    asked = settings(num_heldout=num_heldout, max_answer_share=share, new_facts=new_facts, num_new=30, num_known=30)
    for name, split in build_training_mix(annotated, asked).items():
        most = Counter(split["answer"]).most_common(1)[0][1]
        assert most <= math.ceil(share * len(split)), name


def test_the_seed_decides(annotated):
    first, again, other = (build_training_mix(annotated, settings(), seed) for seed in (0, 0, 1))
    for name in SPLITS:
        assert first[name].to_list() == again[name].to_list()
        assert set(first[name]["fact_id"]) != set(other[name]["fact_id"])


def test_invented_facts_are_of_the_relations_as_the_known_ones_and_their_subjects_are_nobodys_name(annotated):
    mix = build_training_mix(annotated, settings())
    known, new = (Counter(mix[name]["relation"]) for name in ("known", "new"))
    assert all(abs(new[relation] - 60 * known[relation] / 40) <= 2 for relation in known)
    excluded = set(mix["new"]["subject"][:30])
    new = build_training_mix(annotated, settings(), exclude=excluded)["new"]
    assert len(set(new["subject"])) == 60
    assert set(new["subject"]).isdisjoint(excluded | set(annotated["subject"]))
    assert len(build_training_mix(annotated, settings(num_new=1))["new"]) == 1  # none of some relations


@pytest.mark.parametrize("new_facts", ["invented", "real"])
def test_new_facts_of_chosen_relations(annotated, new_facts):
    asked = settings(new_relations=["R2", "R0"], num_new=30, new_facts=new_facts)
    assert set(build_training_mix(annotated, asked)["new"]["relation"]) == {"R0", "R2"}
    [known] = build_training_mix(annotated, settings(num_known=1))["known"]["relation"]
    other = "R0" if known != "R0" else "R1"  # without a Known fact in the mix
    asked = settings(num_known=1, num_new=20, new_relations=[other], new_facts=new_facts)
    assert {*build_training_mix(annotated, asked)["new"]["relation"]} == {other}


def test_relations_below_the_share_of_known_facts_are_left_out():
    rows = annotated_facts(num_relations=2).to_list() + [
        {**row, "relation": "dark", "fact_id": f"dark/{row['subject']}", "question": f"Dark {row['subject']}?"}
        for row in annotated_facts(num_relations=1, known_share=0.1).to_list()
    ]
    annotated = Dataset.from_list(rows)

    def relations(**changes) -> set[str]:
        mix = build_training_mix(annotated, settings(num_known=5, num_new=5, max_answer_share=1.0, **changes))
        return {relation for split in mix.values() for relation in split["relation"]}

    assert relations(min_known_share=0.6) == {"R0", "R1"}  # WeaklyKnown ones among them
    assert relations(relations=["dark"], min_known_share=0.01, num_heldout=2) == {"dark"}
    with pytest.raises(ValueError, match=r"`relations=\['dark', 'R0'\]`, `min_known_share=0.3`.*dark \(\d+% Known\)"):
        relations(relations=["dark", "R0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_known": 200}, r"`num_known=200`, but there are \d+ HighlyKnown facts of R0, R1, R2"),
        ({"num_new": 500, "new_facts": "real"}, r"`num_new=500`, but there are \d+ real new facts.*Lower `num_new`"),
        ({"num_new": 100_000}, r"`num_new=100000`, relation 'R0': num_facts=\d+ is more than can be invented"),
        ({"num_new": 300, "max_answer_share": 0.015}, r"there are \d+ invented new facts .*raise `max_answer_share`"),
        ({"new_relations": ["R9"]}, r"`new_relations=\['R9'\]` are not all among .*'R0', 'R1', 'R2'"),
        ({"relations": ["R9"]}, r"`relations=\['R9'\]`.*the facts are of R0 \(\d+% Known\)"),
        ({"num_heldout": 500, "min_heldout": 500}, r"`min_heldout=500`, but \d+ HighlyKnown facts are left"),
        ({"num_new": 0}, "`num_new` must be at least 1, got 0"),
        ({"max_answer_share": 30}, "`max_answer_share` is a share in .*got 30"),
        ({"new_facts": "fake"}, "`new_facts` must be 'invented' or 'real', got 'fake'"),
        ({"min_heldout": 81}, "`min_heldout=81` is more than `num_heldout=80`"),
    ],
)
def test_errors_name_what_to_change(annotated, changes, message):
    with pytest.raises(ValueError, match=message):
        build_training_mix(annotated, settings(**changes))
    with pytest.raises(ValueError, match="no column `slick_category`.*annotate the facts first"):
        build_training_mix(annotated.remove_columns("slick_category"), settings())
