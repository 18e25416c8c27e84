# SPDX-License-Identifier: Apache-2.0
"""Where a run happened: its command, date, machine and versions. Secrets do not get in, paths do not get out."""

import os
import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import torch


_PACKAGES = ("trl-selfdistill", "torch", "transformers", "trl", "accelerate", "datasets")
_OPTIONAL_PACKAGES = ("peft",)
# Access tokens of the Hub, and the flags whose value is a secret whatever it looks like
TOKEN_PATTERN = re.compile(r"hf_oauth_[\w.-]{20,}|hf_[A-Za-z0-9]{20,}")
_SECRET_FLAG = re.compile(r"--?[\w-]*(token|password|secret|api[_-]?key)", re.IGNORECASE)
HIDDEN = "HIDDEN"


def describe_environment() -> dict[str, Any]:
    """`command`, `date`, `machine` and `versions` of this process, as JSON values."""
    program = Path(sys.argv[0]).absolute()
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else Path(program.name)
    versions = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    for name in _OPTIONAL_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # not installed, so it took no part
            continue
    return {
        "command": shlex.join(_without_secrets([program.as_posix(), *sys.argv[1:]])),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}{_gpus()}",
        "versions": versions,
    }


def _gpus() -> str:
    count = torch.cuda.device_count()
    return f", {count} x {torch.cuda.get_device_name(0)}" if count else ""


def hide_tokens(text: str) -> str:
    """
    `text` without access tokens of the Hub.

    ```python
    >>> hide_tokens("Bearer hf_" + "a" * 34)
    'Bearer HIDDEN'
    ```
    """
    return TOKEN_PATTERN.sub(HIDDEN, text)


def _without_secrets(words: list[str]) -> list[str]:
    """
    A command line whose secrets are hidden.

    ```python
    >>> _without_secrets(["train.py", "--hub_token", "abc", "--wandb-api-key=abc", "--seed", "0"])
    ['train.py', '--hub_token', 'HIDDEN', '--wandb-api-key=HIDDEN', '--seed', '0']
    ```
    """
    shown, is_secret = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        names_secret = _SECRET_FLAG.fullmatch(flag) is not None
        if is_secret and not word.startswith("--"):
            shown.append(HIDDEN)
        else:
            shown.append(f"{flag}={HIDDEN}" if names_secret and equals else hide_tokens(word))
        is_secret = names_secret and not equals
    return shown


def portable_command(command: str) -> str:
    """
    A command without what only this machine has (of absolute paths, their last part) and without secrets, in one line
    that fits into a fence.

    ```python
    >>> portable_command("scripts/report.py --arms /home/alice/study/sft")
    'accelerate launch scripts/report.py --arms sft'
    ```
    """
    words = []
    for word in _without_secrets(shlex.split(command)):
        flag, equals, value = word.rpartition("=")
        if PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith(("~", "..")):
            value = PureWindowsPath(value).name  # takes both kinds of slashes
        words.append(shlex.quote(" ".join(f"{flag}{equals}{value}".split())))
    return " ".join(["accelerate", "launch", *words] if words[0].endswith(".py") else words)
