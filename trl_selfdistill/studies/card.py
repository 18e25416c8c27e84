# SPDX-License-Identifier: Apache-2.0
"""The model card of a variant of the study: how it was trained, and what it kept, learnt and made up."""

from pathlib import Path

from ..files import read_json
from ..hallucination.intervals import mean_interval
from ..hallucination.metric import RATES
from ..hub.environment import describe_environment
from ..hub.model_card import method_of, update_model_card, weights_sha256
from .fact_accuracy import AccuracyRecord
from .markdown import format_interval, markdown_table
from .results import VariantResult, render_findings, render_table
from .stage import RUN_FILE


# Name and type of each metric, its split, and the outcome of which it is the share
_METRICS = (
    ("Stability ↑", "factual_stability", "heldout", RATES["accuracy"]),
    ("Plasticity ↑", "factual_plasticity", "new", RATES["accuracy"]),
    ("Hallucination rate ↓", "hallucination_rate", "heldout", RATES["hallucination_rate"]),
    ("Abstention rate", "abstention_rate", "heldout", RATES["abstention_rate"]),
)


def write_model_card(variant: VariantResult, variants: list[VariantResult], folder: Path) -> Path:
    """
    Writes the card of `variant`, compared with all `variants`, the baseline first, into the `folder` of its
    checkpoint, run.json and, if there is one, curves.png. Returns its path.
    """
    run = read_json(folder / RUN_FILE)
    training = {name: value for name, value in variant.training.items() if name != "log_history"}
    training["environment"] = {name: run[name] for name in describe_environment()}
    results = {
        "variant": variant.title,
        "weights_sha256": weights_sha256(folder),
        "metrics": _eval_results(variant.records[-1]),
        "metrics_table": render_metrics(variant, variants),
        "table": render_table(variants),
        "findings": render_findings(variants),
        "num_facts": variant.summary()["num_facts"],
        "has_before": variant.before is not None,
        "base_prompts": variant.base and variant.base.prompts,
        "has_figure": (folder / "curves.png").is_file(),
    }
    return update_model_card(folder, training=training, results=results)


def render_metrics(variant: VariantResult, variants: list[VariantResult]) -> str:
    """The metrics at the end of a variant, of others that it is compared with, and the differences, fact by fact."""
    others = {"the base": variant.base, "before": variant.before}
    others = {name: record for name, record in others.items() if record is not None}
    if sft := [other for other in variants if method_of(other.training) == "sft" and other is not variant]:
        others["plain SFT"] = sft[0].records[-1]
    header = ["fraction in [0, 1], 95 % interval", "this model", *others]
    header += [f"difference from {name}" for name in others]
    rows = []
    for name, _, split, outcome in _METRICS:
        ours = variant.records[-1].outcomes(split, outcome)
        theirs = [r.outcomes(split, outcome) if split in r.answers else None for r in others.values()]
        rates = ["-" if v is None else format_interval(mean_interval(v.astype(bool))) for v in (ours, *theirs)]
        changes = ["-" if v is None else format_interval(mean_interval(ours - v), signed=True) for v in theirs]
        rows.append([name, *rates, *changes])
    return markdown_table(header, rows)


def _eval_results(end: AccuracyRecord) -> list[dict]:
    """The arguments of a [`~huggingface_hub.EvalResult`] for each metric, for the card's metadata."""
    return [
        {
            "task_type": "text-generation",
            "dataset_type": "trl-selfdistill/unpublished-facts",
            "dataset_name": "Held-out HighlyKnown facts" if split == "heldout" else "New facts",
            "dataset_split": split,
            "metric_type": metric,
            "metric_name": name.rstrip(" ↑↓"),
            "metric_value": round(float(end.outcomes(split, outcome).mean()), 4),
        }
        for name, metric, split, outcome in _METRICS
    ]
