# SPDX-License-Identifier: Apache-2.0
"""The plain functions of the hallucination metric; the judges are torchmetrics (SQuAD), SciPy and statsmodels."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from torchmetrics.functional.text import squad
from torchmetrics.functional.text.squad import _normalize_text

from trl_selfdistill.hallucination import score_hallucinations
from trl_selfdistill.hallucination.abstention import ABSTENTION_PATTERNS, is_abstention
from trl_selfdistill.hallucination.answer_outcome import OUTCOMES, AnswerJudge
from trl_selfdistill.hallucination.bootstrap import mcnemar_exact, mean_interval
from trl_selfdistill.hallucination.exact_match import normalize_answer
from trl_selfdistill.hallucination.inputs import SLICK_CATEGORIES
from trl_selfdistill.slick.slick import SlickCategory


WORDS = st.sampled_from(
    ["the", "Hague", "New", "York", "U.S.A.", "a", "17", "1,789", "don't know", "unknown", "Ｏslo"]
)
ANSWERS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
ROWS = st.lists(st.tuples(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=3), ANSWERS), min_size=1, max_size=12)


def something_is_left(*texts: str) -> bool:
    """Where SQuAD's script leaves nothing of an answer, it and this package differ on purpose."""
    return all(_normalize_text(text) for text in texts)


@given(st.text())
def test_without_nfkc_normalising_is_that_of_squad(text):
    if something_is_left(text):
        assert normalize_answer(text, fold_width=False) == _normalize_text(text)


@settings(max_examples=60)
@given(ROWS)
def test_accuracy_and_f1_are_those_of_squad(rows):
    rows = [row for row in rows if something_is_left(row[0], *row[1])] or [("Oslo", ["Oslo"], "")]
    predictions, references, _ = zip(*rows, strict=True)
    theirs = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(predictions)],
        [
            {"answers": {"answer_start": [0] * len(forms), "text": forms}, "id": str(i)}
            for i, forms in enumerate(references)
        ],
    )
    ours = score_hallucinations(predictions, references, fold_width=False, resamples=0)
    assert ours["accuracy"] == pytest.approx(theirs["exact_match"].item() / 100, abs=1e-6)
    assert ours["f1"] == pytest.approx(theirs["f1"].item() / 100, abs=1e-6)


@settings(max_examples=60)
@given(ROWS)
def test_rates_are_counts_and_add_up(rows):
    predictions, references, before = zip(*rows, strict=True)
    scores = score_hallucinations(predictions, references, baseline_predictions=before, resamples=0, detailed=True)
    examples = scores.pop("examples")
    assert sum(scores[name] for name in ("accuracy", "hallucination_rate", "abstention_rate")) == pytest.approx(1)
    assert {row["outcome"] for row in examples} <= set(OUTCOMES)
    known = [row for row in examples if row["baseline_outcome"] == "correct"]
    unknown = [row for row in examples if row["baseline_outcome"] != "correct"]
    for name, rows, outcomes in (
        ("forgetting_rate", known, {"abstained", "hallucinated"}),
        ("induced_hallucination_rate", known, {"hallucinated"}),
        ("acquisition_rate", unknown, {"correct"}),
    ):
        share = sum(row["outcome"] in outcomes for row in rows) / len(rows) if rows else None
        assert scores[name] == (None if share is None else pytest.approx(share))
    assert scores["net_change"] == pytest.approx(scores["accuracy"] - scores["baseline_accuracy"])
    json.dumps(scores, allow_nan=False)


@given(ROWS)
def test_one_more_alias_never_makes_a_right_answer_wrong(rows):
    judge = AnswerJudge()
    for prediction, forms, other in rows:
        if judge.outcome(prediction, forms) == "correct":
            assert judge.outcome(prediction, [*forms, other]) == "correct"
        assert judge.f1(prediction, [*forms, other]) >= judge.f1(prediction, forms)


@pytest.mark.parametrize(
    ("prediction", "accepted", "options", "outcome"),
    [
        ("17", ["1789"], {}, "hallucinated"),
        ("1789", ["17"], {"match": "contains"}, "hallucinated"),
        ("It was in 1789.", ["1789"], {"match": "contains"}, "correct"),
        ("It was in 1789.", ["1789"], {}, "hallucinated"),
        ("17.89", ["1789"], {}, "correct"),  # as SQuAD's script has it
        ("17.89", ["1789"], {"exact_numbers": True}, "hallucinated"),
        ("1,789.", ["1789"], {"exact_numbers": True}, "correct"),
        ("-5", ["5"], {"exact_numbers": True}, "hallucinated"),
        ("17.89", ["17"], {"match": "contains", "exact_numbers": True}, "hallucinated"),
        ("Sao Tome", ["São Tomé"], {}, "hallucinated"),
        ("Sao Tome", ["São Tomé"], {"strip_accents": True}, "correct"),
        ("か", ["が"], {"strip_accents": True}, "hallucinated"),  # another letter, not an accent
        ("Ｊａｐａｎ", ["Japan"], {}, "correct"),
        ("Ｊａｐａｎ", ["Japan"], {"fold_width": False}, "hallucinated"),
        ("A", ["A"], {}, "correct"),  # a blood type, of which SQuAD's script leaves nothing
        ("the", ["A"], {}, "hallucinated"),
        ("Unknown", ["Unknown"], {}, "correct"),
        ("I don't know. France?", ["France"], {"match": "contains"}, "abstained"),
        ("", ["France"], {}, "abstained"),
        ("...", ["France"], {"abstention_patterns": []}, "abstained"),
        ("unknown", ["France"], {"abstention_patterns": []}, "hallucinated"),
        ("pass", ["France"], {"abstention_patterns": [*ABSTENTION_PATTERNS, "^pass$"]}, "abstained"),
    ],
)
def test_outcomes(prediction, accepted, options, outcome):
    assert AnswerJudge(**options).outcome(prediction, accepted) == outcome


