# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint, rendered from a record beside it.

Everything that a card says is in `model_card.json`, in three parts: `training` (written by the trainers whenever they
save), `results` (by the report) and `publication` (on the way to the Hub). Each writer replaces its own part and the
card is rendered anew, so that none undoes what another wrote. Results count for the weights they were measured on.
"""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, eval_result_entries_to_yaml

from ..hallucination.intervals import Interval
from .environment import portable_command
from .markdown import escape_markdown, format_interval
from .metadata import card_data, eval_result_entries, hub_id, method_of, title_of


CARD_FILE = "README.md"
RECORD_FILE = "model_card.json"
EVAL_RESULTS_FILE = ".eval_results/facts.yaml"
FIGURE_FILE = "curves.png"
TEMPLATES = files("trl_selfdistill.hub") / "templates"
CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
_SYMBOLS = {
    "kl_weight": "kl_weight (λ)",
    "temperature": "temperature (τ)",
    "rehearsal_rows": "rehearsal_rows (the model's own answers among the training rows)",
}


def update_model_card(folder: Path, **parts: dict[str, Any] | None) -> Path:
    """
    Replaces parts of the record in `folder` and writes its card, and its results for the Hub, anew.

    Args:
        folder (`Path`):
            The checkpoint. A `curves.png` in it is shown in the card.
        parts (`dict[str, Any]`):
            `training`, `results`, `publication`, each with JSON values.

    Returns:
        `Path`: The card, `folder/README.md`.
    """
    record = {**read_record(folder), **parts}
    if record.get("results") and record["results"].get("weights_sha256") != weights_sha256(folder):
        del record["results"]  # trained on since: they are of other weights
    contents = card_files(record, has_figure=(folder / FIGURE_FILE).is_file())
    if EVAL_RESULTS_FILE not in contents:
        (folder / EVAL_RESULTS_FILE).unlink(missing_ok=True)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / CARD_FILE


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside a card, empty if there is none."""
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of the weights in `folder`, `None` without any."""
    digest, paths = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if paths else None


def card_files(record: dict[str, Any], has_figure: bool) -> dict[str, bytes]:
    """The files of a record, by name: the card, the record itself and, with results, those for the Hub."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    contents = {CARD_FILE: str(render_model_card(record, has_figure)), RECORD_FILE: text}
    if record.get("results"):
        entries = eval_result_entries_to_yaml(eval_result_entries(record))
        contents[EVAL_RESULTS_FILE] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    return {name: content.encode() for name, content in contents.items()}


def render_model_card(record: dict[str, Any], has_figure: bool = False) -> ModelCard:
    """Renders the template. Every value of the run is escaped; the tables of the report are Markdown already."""
    training, results = record.get("training") or {}, record.get("results")
    environment = training.get("environment") or {}
    versions = ", ".join(f"{name} {value}" for name, value in environment.get("versions", {}).items())
    settings = {_SYMBOLS.get(name, name): value for name, value in training.get("settings", {}).items()}
    teacher = training.get("teacher")
    return ModelCard.from_template(
        card_data(record),
        template_path=str(TEMPLATES / "model_card_template.md"),
        title=escape_markdown(title_of(record)),
        base_model=hub_id((record.get("publication") or {}).get("base_model") or training.get("base_model")),
        method=method_of(training),
        settings={escape_markdown(name): escape_markdown(value) for name, value in settings.items()},
        teacher=teacher and {name: escape_markdown(value) for name, value in teacher.items()},
        groups=_group_rows(training.get("groups")),
        composition=_composition_rows(training.get("composition") or {}),
        dataset_name=hub_id(training.get("dataset_name")),
        splits=training.get("splits", []),
        num_facts=(results or {}).get("num_facts", {}),
        new_facts=escape_markdown(training.get("mix", {}).get("mix", {}).get("new_facts", "")),
        results=results,
        metric_rows=_metric_rows(results["metrics"]) if results else [],
        has_figure=has_figure and results is not None,
        command=portable_command(environment["command"]) if environment else None,
        environment=escape_markdown(f"{environment['date'][:10]}, {environment['machine']}. {versions}.")
        if environment
        else None,
        seed=escape_markdown(settings.get("seed", "not recorded")),
    )


def _metric_rows(metrics: list[dict[str, Any]]) -> list[list[str]]:
    """The header and a row for each metric; a comparison that no metric has is left out."""
    columns = {
        "model": "this model",
        "base": "base model",
        "sft": "plain SFT",
        "minus_base": "difference from the base",
        "minus_sft": "difference from plain SFT",
    }
    columns = {name: title for name, title in columns.items() if any(metric.get(name) for metric in metrics)}
    rows = [["fraction in [0, 1], 95 % interval", *columns.values()]]
    for metric in metrics:
        cells = (format_interval(Interval(**metric[name]), signed=name.startswith("minus")) for name in columns)
        rows.append([f"{escape_markdown(metric['name'])} {'↑' if metric['better'] == 'higher' else '↓'}", *cells])
    return rows


def _group_rows(groups: dict[str, Any] | None) -> list[list[str]]:
    """A row for each group of parameters: its size, how much of it was trained, the hash of the frozen part."""
    rows = (groups or {}).get("groups", {})
    return [
        [
            escape_markdown(name),
            f"{row['parameters']:,}",
            f"{row['trainable_parameters']:,}",
            row["frozen_sha256"] or "-",
        ]
        for name, row in rows.items()
    ]


def _composition_rows(composition: dict[str, dict[str, int]]) -> list[list[str]]:
    """A row for each split, with its facts in each SLiCK category and those that have none."""
    rows = []
    for split, counts in composition.items():
        known = [counts.get(category, 0) for category in CATEGORIES]
        rows.append([escape_markdown(split), *map(str, [*known, sum(counts.values()) - sum(known)])])
    return rows
