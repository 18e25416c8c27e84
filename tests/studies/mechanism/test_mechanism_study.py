# SPDX-License-Identifier: Apache-2.0
"""The mechanism study: its rules against made-up losses, and the whole of it on a small Llama."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import made_once
from PIL import Image
from toy_study import SCRIPTS, run_script

from trl_selfdistill.studies.experiment import read_experiment
from trl_selfdistill.studies.facts.table import load_facts
from trl_selfdistill.studies.mechanism.conditions import (
    Condition,
    MechanismArguments,
    condition_of_overlap,
    conditions_of,
)
from trl_selfdistill.studies.mechanism.study import MechanismInputs, facts_of, losses_of
from trl_selfdistill.studies.mechanism.verdict import (
    LossTable,
    Verdict,
    judge_behaviour_cloning,
    judge_capacity,
    judge_interference,
    least_squares_slope,
)
from trl_selfdistill.studies.models import load_model_and_tokenizer
from trl_selfdistill.studies.random_effects import random_effects_interval
from trl_selfdistill.studies.synthetic.name_tokens import token_overlap


def losing(share: float, num_facts: int = 400) -> np.ndarray:
    """That share of the facts is lost under the one seed, the same ones first."""
    return (np.arange(num_facts) < round(share * num_facts)).astype(float)[None]


def table(**shares: float) -> LossTable:
    return LossTable({name: losing(share) for name, share in shares.items()})


SIZES = [100, 1000, 10_000]
LEARNT = defaultdict(lambda: 0.9)


def capacity(names, uuids, learnt=LEARNT):
    losses = table(**{f"n{i}": share for i, share in enumerate(names)}, **{f"u{i}": s for i, s in enumerate(uuids)})
    return judge_capacity(losses, SIZES, ["n0", "n1", "n2"], ["u0", "u1", "u2"], learnt)


@pytest.mark.parametrize(
    ("names", "uuids", "verdict"),
    [
        ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), Verdict.SUPPORTED),  # whatever the keys look like
        ((0.1, 0.2, 0.3), (0.02, 0.12, 0.2), Verdict.SUPPORTED),
        ((0.1, 0.2, 0.3), (0.02, 0.07, 0.13), Verdict.UNDECIDED),  # half of it, give or take
        ((0.1, 0.2, 0.4), (0.02, 0.02, 0.03), Verdict.CONTRADICTED),  # the paper's result
        ((0.1, 0.1, 0.1), (0.1, 0.1, 0.1), Verdict.UNDECIDED),  # nothing grows
        ((0.1, 0.1, 0.1), (0.1, 0.2, 0.3), Verdict.UNDECIDED),  # not for all keys
    ],
)
def test_capacity_needs_a_loss_that_grows_for_all_keys(names, uuids, verdict):
    finding = capacity(names, uuids)
    assert finding.verdict == verdict, finding.numbers
    assert finding.learnt == {"name-like keys": 0.9, "UUID keys": 0.9}


@pytest.mark.parametrize("uuids", [(0.1, 0.2, 0.3), (0.0, 0.0, 0.0)])
def test_what_was_not_learnt_says_nothing_on_capacity(uuids):
    assert capacity((0.1, 0.2, 0.3), uuids).verdict != Verdict.UNDECIDED
    # Of smaller numbers it does not matter
    assert capacity((0.1, 0.2, 0.3), uuids, LEARNT | {"n0": 0.1, "u1": 0.1}).verdict != Verdict.UNDECIDED
    finding = capacity((0.1, 0.2, 0.3), uuids, {"n2": 0.9, "u2": 0.49})
    assert finding.verdict == Verdict.UNDECIDED
    assert finding.rule.endswith("Learnt of 10,000 facts were only 49.0% of those with UUID keys.")


@pytest.mark.parametrize(
    ("known", "names", "pseudo", "uuid", "verdict"),
    [
        (0.02, 0.3, 0.3, 0.25, Verdict.SUPPORTED),
        (0.02, 0.3, 0.03, 0.02, Verdict.CONTRADICTED),
        (0.3, 0.3, 0.3, 0.3, Verdict.UNDECIDED),  # Known facts alone cost as much
        (0.02, 0.3, 0.6, 0.02, Verdict.UNDECIDED),  # each kind for itself, not their mean
        (0.02, 0.3, 0.02, 0.2, Verdict.UNDECIDED),
        (0.02, 0.3, 0.17, 0.17, Verdict.UNDECIDED),  # just above half
        (0.02, 0.02, 0.3, 0.3, Verdict.UNDECIDED),  # there is nothing that names could explain
    ],
)
def test_behaviour_cloning_needs_a_loss_of_each_kind_without_overlap(known, names, pseudo, uuid, verdict):
    losses = table(known=known, names=names, pseudo=pseudo, uuid=uuid)
    kinds = {"pseudo-word keys": "pseudo", "UUID keys": "uuid"}
    finding = judge_behaviour_cloning(losses, "known", "names", kinds, LEARNT)
    assert finding.verdict == verdict, finding.numbers
    assert [*finding.learnt] == ["name-like keys", *kinds]


@pytest.mark.parametrize(
    ("known", "shares", "verdict"),
    [
        (0.0, (0.02, 0.1, 0.2), Verdict.SUPPORTED),
        (0.3, (0.3, 0.34, 0.38), Verdict.SUPPORTED),  # all that new facts cost is slope
        (0.0, (0.3, 0.34, 0.38), Verdict.CONTRADICTED),
        (0.0, (0.3, 0.4, 0.5), Verdict.CONTRADICTED),  # 0.3 of 0.5 are lost without overlap
        (0.0, (0.22, 0.32, 0.42), Verdict.UNDECIDED),  # about half
        (0.0, (0.2, 0.2, 0.2), Verdict.CONTRADICTED),
        (0.0, (0.3, 0.2, 0.1), Verdict.CONTRADICTED),
        (0.2, (0.2, 0.2, 0.2), Verdict.UNDECIDED),  # new facts cost nothing
        (0.0, (0.0, 0.0, 0.005), Verdict.UNDECIDED),
        (0.3, (0.1, 0.2, 0.3), Verdict.UNDECIDED),  # a slope, but full overlap costs nothing
    ],
)
def test_interference_needs_a_slope_that_is_most_of_what_full_overlap_costs(known, shares, verdict):
    losses = table(known=known, **{f"o{i}": share for i, share in enumerate(shares)})
    finding = judge_interference(losses, "known", [0.0, 0.5, 1.0], ["o0", "o1", "o2"], LEARNT)
    assert finding.verdict == verdict, finding.numbers
    slope, whole, surplus = finding.numbers.values()
    line = np.polyfit([0.0, 0.5, 1.0], np.array(shares) - known, 1)
    assert slope.value == pytest.approx(line[0], abs=1e-9) and whole.value == pytest.approx(line.sum(), abs=1e-9)
    assert surplus.value == pytest.approx(slope.value - 0.5 * whole.value) and len(finding.learnt) == 3


def seeds_of(*effects: float, losses: float, num_facts: int = 400) -> np.ndarray:
    """A share of facts lost, more or less of them under each seed."""
    return np.concatenate([losing(losses + effect, num_facts) for effect in effects])


def test_a_verdict_needs_seeds_that_agree():
    """The mean slope is the same; it is a verdict if the seeds agree on it, not if one of three has all of it."""
    agreeing = {"known": seeds_of(0, 0, 0, losses=0.02), "a": seeds_of(0, 0, 0, losses=0.02)}
    for effects, verdict in (((-0.01, 0, 0.01), Verdict.SUPPORTED), ((-0.18, -0.18, 0.36), Verdict.UNDECIDED)):
        losses = LossTable(agreeing | {"b": seeds_of(*effects, losses=0.2)})
        finding = judge_interference(losses, "known", [0.0, 1.0], ["a", "b"], LEARNT)
        assert finding.verdict == verdict, finding.numbers
        assert finding.numbers["slope of the loss from overlap 0 to 1"].value == pytest.approx(0.18)


@pytest.mark.parametrize(("num_seeds", "seed_effect"), [(1, 0.0), (3, 0.0), (3, 0.05)])
def test_the_interval_of_a_slope_covers_it_as_often_as_it_says(num_seeds, seed_effect):
    """Facts that are lost with a probability of 0.3 + 0.2 overlap, more or less under a seed; 95 % should hold 0.2."""
    generator = np.random.default_rng(0)
    overlaps = np.linspace(0, 1, 4)
    held = 0
    for _ in range(500):
        effects = seed_effect * generator.normal(size=(4, num_seeds, 1))
        chances = 0.3 + 0.2 * overlaps[:, None, None] + effects
        drawn = (generator.random((4, num_seeds, 150)) < chances).astype(float)
        losses = LossTable(dict(zip("abcd", drawn, strict=True)))
        slope = random_effects_interval(losses.slope([*"abcd"], overlaps))
        held += slope.low <= 0.2 <= slope.high
    assert held >= 465


def test_facts_are_paired():
    """Two runs that lose the same facts differ by nothing for sure."""
    same = LossTable({"a": losing(0.3), "b": losing(0.3)})
    assert random_effects_interval(same.beyond("a", "b")) == (0, 0, 0) and same.loss("a").high > 0.32
    assert least_squares_slope(np.array([0, 1, 2]), np.array([[1, 2, 3], [0, 0, 0]])).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"the same seeds and facts in each run, got shapes {'a': \(1, 400\), 'b'"):
        LossTable({"a": losing(0.3), "b": np.zeros((1, 3))})


def test_every_run_is_made_once():
    study = MechanismArguments()
    runs = conditions_of(study)
    assert len({run.name for run in runs}) == len(runs) == 14
    assert runs[0].num_facts == 0
    assert [condition_of_overlap(300, x).keys for x in (0.0, 0.5, 1.0)] == ["pseudo", "overlap", "recombined"]
    assert sum(run.self_distillation for run in runs) == 1
    assert {run.label for run in runs if run.probe} == {
        "Known facts only",
        "name-like keys",
        "UUID keys",
        "name-like keys, self-distillation",
    }
    without = conditions_of(MechanismArguments(uuid_values=False))
    assert {run for run in runs if run.values == "uuid"} == {*runs} - {*without}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(overlaps=[0.0, 1.5]), r"`overlaps` are shares of tokens in \[0, 1\], got 1.5"),
        (dict(overlaps=[0.5]), "`overlaps` needs at least 2 different values"),
        (dict(num_synthetic_facts=[10]), "`num_synthetic_facts` needs at least 2"),
        (dict(num_synthetic_facts=[0, 10]), "at least 1, got 0"),
        (dict(max_asked_new_facts=0), "`max_asked_new_facts` must be at least 1, got 0"),
        (dict(probe_steps=0), "`probe_steps` must be at least 1, got 0"),
        (dict(max_probed_facts=-1), "`max_probed_facts` must be at least 1, got -1"),
        (dict(overlaps=[0.3333331, 0.3333332]), "`overlaps` must hold different values, to six digits"),
        (dict(seeds=[0, -1]), "`seeds` must be from 0 to 2"),
        (dict(seeds=[]), "`seeds` needs at least 1"),
        (dict(seeds=[1, 1]), "`seeds` needs at least 1 different values, none twice"),
    ],
)
def test_mistakes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MechanismArguments(**options)


def run_study(output: Path, *flags: str) -> None:
    run_script("mechanism_study.py", "--preset", "tiny", "--output_dir", output, *flags)


def start_study(folder: Path) -> tuple[Path, str]:
    """Runs it as a user would; returns its folder and what it printed."""
    command = [sys.executable, SCRIPTS / "mechanism_study.py", "--preset", "tiny", "--output_dir", folder / "study"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "study", done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id):
    return made_once(tmp_path_factory, worker_id, "mechanism", start_study)


def test_the_report_says_what_was_measured(finished):
    output, stdout = finished
    report = (output / "report.md").read_text()
    results = json.loads((output / "results.json").read_text())
    assert report.split("![")[0].strip() in stdout
    study = MechanismArguments(num_synthetic_facts=[20, 60], num_facts_of_overlap=60, overlaps=[0.0, 0.5, 1.0])
    assert [*results["runs"]] == [run.name for run in conditions_of(study)]
    for name, run in results["runs"].items():
        found = read_experiment(output / "runs" / f"{name}-seed0")
        before, after = (found.records[i].accuracy("heldout") for i in (0, -1))
        assert run["lost"]["value"] == pytest.approx(before - after) == pytest.approx(losses_of([found]).mean())
        assert f"| {run['lost']['value']:.3f} [" in report
        assert run["seconds_per_step"] > 0 and run["peak_memory_bytes"] > 2**20
        assert not [*(output / "runs" / f"{name}-seed0").glob("*.safetensors")]
    for finding in results["findings"]:
        assert f"## {finding['hypothesis'].capitalize()}: {finding['verdict']} (one seed)" in report
    assert "nothing is known about other seeds" in report
    for image in ("capacity", "overlap", "drift", "tradeoff"):
        assert f"({image}.png)" in report and Image.open(output / f"{image}.png").width > 800
    assert "small Llama (width 64, 2 layers)" in report


def test_runs_differ_in_their_facts_only(finished):
    output, _ = finished
    runs = {path.name: json.loads((path / "run.json").read_text()) for path in (output / "runs").iterdir()}
    middle = [run for name, run in runs.items() if "-60-seed0" in name]
    assert len(middle) == 6 and len({json.dumps(run["arguments"]["config"]) for run in middle}) == 1
    known = {json.dumps(run["inputs"], sort_keys=True) for run in runs.values()}
    assert len(known) == 1
    steps = {name: read_experiment(output / "runs" / name).training["steps"] for name in runs}
    assert {steps[name] for name in steps if "-60-" in name or "known-only" in name} == {20}


def test_keys_without_overlap_share_no_token_with_facts_that_are_kept(finished):
    output, _ = finished
    inputs = MechanismInputs(str(output / "stage1"), output / "annotated/facts.jsonl", output / "mix", None)
    _, tokenizer = load_model_and_tokenizer(inputs.model)
    study, pseudo = MechanismArguments(), Condition(60, "pseudo")
    kept = [*load_facts(output / "mix/heldout.jsonl"), *load_facts(output / "mix/known.jsonl")]
    names = sorted({fact[column] for fact in kept for column in ("subject", "answer")})
    keys = [fact["subject"] for fact in facts_of(pseudo, 0, study, inputs, tokenizer)]
    of_names, of_keys = (
        {token for ids in tokenizer([f" {text}" for text in texts])["input_ids"] for token in ids}
        for texts in (names, keys)
    )
    assert not of_names & of_keys - {*tokenizer("")["input_ids"]}


def test_only_runs_whose_keys_are_others_than_before_are_made_anew(finished):
    """Keys of names' tokens and UUIDs do not depend on what others are kept apart from; nor do their runs."""
    for path in (finished[0] / "runs").glob("*/run.json"):
        about = json.loads(path.read_text())["arguments"]["about"]
        assert ("keys_apart_from" in about) == path.parent.name.startswith(("pseudo-", "overlap-"))