@pytest.mark.parametrize(
    "answer",
    """I don't know.|I don’t know!|i really don't know|UNKNOWN.|The answer is unknown|It is not known.|N/A|
    I'm not sure.|I am uncertain|I cannot answer that question.|That can't be determined|No idea|Nobody knows|?|—|
    There is not enough information to say.|Unfortunately, I do not know the answer.|I have no information about it|
    Das weiß ich nicht, ich weiß es nicht|Unbekannt|Keine Ahnung!|Je ne sais pas.|Inconnu|No lo sé|Desconocido|Não sei|
    Non lo so.|Ik weet het niet|Nie wiem.|Не знаю.|Невідомо|Bilmiyorum.|لا أعرف|मुझे नहीं पता|我不知道。|
    未知|わかりません。|不明|모르겠습니다.|Saya tidak tahu|Tôi không biết""".replace("\n", "").split("|"),
)
def test_abstentions(answer):
    assert is_abstention(answer)


@pytest.mark.parametrize(
    "answer",
    ["Unknown Pleasures", "No", "None", "Norway", "The Unknown Soldier", "Sure", "Clear Lake", "0", "不丹", "Idaho"],
)
def test_answers_are_no_abstentions(answer):
    assert not is_abstention(answer)


@pytest.mark.parametrize("pattern", ABSTENTION_PATTERNS)
def test_each_pattern_is_as_answers_are_folded(pattern):
    assert pattern.replace(r"\W", "") == pattern.lower() and "’" not in pattern


@pytest.mark.parametrize("values", [[0, 0, 1, 1, 1] * 12, [0.2, 0.5, 1.0, 0.0] * 20, [-1, 0, 0, 1, 1] * 15, [1, 1]])
def test_interval_is_that_of_scipys_bootstrap(values):
    ours = mean_interval(np.array(values), resamples=20_000, seed=1)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval if len(set(values)) > 1 else (1.0, 1.0)  # fmt: skip
    # An end point is itself uncertain, by about a step of the resampled means
    assert ours[1:] == pytest.approx(tuple(theirs), abs=2 / len(values))
    assert ours.value == pytest.approx(np.mean(values)) and ours.low <= ours.value <= ours.high


@pytest.mark.parametrize(("right", "total"), [(3, 10), (50, 60), (700, 1000)])
def test_interval_of_a_share_is_that_of_the_binomial(right, total):
    interval = mean_interval(np.arange(total) < right, resamples=50_000)
    low, high = scipy.stats.binom.ppf([0.025, 0.975], total, right / total) / total
    assert interval[1:] == pytest.approx((low, high), abs=1.01 / total)


@pytest.mark.parametrize("lost, gained", [(0, 0), (5, 0), (3, 3), (10, 25), (400, 480), (30_000, 30_500)])
def test_mcnemar_is_that_of_statsmodels_and_scipy(lost, gained):
    p_value = mcnemar_exact(lost, gained)
    assert p_value == pytest.approx(mcnemar([[7, lost], [gained, 9]], exact=True).pvalue, rel=1e-8)
    if lost + gained:
        assert p_value == pytest.approx(scipy.stats.binomtest(lost, lost + gained).pvalue, rel=1e-8)
    assert p_value == mcnemar_exact(gained, lost)


