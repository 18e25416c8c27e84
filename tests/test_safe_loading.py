# SPDX-License-Identifier: Apache-2.0
"""Nothing that can run code is loaded: no pickle is read, and remote code only where the user asked for it."""

import ast
from pathlib import Path

import pytest

import trl_selfdistill


ROOT = Path(trl_selfdistill.__file__).parent.parent
FILES = sorted(
    path for folder in ("trl_selfdistill", "scripts", "evaluate_metrics") for path in (ROOT / folder).rglob("*.py")
)
UNPICKLING_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What unpickles by its name, of whatever module or object it is an attribute
UNPICKLING_CALLS = {"torch.load", "read_pickle"}


def dotted(node: ast.AST) -> str:
    """`torch.load` of the syntax tree of `torch.load`."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def findings(source: str) -> set[str]:
    """What in a file may load code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {module} if module else {alias.name for alias in node.names}
            found |= {name for name in names if name.split(".")[0] in UNPICKLING_MODULES}
            if module == "torch":
                found |= {f"torch.{alias.name}" for alias in node.names if alias.name == "load"}
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            found |= {call for call in UNPICKLING_CALLS if name == call or name.endswith(f".{call}")}
        settings = []
        if isinstance(node, ast.keyword):
            settings = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            settings = [(key.value, value) for key, value in pairs if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            settings = [(dotted(target).split(".")[-1], node.value) for target in targets]
        for name, value in settings:
            constant = value.value if isinstance(value, ast.Constant) else None
            if (name, constant) in {("trust_remote_code", True), ("weights_only", False), ("allow_pickle", True)}:
                found.add(f"{name}={constant}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_runs_code_is_loaded(path):
    assert findings(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import pickle", "pickle"),
        ("from dill import loads", "dill"),
        ("from torch import load", "torch.load"),
        ("import torch\ntorch.load('f', weights_only=True)", "torch.load"),
        ("pandas.read_pickle('f')", "read_pickle"),
        ("load('f', weights_only=False)", "weights_only=False"),
        ("Model.from_pretrained('m', trust_remote_code=True)", "trust_remote_code=True"),
        ("options = {'trust_remote_code': True}", "trust_remote_code=True"),
        ("args.trust_remote_code = True", "trust_remote_code=True"),
        ("np.load('f', allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_the_law_would_find(source, expected):
    assert expected in findings(source)


def test_remote_code_is_off_unless_asked_for():
    assert trl_selfdistill.SelfDistillSFTConfig.trust_remote_code is False
    assert trl_selfdistill.FrozenGroupsSFTConfig.trust_remote_code is False
