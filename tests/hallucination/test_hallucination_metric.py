# SPDX-License-Identifier: Apache-2.0
"""The metric as `evaluate` sees it: loaded from the checkout and from a Space, with its card and its page."""

import doctest
import http.server
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import evaluate
import pytest
from test_doctests import MarkdownDocTestParser

from trl_selfdistill.hallucination import score_hallucinations


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "evaluate_metrics" / "hallucination"
PREDICTIONS = ["France", "Chile", "unknown", "Holland"]
REFERENCES = ["France", ["Peru", "Republic of Peru"], "Norway", ["Netherlands", "Holland"]]


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(FOLDER))


def run_doctests(text: str, name: str) -> None:
    test = MarkdownDocTestParser().get_doctest(text, {}, name, name, 0)
    assert len(test.examples) > 3
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_it_is_the_plain_function(metric):
    options = {"baseline_predictions": ["France", "Peru", "Norway", "x"], "relations": [*"abab"], "seed": 5}
    scores = metric.compute(predictions=PREDICTIONS, references=REFERENCES, **options)
    assert scores == score_hallucinations(PREDICTIONS, REFERENCES, **options)


def test_it_has_the_arguments_of_the_plain_function(metric):
    theirs, ours = (inspect.signature(f).parameters for f in (score_hallucinations, metric._compute))
    assert [*theirs] == [*ours]
    for name in [*theirs][2:]:
        assert theirs[name].default == ours[name].default


@pytest.mark.parametrize("references", [REFERENCES, [*reversed(REFERENCES)]], ids=["string first", "list first"])
def test_mixed_references_are_right_whichever_comes_first(metric, references):
    predictions = [form if isinstance(form, str) else form[-1] for form in references]
    assert metric.compute(predictions=predictions, references=references, resamples=0)["accuracy"] == 1.0


def test_batches_and_single_answers_are_one_list(metric):
    metric.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    metric.add_batch(predictions=PREDICTIONS[1:3], references=REFERENCES[1:3])
    metric.add(prediction=PREDICTIONS[3], reference=REFERENCES[3])
    assert metric.compute(seed=1) == score_hallucinations(PREDICTIONS, REFERENCES, seed=1)


def test_a_bad_batch_adds_nothing_and_the_metric_goes_on(metric):
    metric.add_batch(predictions=["a"], references=["a"])
    for predictions, references in ((["b", None], ["b", "c"]), (["b", "c"], ["b"]), ([], []), (["b"], [b"b"])):
        with pytest.raises((TypeError, ValueError), match=r"row 1|\[[01]\]|empty"):
            metric.add_batch(predictions=predictions, references=references)
    assert metric.compute(resamples=0)["num_predictions"] == 1
    for options in ({}, {"predictions": ["a"]}, {"predictions": ["a"], "references": ["a"], "categories": ["x"]}):
        with pytest.raises((TypeError, ValueError), match="references|Nothing to score|SLiCK categories"):
            metric.compute(**options)
    assert metric.compute(predictions=["b"], references=["a"], resamples=0)["accuracy"] == 0.0


def test_the_examples_of_the_metric_run(metric, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_doctests(metric.inputs_description, "hallucination.py")


def test_the_card_has_the_sections_of_the_template_and_its_examples_run(metric, monkeypatch):
    monkeypatch.chdir(ROOT)
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ") for line in card.splitlines() if line.startswith("#")]
    assert headings == [
        "Metric Card for Hallucination", "Metric Description", "How to Use", "Inputs", "Output Values",
        "Values from Popular Papers", "Examples", "Limitations and Bias", "Citation", "Further References",
    ]  # fmt: skip
    for name in inspect.signature(metric._compute).parameters:
        assert f"- **{name}** *(" in card and f"    {name} (`" in metric.inputs_description
    scores = metric.compute(
        predictions=["a"], references=["a"], baseline_predictions=["a"], categories=["Unknown"], resamples=0
    )
    for name in scores:
        assert f"`{name}`" in card or name.startswith("category/")
    run_doctests(card, "README.md")


def test_the_page_scores_lines_of_text():
    spec = importlib.util.spec_from_file_location("hallucination_app", FOLDER / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    [[predictions, references, _]] = app.EXAMPLES
    assert app.score(predictions, references)["hallucination_rate"] == pytest.approx(1 / 3)
    assert app.score("a\nb", "a|c\nb", "a\nx")["acquisition_rate"] == 1.0


SCORE = """
import evaluate
metric = evaluate.load("someone/hallucination")
print(metric.compute(predictions=["a", "b"], references=["a", ["c"]])["hallucination_rate"])
"""


def test_it_loads_from_a_space(tmp_path):
    """A server on this machine stands for the Hub, and serves the folder as a Space's files."""
    space = tmp_path / "hub" / "spaces" / "someone" / "hallucination" / "resolve" / "main"
    space.mkdir(parents=True)
    for file in FOLDER.iterdir():
        if file.is_file():
            (space / file.name).write_bytes(file.read_bytes())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "hub"))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "NO_PROXY": "127.0.0.1"}
        run = subprocess.run(
            [sys.executable, "-c", SCORE], env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True
        )
        server.shutdown()
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "0.5"
