# SPDX-License-Identifier: Apache-2.0
"""What of a folder goes to the Hub, what never does, and the push.

A file is published because its name is on a list, not because it is absent from another one: whatever a run leaves
beside the model (optimizer states, the teacher, caches, logs) stays here, as do all links.
"""

import json
import os
import stat
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, HfApi, get_token

from .environment import HIDDEN, TOKEN_PATTERN, hide_tokens
from .metadata import hub_id, license_of
from .model_card import FIGURE_FILE, card_files, read_record


MODEL_FILES = (
    ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")
    + ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
    + ("vocab.txt", "merges.txt", "*.model", "chat_template.jinja", "processor_config.json")
    + ("preprocessor_config.json", FIGURE_FILE, "accuracy.jsonl", "base_accuracy.jsonl", "accuracy.json")
    + ("parameter_groups.json", "LICENSE*", "NOTICE*")
)
METRIC_FILES = ("*.py", "README.md", "requirements.txt")
_MAX_TEXT = 50_000_000  # bytes: larger text is not searched for tokens
_TEXT = (".json", ".jsonl", ".md", ".txt", ".jinja", ".py", ".yaml", "")


class PublishError(RuntimeError):
    """Why nothing was published and what to change, without secrets. It is meant to be printed as it is."""


class Publication(NamedTuple):
    """
    A commit to a repository.

    Args:
        repo_id (`str`): `namespace/name`.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.
        contents (`dict[str, Path | bytes]`): What each path in the repository holds.
        left_out (`dict[str, str]`): What stays here, and why.
    """

    repo_id: str
    repo_type: str
    contents: dict[str, Path | bytes]
    left_out: dict[str, str]

    def __str__(self) -> str:
        sizes = {name: _size(content) for name, content in sorted(self.contents.items())}
        lines = [f"{self.repo_type} {self.repo_id}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
        lines += [f"{size:>16,}  {name}" for name, size in sizes.items()]
        lines += [f"{'left out':>16}  {name} ({reason})" for name, reason in sorted(self.left_out.items())]
        return "\n".join(lines)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def select_files(folder: Path, patterns: Iterable[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """
    The files at the top of `folder` that match one of `patterns`, and why each other entry is left out.

    Raises:
        PublishError: If `folder` is none.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder. Pass a checkpoint, such as outputs/quickstart/selfdistill.")
    chosen, left_out = {}, {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink():
            left_out[entry.name] = "a link"
        elif entry.is_dir():
            left_out[f"{entry.name}/"] = "a folder"
        elif not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            left_out[entry.name] = "no plain file"
        elif any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            chosen[entry.name] = Path(entry.path)
        else:
            left_out[entry.name] = "not a part of the model"
    return chosen, left_out


def plan_model(folder: Path, repo_id: str, publication: dict[str, Any]) -> Publication:
    """
    What of a checkpoint is published, its card rendered with what is known only now.

    Args:
        folder (`Path`):
            The checkpoint, which is not changed.
        repo_id (`str`):
            Its repository.
        publication (`dict`):
            `license`, `base_model`, `dataset_id` and `metric_id`, as far as they are given.

    Raises:
        PublishError: If it holds no weights, its licence or base is not known, or a text in it holds a token.
    """
    contents, left_out = select_files(folder, MODEL_FILES)
    if not any(name.endswith(".safetensors") for name in contents):
        raise PublishError(f"{folder} holds no weights (*.safetensors). Pass the folder that training ended with.")
    record = read_record(folder)
    training = record.get("training") or {}
    base_model = publication.get("base_model") or training.get("base_model")
    license = publication.get("license") or license_of(hub_id(base_model)) or training.get("license")
    if license is None:
        raise PublishError(
            f"The licence of {folder.name} is not known: it is that of its base model ({base_model or 'not known'}). "
            "Look it up there and pass it, for example `--license apache-2.0`."
        )
    if "adapter_config.json" in contents:
        contents["adapter_config.json"] = _adapter_config(
            contents["adapter_config.json"], publication.get("base_model")
        )
        training = {**training, "is_adapter": True}
    given = {name: value for name, value in publication.items() if value is not None}
    record = {**record, "training": training, "publication": {**given, "license": license, "repo_id": repo_id}}
    card = card_files(record, has_figure=FIGURE_FILE in contents)
    left_out = {name: reason for name, reason in left_out.items() if name not in card and name != ".eval_results/"}
    return refuse_tokens(Publication(repo_id, "model", {**contents, **card}, left_out))


def _adapter_config(path: Path, base_model: str | None) -> bytes:
    """The adapter's configuration, its base a Hub id: a path of this machine would load nowhere else."""
    config = json.loads(path.read_text(encoding="utf-8"))
    base = base_model or hub_id(config.get("base_model_name_or_path"))
    if base is None:
        raise PublishError(
            f"The adapter in {path.parent.name} was trained on a local model, without which it is of no use. Publish "
            "that model first and pass its id, as `--base_model your-name/stage1`."
        )
    return (json.dumps({**config, "base_model_name_or_path": base}, indent=2) + "\n").encode()


def plan_metric(folder: Path, repo_id: str) -> Publication:
    """The files of a metric for a Space. Its script has to be called as the Space, or `evaluate` does not find it."""
    contents, left_out = select_files(folder, METRIC_FILES)
    script = f"{repo_id.split('/')[-1]}.py"
    if script not in contents:
        raise PublishError(
            f"`evaluate` loads the Space {repo_id} from its file {script}, which {folder} does not hold (it has "
            f"{', '.join(contents) or 'none'}). Call the Space as the metric, or pass another `--metric_folder`."
        )
    return refuse_tokens(Publication(repo_id, "space", dict(contents), left_out))


def refuse_tokens(plan: Publication) -> Publication:
    """
    `plan` itself, once no text in it holds an access token.

    Raises:
        PublishError: If one does. The message names the file, not the token.
    """
    token = get_token()
    for name, content in plan.contents.items():
        if Path(name).suffix not in _TEXT or _size(content) > _MAX_TEXT:
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")
        if TOKEN_PATTERN.search(text) or (token and token in text):
            raise PublishError(
                f"{name} holds what looks like an access token of the Hub. Remove it and revoke the token."
            )
    return plan


def publish(plan: Publication, private: bool = True, create_pr: bool = False) -> str:
    """
    Makes the repository if need be and commits the plan, whole or not at all. Uploads that an interrupted run finished
    are not sent again. The token is that of huggingface_hub's own login.

    Returns:
        `str`: The address of the commit, or of the pull request.

    Raises:
        PublishError: If the Hub refuses, or cannot be reached.
    """
    api = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=c) for name, c in sorted(plan.contents.items())
    ]
    sdk = {"space_sdk": "gradio"} if plan.repo_type == "space" else {}
    try:
        api.create_repo(plan.repo_id, repo_type=plan.repo_type, private=private, exist_ok=True, **sdk)
        commit = api.create_commit(
            plan.repo_id,
            operations,
            commit_message=f"Publish {plan.repo_id.split('/')[-1]} with trl-selfdistill",
            repo_type=plan.repo_type,
            create_pr=create_pr,
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # `from None`: the chain would show the headers of the request in some tracebacks
        raise PublishError(_explain(plan.repo_id, error)) from None
    return commit.pr_url or commit.commit_url


_ADVICE = {
    401: "Log in with `hf auth login`, with a token that may write.",
    403: "The token may not write there: take one that may, another `--repo_id`, or propose it with `--create-pr`.",
    404: "Check `--repo_id`; a private repository looks missing to a token that may not read it.",
    409: "Somebody else changed the repository meanwhile. Run the same command again.",
    429: "The Hub asks to slow down. Wait, then run the same command again.",
}


def _explain(repo_id: str, error: Exception) -> str:
    """What happened and what to do, without the token, wherever the Hub's answer may have put it."""
    response = getattr(error, "response", None)
    cause = error
    while response is None and cause.__cause__ is not None:  # the client wraps what a failed upload said
        cause = cause.__cause__
        response = getattr(cause, "response", None)
    status = None if response is None else response.status_code
    advice = _ADVICE.get(
        status, "Nothing was committed. Run the same command again: what was uploaded is not sent twice."
    )
    if status == 429 and (seconds := response.headers.get("Retry-After")):
        advice = advice.replace("Wait", f"Wait {seconds} seconds")
    text = " ".join(hide_tokens(str(error)).split())
    token = get_token()
    text = text.replace(token, HIDDEN) if token else text
    return f"{repo_id} was not published{f' (HTTP {status})' if status else ''}. {advice} The cause: {text}"
