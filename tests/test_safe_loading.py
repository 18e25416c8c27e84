# SPDX-License-Identifier: Apache-2.0
"""Nothing that can run code is loaded: no pickle is read, and remote code only where the user asked for it."""

import re
from pathlib import Path

import pytest

import trl_selfdistill


ROOT = Path(trl_selfdistill.__file__).parent.parent
FILES = [
    path for folder in ("trl_selfdistill", "scripts", "evaluate_metrics") for path in (ROOT / folder).rglob("*.py")
]
UNSAFE = re.compile(
    r"^\s*(import|from) (_?pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b|torch\.load\(|read_pickle\("
    r"|from torch import .*\bload\b|(trust_remote_code|allow_pickle)['\"]?\s*[=:]\s*True|weights_only\s*=\s*False",
    re.MULTILINE,
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_runs_code_is_loaded(path):
    assert UNSAFE.search(path.read_text(encoding="utf-8")) is None
