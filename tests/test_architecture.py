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
HEAVY = {"torch", "transformers", "trl", "accelerate", "peft"}
# From the top of the table down, each with the packages that it must not import. A module imports from its own layer
# and from those above; `trainers` and `losses` are folders.
LAYERS = [
    # None: nothing but the standard library
    ({"exact_match", "prompts", "abstention", "answer_outcome", "scoring_inputs"}, None),
    ({"bootstrap", "hallucination"}, HEAVY | {"datasets"}),
    ({"kernels"}, {"transformers", "trl", "datasets", "accelerate"}),
    ({"losses"}, {"transformers", "trl", "datasets", "accelerate", "triton"}),
    ({"model_structure", "parameter_groups", "parameter_hashes"}, {"trl", "datasets"}),
    (
        {
            "entity_questions", "facts", "fact_files", "geonames", "country_names", "currency_names",
            "invented_facts",
        },
        HEAVY,
    ),
    ({"token_pairs", "name_tokens", "synthetic_keys", "synthetic_facts"}, HEAVY),
    (
        {"process_sharding", "generation", "answer_scoring", "subject_tokens", "prompt_states", "drift"},
        {"trl", "datasets"},
    ),
    ({"exemplars", "progress_file", "slick", "training_mix"}, {"trl"}),
    ({"environment", "hub_metadata", "model_card"}, {"transformers", "trl", "datasets", "accelerate"}),
    ({"dataset_files"}, {"transformers", "trl", "torch"}),
    ({"trainers"}, set()),
    (
        {
            "stage", "models", "callback_logging", "fact_accuracy", "forgetting", "hallucination_callback",
            "drift_probe", "run_cost", "small_llama", "token_masking", "weight_interpolation",
            "random_effects", "pareto",
        },
        {"trl"},
    ),
    (
        {
            "training_stage", "report", "study_card", "study_arguments", "study", "dataset_training", "dataset_card",
            "publishing", "study_publishing", "command_line", "experiment", "mechanism_conditions",
            "mechanism_verdict", "mechanism_study", "mechanism_report", "mechanism_plots", "rival_methods",
            "method_comparison", "comparison_report",
        },
        set(),
    ),
]  # fmt: skip
# Where a layer above must not be imported all the same
FORBIDDEN = {
    "kernels": {"exact_match", "prompts"},
    "losses": {"exact_match", "prompts"},
    "model_structure": {"losses"},
    "parameter_groups": {"losses"},
    "facts": {"losses", "parameter_groups", "model_structure"},
    "generation": {"facts", "fact_files", "invented_facts", "geonames", "losses", "parameter_groups"},
    "answer_scoring": {"facts", "fact_files", "invented_facts", "geonames", "losses", "parameter_groups"},
    "prompt_states": {"facts", "fact_files", "invented_facts", "geonames", "losses", "parameter_groups"},
    "drift": {"facts", "fact_files", "invented_facts", "geonames", "losses", "parameter_groups"},
    "slick": {"losses", "parameter_groups"},
    "training_mix": {"losses", "parameter_groups"},
    "trainers": {"facts", "fact_files", "prompts", "slick", "exemplars", "training_mix", "exact_match"},
}
TRL_USERS = {"trainers", "command_line", "mechanism_study", "rival_methods", "method_comparison"}


def files_of(module: str) -> list[Path]:
    folder = PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """The names of the package's modules that a file imports, and the other imports in full."""
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


MODULES = {module: layer for layer, (modules, _) in enumerate(LAYERS) for module in modules}


def graph() -> dict[str, set[str]]:
    return {module: set().union(*(imports_of(file)[0] for file in files_of(module))) - {module} for module in MODULES}


def test_every_module_has_a_layer():
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - {"__init__"} == set(MODULES)


def test_the_table_of_agents_md_names_these_layers():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = [{name.rstrip("/") for name in re.findall(r"`([^`]+)`", row)} for row in rows]
    assert named == [*(modules for modules, _ in LAYERS), {"scripts"}]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_own_layer_and_those_above(module):
    imported = graph()[module]
    assert imported <= set(MODULES), "a module imports the package itself"
    below = {name for name in imported if MODULES[name] > MODULES[module]}
    assert not below and not imported & FORBIDDEN.get(module, set())


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_does_not_import_what_its_layer_must_not_know(module):
    roots = {name.split(".")[0] for file in files_of(module) for name in imports_of(file)[1]}
    forbidden = LAYERS[MODULES[module]][1]
    others = roots - set(sys.stdlib_module_names)
    assert not (others if forbidden is None else others & forbidden)
    assert "trl" not in others or module in TRL_USERS


def test_there_are_no_cycles():
    TopologicalSorter(graph()).prepare()


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


@pytest.mark.parametrize("module", ["trl_selfdistill", "trl_selfdistill.exact_match", "trl_selfdistill.prompts"])
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
