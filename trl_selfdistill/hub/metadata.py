# SPDX-License-Identifier: Apache-2.0
"""What the Hub reads of a model card: its metadata, the results, and names that are valid there.

A record is the content of `model_card.json` (see `model_card`).
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


TAGS = ["trl-selfdistill", "hallucination", "factual-forgetting", "arxiv:2604.15574", "arxiv:2405.05904"]
# The licence of a fine-tuned model is that of its base. Where it is not known, the publisher has to say it
_LICENSES = {
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-0.5B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-1.5B": "apache-2.0",
    "Qwen/Qwen2.5-1.5B-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-7B": "apache-2.0",
    "meta-llama/Llama-3.1-8B": "llama3.1",
}


def card_data(record: dict[str, Any]) -> ModelCardData:
    """The metadata of a card. Names that are no Hub ids are left out."""
    training, results, publication = (record.get(part) or {} for part in ("training", "results", "publication"))
    base_model = hub_id(publication.get("base_model") or training.get("base_model"))
    relation = "adapter" if training.get("is_adapter") else "finetune"
    datasets = [hub_id(name) for name in (training.get("dataset_name"), publication.get("dataset_id"))]
    extra = {"model_name": title_of(record), "eval_results": _eval_results(record)} if results else {}
    return ModelCardData(
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=list(dict.fromkeys(name for name in datasets if name)) or None,
        license=publication.get("license") or training.get("license"),
        library_name="peft" if training.get("is_adapter") else "transformers",
        pipeline_tag="text-generation",
        language="en",
        metrics=["exact_match", publication.get("metric_id") or "hallucination"] if results else None,
        tags=["trl", method_of(training), *TAGS, *training.get("tags", [])],
        **extra,
    )


def _eval_results(record: dict[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Closed-book question answering",
            dataset_type=_dataset_id(record),
            dataset_name=metric["facts"],
            dataset_split=metric["split"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=round(metric["model"]["value"], 4),
        )
        for metric in record["results"]["metrics"]
    ]


def eval_result_entries(record: dict[str, Any]) -> list[EvalResultEntry]:
    """The results of a record, as `.eval_results/*.yaml` holds them."""
    is_published = hub_id((record.get("publication") or {}).get("dataset_id")) is not None
    where = "" if is_published else " The facts are not on the Hub."
    return [
        EvalResultEntry(
            dataset_id=_dataset_id(record),
            task_id=metric["type"],
            value=round(metric["model"]["value"], 4),
            date=record["training"]["environment"]["date"],
            notes=f"{metric['name']}, greedy and zero-shot, n = {metric['num_facts']}, 95 % bootstrap interval "
            f"[{metric['model']['low']:.3f}, {metric['model']['high']:.3f}].{where}",
        )
        for metric in record["results"]["metrics"]
    ]


def _dataset_id(record: dict[str, Any]) -> str:
    """The Hub id of the facts that were asked, or what stands for it while they are not published."""
    return hub_id((record.get("publication") or {}).get("dataset_id")) or "trl-selfdistill/unpublished-facts"


def hub_id(name: str | None) -> str | None:
    """`name` if it can be a repository of the Hub, and is not a file or folder here."""
    if not name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def method_of(training: dict[str, Any]) -> str:
    """How it was trained, as a tag: `SelfDistillSFTTrainer` is plain SFT without a KL, and has the control L2."""
    settings = training.get("settings", {})
    if "l2_weight" in settings:
        return "l2-to-start-sft"
    if settings.get("kl_weight"):
        return "self-distill-sft"
    if training.get("trainer") == "FrozenGroupsSFTTrainer" or training.get("groups"):
        return "frozen-groups-sft"
    return "sft"


def base_model_of(name_or_path: str | None) -> dict[str, str | None]:
    """
    The Hub id that `name_or_path` goes back to, and the licence, as `base_model` and `license`: a folder has them in
    its card, which makes the chain of stages whole. `None` for what is not known.
    """
    folder = Path(name_or_path or "")
    if name_or_path and (folder / "README.md").is_file():
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
        base = data.get("base_model")
        base = base[0] if isinstance(base, list) and base else base
        return {"base_model": hub_id(base), "license": data.get("license") or license_of(hub_id(base))}
    base_model = hub_id(name_or_path)
    return {"base_model": base_model, "license": license_of(base_model)}


def license_of(base_model: str | None) -> str | None:
    """The licence of a model on the Hub, if it is known here or its card is in the cache."""
    base_model = hub_id(base_model)
    if base_model is None or base_model in _LICENSES:
        return _LICENSES.get(base_model)
    card = try_to_load_from_cache(base_model, "README.md")
    return ModelCard.load(card, ignore_metadata_errors=True).data.get("license") if isinstance(card, str) else None


def title_of(record: dict[str, Any]) -> str:
    """Its name: that of its repository, or of the base model and what was done to it."""
    training, results, publication = (record.get(part) or {} for part in ("training", "results", "publication"))
    if publication.get("repo_id"):
        return publication["repo_id"].split("/")[-1]
    base_model = hub_id(training.get("base_model"))
    name = base_model.split("/")[-1] if base_model else "Local model"
    return f"{name}: {results.get('arm') or method_of(training)}"