def test_groups_are_the_scores_of_their_rows():
    data = {
        "predictions": ["a1", "b1", "unknown", "d1", "e1"],
        "references": ["a1", "x", "c1", ["x", "d1"], "x"],
        "baseline_predictions": ["a1", "x", "c1", "y", "y"],
        "relations": ["r", "r", "s", "s", "s"],
        "categories": ["HighlyKnown", "HighlyKnown", "MaybeKnown", "Unknown", "Unknown"],
    }
    scores = score_hallucinations(**data, resamples=200, seed=3, detailed=True, questions=list("12345"))
    assert (scores["factual_stability"], scores["factual_plasticity"]) == (0.5, 0.5)
    for column, name in (("relations", "relation"), ("categories", "category")):
        for group, table in scores["tables"][name].items():
            rows = [i for i, label in enumerate(data[column]) if label == group]
            part = {key: [data[key][i] for i in rows] for key in ("predictions", "references", "baseline_predictions")}
            assert table == score_hallucinations(**part, resamples=200, seed=3)
            assert scores[f"{name}/{group}/hallucination_rate"] == table["hallucination_rate"]
    assert scores["examples"][3] == {
        "question": "4", "prediction": "d1", "references": ["x", "d1"], "outcome": "correct", "f1": 1.0,
        "baseline_prediction": "y", "baseline_outcome": "hallucinated", "category": "Unknown", "relation": "s",
    }  # fmt: skip
    assert scores["factual_stability_ci_low"] <= 0.5 <= scores["factual_stability_ci_high"]
    flat = score_hallucinations(**data, resamples=200, seed=3)
    assert flat == {key: value for key, value in scores.items() if key not in ("tables", "examples")}
    assert all(isinstance(value, int | float | None) for value in flat.values())
    assert flat != score_hallucinations(**data, resamples=200, seed=4)


def test_a_share_of_nothing_is_none():
    scores = score_hallucinations(["a"], ["a"], baseline_predictions=["b"], categories=["MaybeKnown"])
    for name in ("forgetting_rate", "induced_hallucination_rate", "factual_stability", "factual_plasticity"):
        assert scores[name] is scores[f"{name}_ci_low"] is scores[f"{name}_ci_high"] is None
    assert scores["acquisition_rate"] == 1.0 and not any(
        isinstance(v, float) and math.isnan(v) for v in scores.values()
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"predictions": []}, ValueError, "`predictions` is empty"),
        ({"predictions": "ab"}, TypeError, "`predictions` is 'ab'; it must be a list"),
        ({"predictions": ["a", None]}, TypeError, r"`predictions\[1\]` is None"),
        ({"predictions": ["a", b"b"]}, TypeError, r"`predictions\[1\]` is b'b' \(bytes\)"),
        ({"predictions": [1, "b"]}, TypeError, r"`predictions\[0\]` is 1 \(int\)"),
        ({"predictions": ["a"]}, ValueError, "`references` has 2 rows and `predictions` 1: row 1 is the first"),
        ({"references": ["a"]}, ValueError, "`references` has 1 rows and `predictions` 2: row 1 is the first"),
        ({"references": ["a", None]}, TypeError, r"`references\[1\]` is None"),
        ({"references": ["a", b"b"]}, TypeError, r"`references\[1\]` is b'b' \(bytes\)"),
        ({"references": ["a", {"b": "c"}]}, TypeError, r"`references\[1\]` is {'b': 'c'} \(dict\)"),
        ({"references": ["a", []]}, ValueError, r"`references\[1\]` is empty"),
        ({"references": ["a", ["b", None]]}, TypeError, r"`references\[1\]\[1\]` is None"),
        ({"references": ["a", ["?", ""]]}, ValueError, r"`references\[1\]` is \['\?', ''\], of which nothing is left"),
        ({"baseline_predictions": ["a"]}, ValueError, "`baseline_predictions` has 1 rows"),
        ({"questions": ["a", 2]}, TypeError, r"`questions\[1\]` is 2 \(int\)"),
        ({"relations": ["a", None]}, TypeError, r"`relations\[1\]` is None"),
        ({"categories": ["Unknown", "Known"]}, ValueError, r"`categories\[1\]` is 'Known'; the SLiCK categories"),
        ({"match": "fuzzy"}, ValueError, "`match` is 'fuzzy'"),
        ({"strip_accents": "yes"}, TypeError, "`strip_accents` is 'yes'"),
        ({"abstention_patterns": "unknown"}, TypeError, "`abstention_patterns` is the one string 'unknown'"),
        ({"abstention_patterns": ["("]}, ValueError, r"`abstention_patterns\[0\]` is '\(', not a regular expression"),
        ({"abstention_patterns": [["a"]]}, TypeError, r"`abstention_patterns\[0\]` is a list"),
        ({"resamples": -1}, ValueError, "`resamples` is -1"),
        ({"seed": 0.5}, TypeError, "`seed` is 0.5"),
    ],
)
def test_errors_name_the_row(change, error, message):
    with pytest.raises(error, match=message):
        score_hallucinations(**{"predictions": ["a", "b"], "references": ["a", "b"], **change})


def test_arrays_and_columns_are_lists():
    expected = score_hallucinations(["a", "b"], ["a", "c"])
    assert score_hallucinations(np.array(["a", "b"]), ("a", ["c"])) == expected


def test_the_names_of_the_slick_categories():
    assert SLICK_CATEGORIES == tuple(category.value for category in SlickCategory)
    both = [score_hallucinations(["a"], ["a"], categories=c) for c in ([SlickCategory.UNKNOWN], ["Unknown"])]
    assert both[0] == both[1] and both[0]["factual_plasticity"] == 1.0


def test_it_needs_neither_torch_nor_evaluate():
    code = "import sys, trl_selfdistill.hallucination as h; h.score_hallucinations(['a'], ['a']); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded and not {*loaded} & {"torch", "evaluate", "datasets", "transformers"}
