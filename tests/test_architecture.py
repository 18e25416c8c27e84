# SPDX-License-Identifier: Apache-2.0
"""The table of layers in AGENTS.md holds: read from the syntax trees, so that imports inside of functions count."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import trl_selfdistill


PACKAGE = Path(trl_selfdistill.__file__).parent
ROOT = PACKAGE.parent
TRL_USERS = {
    "comparison/rival_methods.py",
    "comparison/study.py",
    "mechanism/study.py",
    "study/command_line.py",
    "study/stages.py",
}
ANSWER_PROMPTS = "trl_selfdistill.answers.prompts"
HEAVY = {"torch", "transformers", "trl", "accelerate", "peft"}
# From the top of the table down, each with what it must not import: `None` for all but the standard library and numpy.
# A package imports from those above it.
LAYERS = [
    ("scoring", None),
    ("hallucination", None),
    ("kernels", {"transformers", "trl", "datasets", "accelerate"}),
    ("losses", {"transformers", "trl", "datasets", "accelerate", "triton"}),
    ("parameters", {"trl", "datasets"}),
    ("facts", HEAVY),
    ("answers", {"trl", "datasets"}),
    ("synthetic", HEAVY),
    ("drift", {"trl"}),
    ("knowledge", {"trl"}),
    ("hub", {"transformers", "trl", "datasets", "accelerate"}),
    ("trainers", set()),
    ("study", set()),
    ("comparison", set()),
    ("mechanism", set()),
]
# Which of those above a package must not import all the same
FORBIDDEN = {
    "kernels": {"scoring"},
    "losses": {"scoring"},
    "parameters": {"scoring", "losses"},
    "facts": {"losses", "parameters"},
    "answers": {"facts", "losses", "parameters"},
    "synthetic": {"losses", "parameters"},
    "drift": {"facts", "synthetic", "losses"},
    "knowledge": {"drift", "synthetic", "losses", "parameters"},
    "hub": {"facts", "knowledge", "losses", "parameters"},
    "trainers": {"scoring", "facts", "synthetic", "drift", "knowledge"},  # a prompt-completion dataset is all they see
    "study": {"losses", "drift", "synthetic"},
    "mechanism": {"comparison", "losses"},
}


def files_of(package: str) -> list[Path]:
    folder = PACKAGE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{package}.py"]


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The packages (and modules beside them) of this one that a file imports, and the other imports in full."""
    own, others = set(), set()
    parts = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level + 1]) if node.level else []
            full = ".".join(["trl_selfdistill", *base, node.module or ""] if node.level else [node.module])
            others |= {full.rstrip(".")} if node.module else {f"{full}{alias.name}" for alias in node.names}
    for name in list(others):
        if name.split(".")[0] == "trl_selfdistill":
            others.remove(name)
            own |= {name.split(".")[1]} if "." in name else {"__init__"}
    return own, others


POSITIONS = {package: position for position, (package, _) in enumerate(LAYERS)}


def imported_by(package: str) -> set[str]:
    return set().union(*(imports_of(file)[0] for file in files_of(package))) - {package}


def test_every_package_has_a_layer():
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - {"__init__"} == set(POSITIONS)


def test_the_table_of_agents_md_names_these_layers():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip(" `/") for line in text.splitlines() if line.startswith("| `")]
    assert rows == [*POSITIONS, "scripts"]


@pytest.mark.parametrize("package", POSITIONS)
def test_a_package_imports_from_those_above(package):
    imported = imported_by(package)
    assert imported <= set(POSITIONS), "a module imports the package itself"
    below = {name for name in imported if POSITIONS[name] > POSITIONS[package]}
    assert not below and not imported & FORBIDDEN.get(package, set())


@pytest.mark.parametrize("package", POSITIONS)
def test_a_package_does_not_import_what_it_must_not_know(package):
    roots = {name.split(".")[0] for file in files_of(package) for name in imports_of(file)[1]}
    forbidden = LAYERS[POSITIONS[package]][1]
    others = roots - set(sys.stdlib_module_names)
    assert not (others - {"numpy"} if forbidden is None else others & forbidden)


def test_few_files_beside_the_trainers_import_trl():
    files = (path for path in PACKAGE.rglob("*.py") if path.parent.name != "trainers")
    using = {
        path.relative_to(PACKAGE).as_posix()
        for path in files
        if any(name.split(".")[0] == "trl" for name in imports_of(path)[1])
    }
    assert using == TRL_USERS


@pytest.mark.parametrize("package", POSITIONS)
def test_the_modules_of_a_package_import_each_other_without_cycles(package):
    graph = {}
    for file in files_of(package):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1)
        graph[file.stem] = {node.module.split(".")[0] for node in nodes if node.module} - {file.stem}
    TopologicalSorter(graph).prepare()


def test_private_pieces_of_trl_are_touched_in_one_file_only():
    touching = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("trl.") for name in imports_of(path)[1])
    }  # fmt: skip
    assert touching == {"sft_internals.py"}


def test_private_attributes_of_its_trainer_are_used_in_that_file_only():
    private = re.compile(r"\b(self|trainer)\._(metrics|total_train_tokens|tp_size|tokenizer|prepare_dataset)\b")
    using = {path.name for path in (PACKAGE / "trainers").glob("*.py") if private.search(path.read_text("utf-8"))}
    assert using == {"sft_internals.py"}


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


@pytest.mark.parametrize("module", ["trl_selfdistill", "trl_selfdistill.scoring.exact_match", ANSWER_PROMPTS])
def test_importing_does_not_import_torch(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded and not {*loaded} & {*HEAVY, "datasets", "numpy"}


def test_every_name_of_the_package_is_there():
    for name in trl_selfdistill.__all__:
        assert getattr(trl_selfdistill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trl_selfdistill.nothing  # noqa: B018


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]), ids=lambda p: p.name
)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n") and len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            assert node.end_lineno - node.lineno + 1 - docstring <= 60, node.name
