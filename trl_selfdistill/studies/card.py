# SPDX-License-Identifier: Apache-2.0
"""The model card of an arm of the study: how it was trained, and what it kept, learnt and made up, with intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..hallucination.bootstrap import Interval, mean_interval
from ..hub.environment import describe_environment
from ..hub.metadata import license_of, method_of
from ..hub.model_card import update_model_card, weights_sha256
from .fact_accuracy import AccuracyRecord
from .report import ArmResult, render_findings, render_table
from .stage import RUN_FILE


_METRICS = (
    ("factual_stability", "Stability", "higher", "heldout", "Held-out HighlyKnown facts"),
    ("factual_plasticity", "Plasticity", "higher", "new", "New facts"),
    ("hallucination_rate", "Hallucination rate", "lower", "heldout", "Held-out HighlyKnown facts"),
)


def write_model_card(arm: ArmResult, arms: list[ArmResult], folder: Path) -> Path:
    """
    Writes the card into an arm's `folder` and returns its path.

    Args:
        arm ([`~trl_selfdistill.studies.report.ArmResult`]):
            The arm whose checkpoint `folder` holds.
        arms (`list[ArmResult]`):
            All arms of the table, the baseline first; `[arm]` before there are others.
        folder (`Path`):
            The checkpoint, with its `run.json`, and `curves.png` if there is one.
    """
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    environment = {name: run[name] for name in describe_environment().keys() & run.keys()}
    base_model = arm.training["origin"]
    training = {name: value for name, value in arm.training.items() if name not in ("log_history", "origin")}
    training |= {"base_model": base_model, "environment": environment}
    training["license"] = license_of(base_model) or training.get("license")
    results = {
        "arm": arm.label,
        "weights_sha256": weights_sha256(folder),
        "metrics": measure(arm, arms),
        "table": render_table(arms),
        "findings": render_findings(arms),
        "num_facts": arm.summary()["num_facts"],
    }
    return update_model_card(folder, training=training, results=results)


def measure(arm: ArmResult, arms: list[ArmResult]) -> list[dict[str, Any]]:
    """
    Stability, plasticity and hallucination rate at the end of an arm, of the base model and of plain SFT, and the
    differences: each a fraction with its 95 % bootstrap interval over facts, paired where two models are compared.
    """
    end = arm.records[-1]
    sft = next((other for other in arms if method_of(other.training) == "sft" and other is not arm), None)
    others = {"base": arm.base} | ({"sft": sft.records[-1]} if sft is not None else {})
    metrics = []
    for metric, name, better, split, facts in _METRICS:
        ours = _values(metric, end, split)
        row = {"type": metric, "name": name, "better": better, "split": split, "facts": facts, "num_facts": len(ours)}
        row["model"] = _rate(ours)
        for other, record in others.items():
            row[other] = _rate(_values(metric, record, split))
            row[f"minus_{other}"] = mean_interval(ours - _values(metric, record, split))._asdict()
        metrics.append(row)
    return metrics


def _values(metric: str, record: AccuracyRecord, split: str) -> np.ndarray:
    """1 for each fact that counts in the rate, else 0, in the order of the facts' ids."""
    correct = record.correct[split]
    right = np.array([correct[fact_id] for fact_id in sorted(correct)], dtype=np.float64)
    return 1.0 - right if metric == "hallucination_rate" else right


def _rate(values: np.ndarray) -> dict[str, float]:
    interval: Interval = mean_interval(values)
    return interval._asdict()
