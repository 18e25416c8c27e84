# SPDX-License-Identifier: Apache-2.0
"""Where a run happened: its command, date, machine and versions, without secrets and without paths of the machine."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from huggingface_hub import get_token


_PACKAGES = ("trl-selfdistill", "torch", "transformers", "trl", "accelerate", "datasets", "peft")
_TOKEN = re.compile(r"hf_oauth_[\w.-]{20,}|hf_[A-Za-z0-9]{20,}")
# The value after the name of a secret, of a flag, in the environment or in JSON; and who logs in by a URL
_SECRET = re.compile(
    r"""(\w*(?<!eos_)(?<!pad_)(?:token|passw(?:or)?d|secret|(?:api|access)[_-]?key)"?(?:\s*[=:]\s*|\s+))(?!--)"""
    r"""(?:"(?:[^"\\]|\\.)*"(?=\s*[,}])|(?:'[^']*'|"[^"]*"|[^\s'"])+)|(?<=://)[^/@\s]+(?=@)""",
    re.IGNORECASE,
)
_FLAG_FOLDER_REST = re.compile(r"([\w.-]+=)?(?:(?=/|~|\.\.).*/)?(.*)")
_NO_PROGRAM = re.compile(r"^(-c?)?$|kernel_launcher\.py$")  # an interactive session, a notebook


def describe_environment() -> dict[str, Any]:
    """`command` (empty in a notebook), `date`, `machine` and `versions` of this process, as JSON values."""
    num_gpus = torch.cuda.device_count()
    gpus = f", {num_gpus} x {torch.cuda.get_device_name(0)}" if num_gpus else ""
    versions = {name: version(name) for name in _PACKAGES if find_spec(name.replace("-", "_"))}  # peft may be missing
    words = shlex.split(os.environ.get("TRL_SELFDISTILL_COMMAND", "")) or sys.argv
    return {
        "command": "" if _NO_PROGRAM.search(words[0]) else portable_command(words),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}{gpus}",
        "versions": {"python": platform.python_version(), **versions},
    }


def hide_tokens(text: str) -> str:
    """`text` without access tokens of the Hub, the one of `hf auth login` among them."""
    text, token = _TOKEN.sub("HIDDEN", text), get_token()
    return text.replace(token, "HIDDEN") if token else text


def portable_command(words: Sequence[str]) -> str:
    """A command line to show to others: without secrets, and of paths that are not relative the last part alone."""
    parts = (_FLAG_FOLDER_REST.fullmatch(" ".join(word.split()).rstrip("/")).groups("") for word in words)
    line = " ".join(flag + shlex.quote(rest) for flag, rest in parts)
    line = line.encode(errors="replace").decode()  # names of files may hold bytes that are no text
    return hide_tokens(_SECRET.sub(r"\g<1>HIDDEN", line))
