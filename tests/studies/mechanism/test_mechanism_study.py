# SPDX-License-Identifier: Apache-2.0
"""The mechanism study, whole on a small Llama."""

import shutil
from pathlib import Path

import pytest
from conftest import made_once
from PIL import Image
from toy_study import SCRIPTS, run_script, runs_of

from trl_selfdistill.files import read_json
from trl_selfdistill.studies.facts.table import read_facts
from trl_selfdistill.studies.mechanism.study import _facts_of
from trl_selfdistill.studies.mechanism.variants import (
    MechanismArguments,
    MechanismVariant,
    mechanism_variants,
    variant_of_overlap,
)
from trl_selfdistill.studies.models import load_model_and_tokenizer
from trl_selfdistill.studies.results import read_result
from trl_selfdistill.studies.runs import StudySetup


def test_every_run_is_made_once():
    study = MechanismArguments()
    runs = mechanism_variants(study)
    assert len({run.name for run in runs}) == len(runs) == 14
    assert runs[0].num_facts == 0
    assert [variant_of_overlap(300, x).keys for x in (0.0, 0.5, 1.0)] == ["pseudo", "overlap", "recombined"]
    assert sum(run.self_distillation for run in runs) == 1
    probed = {run.label for run in runs if run.probe}
    assert probed == {"Known facts only", "name-like keys", "UUID keys", "name-like keys, self-distillation"}
    without = mechanism_variants(MechanismArguments(uuid_values=False))
    assert {run for run in runs if run.values == "uuid"} == {*runs} - {*without}
    # A further size needs its own runs only
    further = mechanism_variants(MechanismArguments(num_synthetic_facts=[100, 200, 300, 1000]))
    names = {run.name for run in {*further} - {*runs}}
    assert names == {f"{keys}-keys-real-values-200" for keys in ("recombined", "uuid")}
    assert MechanismVariant(10, "overlap", "uuid", 0.25).label == "keys with overlap 0.25, UUID values"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(overlaps=[0.0, 1.5]), r"`overlaps` are shares of tokens in \[0, 1\], got \[0.0, 1.5\]"),
        (dict(overlaps=[0.5]), "`overlaps` needs at least 2 values"),
        (dict(num_synthetic_facts=[0, 10]), r"must be at least 1, got \[0, 10, 300\]"),
        (dict(overlaps=[0.3333331, 0.3333332]), "none twice to six digits"),
    ],
)
def test_mistakes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MechanismArguments(**options)


FLAGS = """--max_facts_per_relation 110 --num_known 12 --num_heldout 40 --num_synthetic_facts 8 24
    --num_facts_of_overlap 24 --overlaps 0 1 --uuid_values false --num_train_epochs 1
    --target_accuracy 0.8""".split()


def run_study(output: Path, *flags: str) -> None:
    config = SCRIPTS / "configs/mechanism_tiny.yaml"
    run_script("mechanism_study.py", "--config", config, "--output_dir", output, *FLAGS, *flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id):
    def make(folder: Path) -> Path:
        run_study(folder / "study")
        return folder / "study"

    return made_once(tmp_path_factory, worker_id, "mechanism", make)


STUDY = MechanismArguments(num_synthetic_facts=[8, 24], num_facts_of_overlap=24, overlaps=[0, 1], uuid_values=False)


def test_the_report_says_what_was_measured(finished):
    report = (finished / "report.md").read_text()
    assert "\nPrecision: float32.\n" in report
    results = read_json(finished / "results.json")
    assert [*results["runs"]] == [run.name for run in mechanism_variants(STUDY)]
    for name, run in results["runs"].items():
        found = read_result(finished / "runs" / f"{name}-seed0")
        before, after = (found.records[i].accuracy("heldout") for i in (0, -1))
        assert run["lost"]["value"] == pytest.approx(before - after)
        assert f"| {run['lost']['value']:.3f} [" in report
        assert run["seconds_per_step"] > 0
        assert not [*(finished / "runs" / f"{name}-seed0").glob("*.safetensors")]
    assert len(results["findings"]) == 3 and "small Llama (width 64, 2 layers)" in report
    for image in ("capacity", "overlap", "drift"):
        assert f"({image}.png)" in report and Image.open(finished / f"{image}.png").width > 800


def test_runs_differ_in_their_facts_only(finished):
    runs = {path.parent.name: read_json(path) for path in (finished / "runs").glob("*/run.json")}
    middle = [run for name, run in runs.items() if "-24-seed0" in name]
    assert len(middle) == 3 and all(run["arguments"]["config"] == middle[0]["arguments"]["config"] for run in middle)
    assert all(run["inputs"] == middle[0]["inputs"] for run in runs.values())
    steps = {name: read_result(finished / "runs" / name).training["num_steps"] for name in runs}
    assert {steps[name] for name in steps if "-24-" in name or "known-only" in name} == {5}


def test_keys_without_overlap_share_no_token_with_facts_that_are_kept(finished):
    setup = StudySetup(str(finished / "stage1"), finished / "mix", None, annotated=finished / "annotated/facts.jsonl")
    _, tokenizer = load_model_and_tokenizer(setup.start)
    kept = [*read_facts(finished / "mix/heldout.jsonl"), *read_facts(finished / "mix/known.jsonl")]
    names = sorted({fact[column] for fact in kept for column in ("subject", "answer")})
    keys = [fact["subject"] for fact in _facts_of(MechanismVariant(24, "pseudo"), 0, STUDY, setup, tokenizer)]
    of_names, of_keys = (
        {token for ids in tokenizer([f" {text}" for text in texts])["input_ids"] for token in ids}
        for texts in (names, keys)
    )
    assert not of_names & of_keys - {*tokenizer("")["input_ids"]}


def test_nothing_is_done_twice(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    before = runs_of(tmp_path / "study/runs")
    run_study(tmp_path / "study")
    assert runs_of(tmp_path / "study/runs") == before


def test_drift_is_measured_where_it_is_compared(finished):
    probed = {path.parent.name for path in (finished / "runs").glob("*/drift.jsonl")}
    assert probed == {f"{variant.name}-seed0" for variant in mechanism_variants(STUDY) if variant.probe}
    for name in probed:
        first, last = read_result(finished / "runs" / name).drift
        assert (first["step"], last["step"]) == (0, 5)
        assert first["drift_kl"] == pytest.approx(0, abs=1e-6) and last["drift_kl"] > 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_synthetic_facts", "20", "900000000"], "num_facts=900000000 keys need more distinct tokens"),
        (["--synthetic_relation", "P38"], "`synthetic_relation='P38'`: no HighlyKnown fact of it is held out"),
        (["--probe_layers", "9"], "9"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_run(finished, tmp_path, flags, message):
    shutil.copytree(finished, tmp_path / "study", ignore=shutil.ignore_patterns("runs"))
    with pytest.raises(ValueError, match=message):
        run_study(tmp_path / "study", *flags)
    assert not (tmp_path / "study/runs").exists()