def test_drift_is_measured_where_it_is_compared(finished):
    output, _ = finished
    probed = {path.parent.name for path in (output / "runs").glob("*/drift.jsonl")}
    assert probed == {
        f"{name}-seed0"
        for name in (
            "known-only",
            "recombined-keys-real-values-60",
            "uuid-keys-real-values-60",
            "recombined-keys-real-values-60-selfdistill",
        )
    }
    for name in probed:
        lines = read_experiment(output / "runs" / name).drift
        assert [line["step"] for line in lines] == [0, 5, 10, 15, 20]
        assert lines[0]["drift_kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["drift_kl"] > 1e-3
        layers = {part for name in lines[0] for part in name.split("/") if part.startswith("layer_")}
        assert layers == {"layer_2"}  # `probe_layers` of the preset


def test_the_small_llama_knows_its_facts_and_splits_names(finished):
    output, _ = finished
    categories = load_facts(output / "annotated/facts.jsonl")["slick_category"]
    assert categories.count("HighlyKnown") / len(categories) > 0.8
    _, tokenizer = load_model_and_tokenizer(output / "model")
    names = load_facts(output / "facts/facts.jsonl")["subject"]
    lengths = [len(tokenizer(f" {name}")["input_ids"]) for name in names]
    assert 1.5 < np.mean(lengths) < 4
    text = "Q: Which country is São Paulo located in?\nA: Brazil"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert token_overlap([1, 2], {2}) == 0.5


def test_nothing_is_done_twice_and_a_further_size_is_added(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "study")
    before = {path.parent.name: path.read_bytes() for path in (tmp_path / "study/runs").glob("*/run.json")}
    run_study(tmp_path / "study", "--num_synthetic_facts", "20", "24")
    after = {path.parent.name: path.read_bytes() for path in (tmp_path / "study/runs").glob("*/run.json")}
    assert all(after[name] == run for name, run in before.items())
    assert after.keys() - before.keys() == {f"{keys}-keys-real-values-24-seed0" for keys in ("recombined", "uuid")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_synthetic_facts", "20", "900000000"], "num_facts=900000000 keys need more distinct tokens"),
        (["--synthetic_relation", "P38"], "`synthetic_relation='P38'`: no HighlyKnown fact of it is held out"),
        (["--overlaps", "0", "2"], "got 2.0"),
        (["--num_known", "5000"], "`num_known=5000`, but the relations P17 give"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_run(finished, tmp_path, flags, message):
    shutil.copytree(finished[0], tmp_path / "study", ignore=shutil.ignore_patterns("runs"))
    with pytest.raises(ValueError, match=message):
        run_study(tmp_path / "study", *flags)
    assert not (tmp_path / "study/runs").exists()


def test_a_small_llama_that_does_not_learn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_pretraining_epochs=1`: the small Llama answers"):
        run_study(tmp_path / "study", "--max_pretraining_epochs", "1")
    assert not (tmp_path / "study/model").exists()


def test_conditions_have_names_for_readers():
    assert Condition(10, "overlap", "uuid", 0.25).label == "keys with overlap 0.25, UUID values"
    assert Condition(10, self_distillation=True).name == "recombined-keys-real-values-10-selfdistill"
