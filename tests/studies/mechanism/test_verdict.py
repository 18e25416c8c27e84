# SPDX-License-Identifier: Apache-2.0
"""The rules of the mechanism study against made-up losses, and its report on made-up runs of several seeds."""

import json

import numpy as np
import pytest
from study_records import answered

from trl_selfdistill.studies.fact_accuracy import AccuracyRecord
from trl_selfdistill.studies.mechanism.report import plot_mechanism, render_mechanism_report, summarise
from trl_selfdistill.studies.mechanism.study import results_of
from trl_selfdistill.studies.mechanism.variants import (
    MechanismArguments,
    MechanismVariant,
    mechanism_variants,
    variant_of_overlap,
)
from trl_selfdistill.studies.mechanism.verdict import (
    judge_behaviour_cloning,
    judge_capacity,
    judge_interference,
)
from trl_selfdistill.studies.results import VariantResult


STUDY = MechanismArguments(num_synthetic_facts=[100, 1000, 10_000], num_facts_of_overlap=300, overlaps=[0.0, 0.5, 1.0])
SIZES = [MechanismVariant(n, keys).name for keys in ("recombined", "uuid") for n in STUDY.num_synthetic_facts]
KEYS = ["known-only", *(MechanismVariant(300, keys).name for keys in ("recombined", "pseudo", "uuid"))]
OVERLAPS = ["known-only", *(variant_of_overlap(300, overlap).name for overlap in STUDY.overlaps)]
ALL = dict.fromkeys(SIZES, 0.9)


def losing(*shares: float) -> np.ndarray:
    """Under each seed that share of 400 facts is lost, the same ones first."""
    return np.array([np.arange(400) < round(share * 400) for share in shares], dtype=float)


def losses_of(names: list[str], shares) -> dict[str, np.ndarray]:
    return {name: losing(share) for name, share in zip(names, shares, strict=True)}


def capacity(name_like, foreign, learnt=ALL):
    return judge_capacity(losses_of(SIZES, (*name_like, *foreign)), STUDY, learnt)


def cloning(*shares):
    return judge_behaviour_cloning(losses_of(KEYS, shares), STUDY)


def interference(*shares):
    return judge_interference(losses_of(OVERLAPS, shares), STUDY)


S, C, U = "supported", "contradicted", "undecided"


@pytest.mark.parametrize(
    ("verdict", "judge", "losses"),
    [
        # Capacity: the losses with name-like and with UUID keys at three sizes
        (S, capacity, [(0.1, 0.2, 0.3), (0.1, 0.2, 0.3)]),  # whatever the keys look like
        # The largest size counts
        (S, capacity, [(0.1, 0.2, 0.3), (0.1, 0.2, 0.3), ALL | {SIZES[0]: 0.1, SIZES[4]: 0.1}]),
        (C, capacity, [(0.1, 0.2, 0.4), (0.02, 0.02, 0.03)]),  # the paper's result
        (U, capacity, [(0.1, 0.2, 0.3), (0.02, 0.07, 0.13)]),  # about half as steep
        (U, capacity, [(0.1, 0.2, 0.3), (0.1, 0.2, 0.3), ALL | {SIZES[5]: 0.49}]),  # not learnt
        # Behaviour cloning: Known facts only, name-like keys, pseudo-words, UUID keys
        (S, cloning, [0.02, 0.3, 0.3, 0.25]),
        (C, cloning, [0.02, 0.3, 0.03, 0.02]),
        (U, cloning, [0.3, 0.3, 0.3, 0.3]),  # Known facts alone cost as much
        (U, cloning, [0.02, 0.3, 0.6, 0.02]),  # each kind for itself, not their mean
        (U, cloning, [0.02, 0.02, 0.3, 0.3]),  # there is nothing that names could explain
        # Interference: Known facts only, and overlaps 0, 0.5 and 1
        (S, interference, [0.0, 0.02, 0.1, 0.2]),
        (S, interference, [0.3, 0.3, 0.34, 0.38]),  # all that new facts cost is slope
        (C, interference, [0.0, 0.3, 0.4, 0.5]),  # 0.3 of 0.5 are lost without overlap
        (U, interference, [0.0, 0.22, 0.32, 0.42]),  # about half
        (U, interference, [0.3, 0.1, 0.2, 0.3]),  # a slope, but full overlap costs nothing
    ],
)
def test_the_rules(verdict, judge, losses):
    finding = judge(*losses)
    assert finding.verdict == verdict, finding.numbers


