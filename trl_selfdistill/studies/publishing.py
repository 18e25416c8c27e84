# SPDX-License-Identifier: Apache-2.0
"""How a study goes to the Hub: a repository for each variant, its facts as a dataset, and the command that does it."""

import shlex
from collections import Counter, defaultdict
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from ..files import read_jsonl
from ..hallucination.metric import SlickCategory
from ..hub.model_card import CARD_FILE, TAGS, escape_markdown, read_record
from ..hub.publishing import Publication, PublishError, select_files
from .markdown import markdown_table
from .stage import run_arguments
from .training_mix import SPLITS


def repo_ids(folders: list[Path], repo_id: str) -> dict[str, Path]:
    """The repository of each checkpoint: `repo_id` for one, `repo_id-<folder>` for several of different names."""
    named = {f"{repo_id}-{folder.resolve().name}" if len(folders) > 1 else repo_id: folder for folder in folders}
    if len(named) < len(folders):
        raise PublishError(f"`checkpoints` has two folders of one name: {[*map(str, folders)]}. Rename one.")
    return named


def plan_dataset(
    repo_id: str,
    license: str | None,
    annotated: Path | None = None,
    mix: Path | None = None,
    base_model: str | None = None,
) -> Publication:
    """
    The facts in the folders of `annotate`, `mix` or both, with a card that names `base_model`, the Hub id of the model
    that was asked. A `PublishError` if there are none, or no license, which has no default.
    """
    if license is None:
        raise PublishError("`dataset_license` is not set. Facts of GeoNames are cc-by-4.0; of your own, you decide.")
    paths = [("annotated", "train", annotated / "facts.jsonl")] if annotated else []
    paths += [("mix", split, mix / f"{split}.jsonl") for split in SPLITS] if mix else []
    if not paths:
        raise PublishError("`dataset_repo_id` needs `annotated` or `mix`, the folder of the facts.")
    for config, _, path in paths:
        if path.name not in select_files(path.parent, [path.name]):
            raise PublishError(f"`{config}` is {path.parent}, which holds no {path.name}.")
    data_files, rows = defaultdict(list), []
    for config, split, path in paths:
        data_files[config].append({"split": split, "path": f"{config}/{path.name}"})
        counts = Counter(fact.get("slick_category") for fact in read_jsonl(path))
        rows.append([config, split, *(str(counts[category]) for category in SlickCategory), str(counts.total())])
    data = DatasetCardData(
        language="en",
        license=license,
        task_categories=["question-answering"],
        tags=[*TAGS, "slick"],
        configs=[{"config_name": config, "data_files": splits} for config, splits in data_files.items()],
    )
    settings = run_arguments(annotated).get("slick", {}) if annotated else {}
    cells = [list(map(escape_markdown, setting)) for setting in settings.items()]
    card = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "dataset_card_template.md"),
        repo_id=repo_id,
        base_model=base_model,
        facts_table=markdown_table(["config", "split", *SlickCategory, "facts"], rows),
        settings_table=markdown_table(["setting", "value"], cells) if cells else None,
        config=rows[0][0],
    )
    contents = {f"{config}/{path.name}": path for config, _, path in paths}
    return Publication(repo_id, "dataset", {**contents, CARD_FILE: str(card).encode()})


def publish_command(folders: list[Path]) -> str:
    """The command that publishes finished variants, in repositories named after their base model."""
    base_model = read_record(folders[0]).get("training", {}).get("base_model") or "model"
    words = ["trl-selfdistill", "publish", "--checkpoints", *map(str, folders)]
    return shlex.join([*words, "--repo_id", f"YOUR_NAME/{base_model.split('/')[-1]}-facts"])
