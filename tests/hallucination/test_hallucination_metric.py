# SPDX-License-Identifier: Apache-2.0
"""The metric as `evaluate` sees it: loaded from the checkout, with its card and its page."""

import doctest
import importlib.util

import evaluate
import pandas as pd
import pytest
from test_code_blocks import MarkdownDocTestParser

from trl_selfdistill.files import shipped
from trl_selfdistill.hallucination import score_hallucinations


FOLDER = shipped("evaluate_metrics/hallucination")
PREDICTIONS = ["France", "Chile", "unknown", "Holland"]
REFERENCES = ["France", ["Peru", "Republic of Peru"], "Norway", ["Netherlands", "Holland"]]


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(FOLDER))


def test_it_is_the_plain_function_however_the_answers_come(metric):
    options = {"baseline_predictions": ["France", "Peru", "x", "x"], "relations": [*"aab", "b\0"], "match": "contains"}
    expected = score_hallucinations(PREDICTIONS, REFERENCES, **options)
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES, **options) == expected
    assert expected["relation/b\0/num_predictions"] == 1
    metric.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    metric.add_batch(predictions=PREDICTIONS[1:], references=REFERENCES[1:])
    assert metric.compute(**options) == expected
    # Arrow infers the type of a column from its first row
    backwards = score_hallucinations(PREDICTIONS[::-1], REFERENCES[::-1])
    assert metric.compute(predictions=PREDICTIONS[::-1], references=REFERENCES[::-1]) == backwards


def test_it_combines_by_every_entry(metric):
    both, answers = evaluate.combine([metric]), {"predictions": ["a", "b"], "references": ["A", "b"]}
    expected = score_hallucinations(**answers)
    assert both.compute(**answers) == expected
    both.add("a", "A")
    both.add(reference="b", prediction="b")
    assert both.compute(predictions=None, references=None) == expected
    with pytest.raises(ValueError, match="Bad inputs .*'extra'"):  # as every metric says it
        metric.add_batch(predictions=["a"], references=["a"], extra=["a"])


def test_a_bad_batch_adds_nothing_and_the_metric_goes_on(metric):
    metric.add_batch(predictions=["a"], references=["a"])
    for predictions, references in ((["b", None], ["b", "c"]), (["b", "c"], ["b"]), ([], []), (["b"], [b"b"])):
        with pytest.raises((TypeError, ValueError), match=r"1 rows|\[[01]\]|empty"):
            metric.add_batch(predictions=predictions, references=references)
    assert metric.compute()["num_predictions"] == 1
    table = pd.DataFrame({"prediction": ["a", "b"]})
    with pytest.raises(TypeError, match="`predictions` is a DataFrame; it must be a list of strings"):
        score_hallucinations(table, table)
    for options in ({}, {"predictions": ["a"]}, {"predictions": ["a"], "references": ["a"], "categories": ["x"]}):
        with pytest.raises((TypeError, ValueError), match="references|Nothing to score|HighlyKnown"):
            metric.compute(**options)
    assert metric.compute(predictions=["b"], references=["a"])["accuracy"] == 0.0


def test_the_examples_of_the_metric_and_its_card_run(metric):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for text in (metric.inputs_description, card):
        test = MarkdownDocTestParser().get_doctest(text, {}, "examples", None, 0)
        assert len(test.examples) > 3
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
    scores = metric.compute(predictions=["a"], references=["a"], baseline_predictions=["a"], categories=["Unknown"])
    missing = [name for name in scores if f"`{name.removesuffix('_ci_low').removesuffix('_ci_high')}`" not in card]
    assert {name.split("/")[0] for name in missing} == {"category"}


def test_the_page_scores_lines_of_text():
    spec = importlib.util.spec_from_file_location("hallucination_app", FOLDER / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    [[predictions, references, _]] = app.EXAMPLES
    assert app.score(predictions, references)["hallucination_rate"] == pytest.approx(1 / 3)
    assert app.score("a\nb", "a|c\nb", "a\nx")["acquisition_rate"] == 1.0
