# SPDX-License-Identifier: Apache-2.0
"""What of a folder goes to the Hub, and the push. Only files whose names are on a list are published, and no links."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import read_json
from .environment import hide_tokens
from .model_card import CARD_FILE, RECORD_FILE, hub_id, read_record, render_model_card


# Of the results of weights, and of the weights. Vocabularies have the names that transformers' tokenizers give them
RESULT_FILES = (CARD_FILE, RECORD_FILE, "curves.png", "parameter_groups.json")
ANSWER_FILES = ("accuracy.json*",)  # to facts, which they name: sent with these alone
MODEL_FILES = (
    ("*model*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
    + ("adapter_config.json", "*processor_config.json", "*tokenizer_config.json", "tokenizer.json", "*.tokenizer")
    + ("special_tokens_map.json", "added_tokens.json", "vocab.*", "vocab-*.json", "*_vocab.json", "merges.txt")
    + ("*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "dict.txt", "emoji.json", "byte_maps.json")
    + ("normalizer.json", "word_*.json", "*.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
    + ("custom_generate/*.py", "custom_generate/requirements.txt", "*_tokenizer/*.json", "LICENSE*", "NOTICE*")
)
_CLASSES = re.compile(r'"(?:auto_map|impl)"\s*:\s*("[^"]*"|\{[^}]*\})')  # objects of classes, by their names
_MODULE = re.compile(r'"([\w.]+)\.\w+"')  # `repository--module.Class` is elsewhere
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.MULTILINE)  # as transformers' loader finds them


class PublishError(RuntimeError):
    """Why nothing was published and what to change, without secrets. It is meant to be printed as it is."""


@dataclass
class Publication:
    """A commit to a repository. [`PublishError`] if it cannot have that name, or a text holds an access token."""

    repo_id: str  # `namespace/name`
    repo_type: str  # `"model"`, `"dataset"` or `"space"`
    contents: dict[str, Path | bytes]  # of each path in the repository

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise PublishError(f"The Hub takes no {self.repo_type} called {self.repo_id!r}. {error}") from None
        if "/" not in self.repo_id:
            raise PublishError(f"{self.repo_id!r} lacks its owner. Pass it as your-name/{self.repo_id}.")
        for name, content in self.contents.items():
            if name.endswith((".safetensors", ".png")):
                continue
            text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
            if hide_tokens(text) != text:
                raise PublishError(f"{name} holds an access token of the Hub. Remove it, and revoke the token.")

    def __str__(self) -> str:
        sizes = {n: len(c) if isinstance(c, bytes) else c.stat().st_size for n, c in sorted(self.contents.items())}
        lines = [f"{size:>16,}  {name}" for name, size in sizes.items()]
        return "\n".join([f"{self.repo_type} {self.repo_id}, bytes of each file:", *lines])


def select_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """The files in `folder` that match one of `patterns`, by their path in it; no links, and nothing outside of it."""
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder.")
    paths = {path.relative_to(folder): path for pattern in patterns for path in folder.glob(pattern)}
    root = folder.resolve()
    return {name.as_posix(): path for name, path in paths.items() if path.is_file() and path.resolve() == root / name}


def _named_in(folder: Path) -> set[str]:
    """The files that others name: shards of weights, modules of configurations, and what these import in turn."""
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*config.json")]
    modules = [name for text in texts for classes in _CLASSES.findall(text) for name in _MODULE.findall(classes)]
    for name in modules:
        path = folder / f"{name}.py"
        imported = _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8")) if path.is_file() else []
        modules += {*imported} - {*modules}
    shards = [read_json(path)["weight_map"].values() for path in folder.glob("*.safetensors.index.json")]
    return {f"{name}.py" for name in modules}.union(*shards)


def plan_model(
    folder: Path, repo_id: str, license: str | None, base_model: str | None = None, dataset_id: str | None = None
) -> Publication:
    """
    What of the checkpoint in `folder`, which is not changed, goes to the repository `repo_id`, with a card that says
    what is known only now: `license` and the Hub id of its base model, by default those in its card, and that of the
    facts that it was evaluated on. [`PublishError`] if its weights, its license or the base of an adapter is missing.
    """
    named = _named_in(folder)
    files = select_files(folder, [*RESULT_FILES, *(ANSWER_FILES if dataset_id else ()), *MODEL_FILES, *named])
    if lost := named - files.keys():
        raise PublishError(f"{folder} names {min(lost)}, which is no file of its own in it. Copy it there.")
    record, given = read_record(folder), {"license": license, "base_model": base_model}
    if "training" not in record or not any(name.endswith(".safetensors") for name in files):
        advice = "Pass what a trainer saved. PEFT puts adapters of other names than 'default' into sub-folders."
        raise PublishError(f"{folder} itself holds no weights (.safetensors) or no {RECORD_FILE}. {advice}")
    record["training"] |= {name: value for name, value in given.items() if value is not None}
    card = render_model_card(record)
    if card.data.license is None:
        base = card.data.base_model or "its base model"
        raise PublishError(f"The license of {folder.name} is not known. Pass {base}'s, as `--license apache-2.0`.")
    if dataset_id is not None:
        card.data.datasets = [*(card.data.datasets or []), dataset_id]
        for result in card.data.eval_results or []:
            result.dataset_type = dataset_id
    texts = {CARD_FILE: str(card), RECORD_FILE: json.dumps(record, indent=2, ensure_ascii=False)}
    if "adapter_config.json" in files:
        config = read_json(files["adapter_config.json"])
        config["base_model_name_or_path"] = base_model or hub_id(config.get("base_model_name_or_path"))
        if config["base_model_name_or_path"] is None:
            advice = "Publish that one first and pass its id, as `--base_model your-name/stage1`."
            raise PublishError(f"The adapter in {folder.name} was trained on a local model. {advice}")
        texts["adapter_config.json"] = json.dumps(config, indent=2)
    return Publication(repo_id, "model", files | {name: text.encode() for name, text in texts.items()})


def publish(plan: Publication, private: bool = True, create_pr: bool = False) -> str:
    """
    Makes the repository if need be, a `private` one, and commits the plan, whole or not at all, with the token of `hf
    auth login`. Returns the address of the commit or, with `create_pr`, of the pull request that it opens instead;
    [`PublishError`] if there is none.
    """
    api, repo = HfApi(), {"repo_id": plan.repo_id, "repo_type": plan.repo_type}
    space_sdk = "gradio" if plan.repo_type == "space" else None
    files = [CommitOperationAdd(name, content) for name, content in sorted(plan.contents.items())]
    try:
        api.create_repo(**repo, private=private, exist_ok=True, space_sdk=space_sdk)
        commit = api.create_commit(**repo, operations=files, commit_message="Publish", create_pr=create_pr)
    except Exception as error:  # of any library below: a traceback may show the token of the request
        cause = " ".join(hide_tokens(str(error)).split())
        advice = "Log in by `hf auth login` with a token that may write, or pass --create_pr; no file is sent twice."
        raise PublishError(f"{plan.repo_id} was not published: {cause} {advice}") from None
    return commit.pr_url or commit.commit_url
