# SPDX-License-Identifier: Apache-2.0
"""What of a folder goes to the Hub, and the push. Only files whose names are on a list are published, and no links."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import read_json
from .environment import hide_tokens
from .model_card import CARD_FILE, RECORD_FILE, hub_id, read_record, render_model_card


MODEL_FILES = (
    (CARD_FILE, RECORD_FILE, "curves.png", "accuracy.json*", "base_accuracy.jsonl", "parameter_groups.json")
    + ("*.safetensors", "*.safetensors.index.json", "config.json", "*_config.json", "*.jinja", "LICENSE*", "NOTICE*")
    + ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
)
_ADVICE = {
    401: "Log in with `hf auth login`, with a token that may write.",
    403: "The token may not write there: take one that may, or propose the files with `--create_pr`.",
}


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
        lines = [f"{self.repo_type} {self.repo_id}, bytes of each file:"]
        for name, content in sorted(self.contents.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            lines.append(f"{size:>16,}  {name}")
        return "\n".join(lines)


def select_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """The files in `folder` that match one of `patterns`, by name; no links."""
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder.")
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    return {path.name: path for path in paths if path.is_file() and not path.is_symlink()}


def plan_model(
    folder: Path,
    repo_id: str,
    license: str | None = None,
    base_model: str | None = None,
    dataset_id: str | None = None,
) -> Publication:
    """
    What of a checkpoint is published, with a card that says what is known only now. [`PublishError`] if its weights,
    its license or the base of an adapter is missing.

    Args:
        folder (`Path`): The checkpoint, which is not changed.
        repo_id (`str`): Its repository, `namespace/name`.
        license (`str`, *optional*): Its license. Defaults to the one in its card.
        base_model (`str`, *optional*): Hub id of the base model. Defaults to the one in its card.
        dataset_id (`str`, *optional*): Hub id of the facts that it was evaluated on.
    """
    contents: dict[str, Path | bytes] = select_files(folder, MODEL_FILES)
    if any("auto_map" in read_json(path) for name, path in contents.items() if name.endswith("config.json")):
        contents |= select_files(folder, ["*.py"])  # the model brings code of its own
    if RECORD_FILE not in contents or not any(name.endswith(".safetensors") for name in contents):
        raise PublishError(f"{folder} holds no weights or no {RECORD_FILE}. Pass what a trainer saved.")
    record, given = read_record(folder), {"license": license, "base_model": base_model}
    record["training"] |= {name: value for name, value in given.items() if value is not None}
    card = render_model_card(record)
    if card.data.license is None:
        raise PublishError(
            f"The license of {folder.name} is not known. Pass that of {card.data.base_model or 'its base model'}, "
            "for example `--license apache-2.0`."
        )
    if dataset_id is not None:
        card.data.datasets = [*(card.data.datasets or []), dataset_id]
        for result in card.data.eval_results or []:
            result.dataset_type = dataset_id
    contents[CARD_FILE] = str(card).encode()
    contents[RECORD_FILE] = json.dumps(record, indent=2, ensure_ascii=False).encode()
    if "adapter_config.json" in contents:
        config = read_json(folder / "adapter_config.json")
        config["base_model_name_or_path"] = base_model or hub_id(config["base_model_name_or_path"])
        if config["base_model_name_or_path"] is None:
            raise PublishError(
                f"The adapter in {folder.name} was trained on a local model. Publish that one first and pass its id, "
                "as `--base_model your-name/stage1`."
            )
        contents["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return Publication(repo_id, "model", contents)


def publish(plan: Publication, private: bool = True, create_pr: bool = False) -> str:
    """
    Makes the repository if need be and commits the plan, whole or not at all, with the token of `hf auth login`.

    Args:
        plan ([`Publication`]): What to commit.
        private (`bool`, *optional*, defaults to `True`): Whether a new repository is private.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request rather than commit.

    Returns:
        `str`: The address of the commit, or of the pull request. [`PublishError`] if there is none.
    """
    api, repo = HfApi(), {"repo_id": plan.repo_id, "repo_type": plan.repo_type}
    files = [CommitOperationAdd(name, content) for name, content in sorted(plan.contents.items())]
    try:
        api.create_repo(
            **repo, private=private, exist_ok=True, space_sdk="gradio" if plan.repo_type == "space" else None
        )
        commit = api.create_commit(**repo, operations=files, commit_message="Publish", create_pr=create_pr)
    except Exception as error:  # of any library below: a traceback may show the token of the request
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = _ADVICE.get(status, "Nothing was committed, and the same command sends no file twice.")
        cause = " ".join(hide_tokens(str(error)).split())
        raise PublishError(f"{plan.repo_id} was not published. {advice} The cause: {cause}") from None
    return commit.pr_url or commit.commit_url
