# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfdistill.hallucination.exact_match import exact_match, normalize_answer


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@given(st.text())
def test_an_answer_matches_itself_unless_nothing_is_left_of_it(text):
    assert exact_match(text, [text]) == bool(normalize_answer(text))


@given(st.text(), st.text())
def test_matching_is_symmetric(first, second):
    assert exact_match(first, [second]) == exact_match(second, [first])


@given(st.text(), st.lists(st.text()))
def test_more_accepted_forms_never_make_a_right_answer_wrong(prediction, forms):
    assert exact_match(prediction, [prediction, *forms]) == bool(normalize_answer(prediction))
    assert not exact_match(prediction, [])


@pytest.mark.parametrize(
    ("prediction", "accepted"),
    [
        ("FRANCE", ["France"]),  # case
        (" the  United   States. ", ["United States"]),  # articles, spaces, full stop
        ("U.S.A.", ["USA"]),  # punctuation inside
        ("Holland", ["Netherlands", "Holland"]),  # an alias
        (unicodedata.normalize("NFD", "São Tomé"), [unicodedata.normalize("NFC", "São Tomé")]),  # accents as sent
        ("Ｊａｐａｎ", ["Japan"]),  # full-width letters
    ],
)
def test_what_counts_as_the_same(prediction, accepted):
    assert exact_match(prediction, accepted)


@pytest.mark.parametrize(
    ("prediction", "accepted"),
    [
        ("France and Spain", ["France"]),  # more than the answer
        ("Fran", ["France"]),  # less than the answer
        ("Niger", ["Nigeria"]),
        ("Theland", ["land"]),  # an article is a word, not a prefix
        ("", ["France"]),
        ("", [""]),
        ("the.", ["a"]),  # nothing is left of either
    ],
)
def test_what_does_not(prediction, accepted):
    assert not exact_match(prediction, accepted)


def test_importing_the_judge_does_not_import_torch():
    modules = "trl_selfdistill.hallucination.exact_match, trl_selfdistill.slick.prompts"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
