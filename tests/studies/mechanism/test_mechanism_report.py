# SPDX-License-Identifier: Apache-2.0
"""Report, summary and figures of the mechanism study, from made-up runs of several seeds."""

import json

import numpy as np
import pytest
from study_records import answered

from trl_selfdistill.studies.fact_accuracy import AccuracyRecord
from trl_selfdistill.studies.mechanism.report import plot_mechanism, render_mechanism_report, summarise
from trl_selfdistill.studies.mechanism.study import results_of
from trl_selfdistill.studies.mechanism.variants import MechanismArguments, MechanismVariant, mechanism_variants
from trl_selfdistill.studies.results import VariantResult


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
