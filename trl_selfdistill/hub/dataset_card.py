# SPDX-License-Identifier: Apache-2.0
"""The dataset card of a study's facts: annotated by SLiCK category, and split into known, new and held out."""

import json
from collections import Counter
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from .environment import describe_environment, portable_command
from .markdown import escape_markdown
from .model_card import CATEGORIES, TEMPLATES


def render_dataset_card(
    splits: dict[str, dict[str, Path]], repo_id: str, license: str, base_model: str | None, settings: dict
) -> DatasetCard:
    """
    Renders the card of JSONL files of facts. Every value that comes from the facts or the run is escaped.

    Args:
        splits (`dict[str, dict[str, Path]]`):
            For each configuration (`annotated`, `mix`) its splits, each a JSONL file with a column `slick_category`.
        repo_id (`str`):
            The repository on the Hub.
        license (`str`):
            Licence of the facts.
        base_model (`str`, *optional*):
            Hub id of the model that was asked.
        settings (`dict`):
            How it was asked, by name.
    """
    configs, rows = [], []
    for config, files in splits.items():
        configs.append(
            {
                "config_name": config,
                "data_files": [{"split": split, "path": f"{config}/{path.name}"} for split, path in files.items()],
            }
        )
        rows += [[config, split, *_counts(path)] for split, path in files.items()]
    total = sum(row[-1] for row in rows)
    data = DatasetCardData(
        language="en",
        license=license,
        task_categories=["question-answering"],
        size_categories=next(size for limit, size in _SIZES if total < limit),
        tags=["trl-selfdistill", "slick", "hallucination", "arxiv:2405.05904", "arxiv:2604.15574"],
        pretty_name=repo_id.split("/")[-1],
        configs=configs,
    )
    environment = describe_environment()
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATES / "dataset_card_template.md"),
        title=escape_markdown(repo_id.split("/")[-1]),
        repo_id=repo_id,
        base_model=base_model,
        categories=CATEGORIES,
        rows=[[escape_markdown(cell) for cell in row] for row in rows],
        settings={escape_markdown(name): escape_markdown(value) for name, value in settings.items()},
        config=next(iter(splits)),
        command=portable_command(environment["command"]),
    )


_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (float("inf"), "n>1M"),
)


def _counts(path: Path) -> list[int]:
    """How many facts of a file are of each category, and how many there are."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = Counter(line.get("slick_category") for line in lines)
    return [*(counts[category] for category in CATEGORIES), len(lines)]