def test_the_numbers_are_slopes_and_differences():
    name_like, foreign, surplus = capacity((0.1, 0.2, 0.4), (0.02, 0.02, 0.03)).numbers.values()
    assert [name_like.value, foreign.value, surplus.value] == pytest.approx([0.15, 0.005, 0.005 - 0.5 * 0.15])
    differences = [number.value for number in cloning(0.1, 0.3, 0.2, 0.05).numbers.values()]
    assert differences == pytest.approx([0.2, 0.1, 0.1 - 0.1, -0.05, -0.05 - 0.1])
    at_full_overlap, slope, _ = interference(0.1, 0.2, 0.25, 0.5).numbers.values()
    line = np.polyfit([0.0, 0.5, 1.0], [0.1, 0.15, 0.4], 1)
    assert [slope.value, at_full_overlap.value] == pytest.approx([line[0], line.sum()])
    not_learnt = capacity((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), ALL | {SIZES[5]: 0.49})
    assert not_learnt.rule.endswith("Of 10,000 facts with UUID keys, only 49.0% were learnt.")


def test_runs_are_compared_in_pairs_and_a_verdict_needs_seeds_that_agree():
    losses = dict.fromkeys(OVERLAPS, losing(0.3, 0.3, 0.3))
    # Runs that lose the same facts differ by nothing for sure
    numbers = judge_interference(losses, STUDY).numbers
    assert all(number.value == number.low == 0 and number.high < 0.02 for number in numbers.values())
    for shares, verdict in (((0.49, 0.5, 0.51), S), ((0.32, 0.32, 0.86), U)):
        full = losing(*shares)
        losses |= {OVERLAPS[2]: (losses[OVERLAPS[1]] + full) / 2, OVERLAPS[3]: full}
        finding = judge_interference(losses, STUDY)
        assert finding.verdict == verdict, finding.numbers
        assert finding.numbers["slope of the loss from overlap 0 to 1"].value == pytest.approx(0.2)


LAYER = "drift_cosine/layer_1/last_subject_token"


def result(variant: MechanismVariant, seed: int) -> VariantResult:
    """A run after which a tenth of the facts is lost, and a hundredth more for each further seed."""
    before, after = answered("fact", [True] * 100), answered("fact", np.arange(100) >= 10 + seed)
    new = {"new": answered(f"new{seed}", np.arange(10) < 8)} if variant.num_facts else {}
    records = [AccuracyRecord(0, 0.0, {"heldout": before, **new}), AccuracyRecord(5, 1.0, {"heldout": after, **new})]
    training = {"num_steps": 5, "seconds_per_step": 0.5, "rows_per_step": 8}
    drift = [{"step": step, "epoch": step / 5, LAYER: step * (1 + seed)} for step in (0, 5)] if variant.probe else []
    return VariantResult(variant.name, records, training, drift)


@pytest.mark.parametrize(("num_seeds", "beside"), [(1, " (one seed)"), (2, " (two seeds)"), (3, "")])
def test_all_seeds_are_in_the_report_and_the_summary(num_seeds, beside, tmp_path):
    study = MechanismArguments()
    runs = {run: [result(run, seed) for seed in range(num_seeds)] for run in mechanism_variants(study)}
    results = results_of(study, runs)
    report, summary = render_mechanism_report(results, "a model"), json.loads(json.dumps(summarise(results)))
    for finding in summary["findings"]:
        assert f"## {finding['hypothesis'].capitalize()}: {finding['verdict']}{beside}\n" in report
    assert ("nothing is known about other seeds" in report) == (num_seeds == 1)
    assert (f"random-effects model of {num_seeds} seeds" in report) == (num_seeds > 1)
    assert "| 0.800 " in report
    mean_loss = np.mean([0.1 + 0.01 * seed for seed in range(num_seeds)])
    for run in summary["runs"].values():
        assert run["lost"]["value"] == pytest.approx(mean_loss)
    drift = summary["runs"]["known-only"]["drift"]
    assert [lines[-1][LAYER] for lines in drift] == [5 * (1 + seed) for seed in range(num_seeds)]
    assert f"{np.mean([5 * (1 + seed) for seed in range(num_seeds)]):.4f}" in report
    assert len(plot_mechanism(results, study, "a model", tmp_path)) == 3
