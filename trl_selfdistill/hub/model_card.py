# SPDX-License-Identifier: Apache-2.0
"""
The card of a checkpoint, rendered from `model_card.json` beside it: `training`, which the trainers write whenever they
save, and `results` of a study and `check`, for as long as the weights are those that they were measured on.
"""

import hashlib
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import read_json, warn_without, write_json, written_whole
from ..hallucination.metric import SlickCategory


CARD_FILE = "README.md"
RECORD_FILE = "model_card.json"
TAGS = ["trl-selfdistill", "hallucination", "factual-forgetting", "arxiv:2604.15574", "arxiv:2405.05904"]


def update_model_card(folder: Path, **parts: dict[str, Any]) -> Path:
    """Replaces `training`, `results` or `check` (JSON values) in the record in `folder`, and renders the card anew."""
    record = {**read_record(folder), **parts}
    for name in {"results", "check"} & {*record}:
        if record[name].get("weights_sha256") != weights_sha256(folder):
            del record[name]  # measured on other weights
    with warn_without(folder / RECORD_FILE):
        write_json(folder / RECORD_FILE, record)
    with written_whole(folder / CARD_FILE) as partial:
        render_model_card(record).save(partial)
    return folder / CARD_FILE


def add_check(folder: Path, section: str) -> Path:
    """
    Puts the Markdown of a check into the card of the model in `folder`, in place of an earlier one, and returns its
    path. Any other card than the one that belongs to a record keeps its text, and the section stands at its end.
    """
    if (folder / RECORD_FILE).is_file():
        return update_model_card(folder, check={"weights_sha256": weights_sha256(folder), "section": section})
    card, begin, end = folder / CARD_FILE, "<!-- trl-selfdistill check -->", "<!-- end of the check -->"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    others = re.sub(f"{begin}(.*?{end})?", "", text, flags=re.DOTALL).strip()
    with written_whole(card) as partial:
        text = f"{others}\n\n{begin}\n{section.strip()}\n{end}\n".lstrip()
        partial.write_text(text, encoding="utf-8", newline="\n")
    return card


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside a card; empty if there is none, and with a warning if it cannot be read."""
    path = folder / RECORD_FILE
    with warn_without(path):
        record = read_json(path) if path.exists() else {}
        return {name: dict(part) for name, part in record.items()}
    return {}


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights (`*.safetensors`) in `folder`, or else of PEFT adapters with names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*/adapter_model.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def render_model_card(record: dict[str, Any]) -> ModelCard:
    """The card of a record. Texts in `training` are escaped; the tables and findings in `results` are Markdown."""
    training, results = record.get("training", {}), record.get("results")
    method, base_model = method_of(training), training.get("base_model")
    name = base_model.split("/")[-1] if base_model else "Local model"
    title = f"{name}: {results['variant'] if results else method}"
    is_adapter = training.get("is_adapter", False)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter" if is_adapter else "finetune",
        datasets=[training["dataset_name"]] if training.get("dataset_name") else None,
        license=training.get("license"),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["trl", "sft", method, *TAGS, *training.get("tags", [])],
        model_name=title,
        eval_results=[EvalResult(**metric) for metric in results["metrics"]] if results else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / "model_card_template.md"),
        title=escape_markdown(title),
        variant=escape_markdown(results["variant"]) if results else None,
        method=method,
        training=_escaped(training),
        environment=training.get("environment"),
        results=results,
        check=record.get("check"),
        categories=[*SlickCategory],
    )


def escape_markdown(value: object) -> str:
    """A value for a line or a cell of Markdown: nothing in it can end the cell, or become HTML, a link or an image."""
    text = ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
    text = html.escape(text, quote=False)
    for character in "`*[]":
        text = text.replace(character, f"&#{ord(character)};")
    return " ".join(text.replace("|", "\\|").split())


def _escaped(value: Any) -> Any:
    """A JSON value whose texts and numbers are text that is safe in Markdown."""
    if isinstance(value, dict):
        return {escape_markdown(name): _escaped(item) for name, item in value.items()}
    return value if value is None or isinstance(value, bool) else escape_markdown(value)


def method_of(training: dict[str, Any]) -> str:
    """How a model was trained, as a tag of its card. `SelfDistillSFTTrainer` without a teacher is plain SFT."""
    if training.get("teacher"):
        return "self-distill-sft"
    return "frozen-groups-sft" if training.get("groups") else "sft"


def hub_id(name: Any) -> str | None:
    """`name` if it can be a repository of the Hub, and is not a file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or not name.isascii() or Path(name).exists() else name


def base_model_of(name_or_path: str | None) -> dict[str, str | None]:
    """`base_model` (a Hub id) and `license` of a model on the Hub or, by its card, in a folder; `None` if unknown."""
    base_model, license = hub_id(name_or_path), None
    card = Path(name_or_path or "", CARD_FILE)
    if name_or_path and card.is_file():
        with warn_without(card):
            data = ModelCard.load(card, ignore_metadata_errors=True).data
            named, license = data.get("base_model"), data.get("license")
            base_model = hub_id(named[0] if isinstance(named, list) and named else named)
    return {"base_model": base_model, "license": license if isinstance(license, str) else None}
