# SPDX-License-Identifier: Apache-2.0
"""What README, AGENTS.md, docs and configurations name exists, and their commands are ones that the scripts take."""

import re
import shlex
from importlib import import_module

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version
from test_scripts import parser_of
from toy_study import SCRIPTS, run_script

import trl_selfdistill
from trl_selfdistill import cli
from trl_selfdistill.studies.comparison.arguments import GROUPS


ROOT = SCRIPTS.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("evaluate_metrics/**/*.md")]
DOCUMENTS += [ROOT / "model_cards/README.md", *ROOT.glob("docs/**/*.ipynb")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
# Where README's links lead, which PyPI shows too, and its figure
OWN = re.compile(rf"{REPOSITORY}/blob/main/|{REPOSITORY.replace('github.com', 'raw.githubusercontent.com')}/main/")
# Programs without TRL's parser: their help tells which flags they have
OTHERS = ("public_facts", "benchmark", "check_", "compare_slick", "measure_on", "build_hub")


def commands() -> list[str]:
    """Every command in the documents, the scripts' docstrings and the configurations' comments that runs a script."""
    texts = [path.read_text(encoding="utf-8") for path in (*SCRIPTS.glob("configs/*.yaml"), *SCRIPTS.glob("*.py"))]
    lines = "\n".join([*TEXTS.values(), *(re.sub("^# ", "", text, flags=re.MULTILINE) for text in texts)])
    lines = re.sub(r"\\{1,2}\n#? *", " ", lines)
    found = re.findall(r"(?:python|accelerate launch)(?: \S+)*? scripts/\w+\.py[^\n`#]*", lines)
    found += re.findall(r"trl-selfdistill [a-z-]+ --[^\n`#]*", lines)
    make = re.findall(r'make quickstart ARGS="([^"]*)"', lines)
    found += [f"trl-selfdistill study --config quickstart {flags}" for flags in make]
    return sorted({" ".join(command.split()) for command in found if not re.search(r"\.\.\.|\$", command)})


@pytest.mark.filterwarnings("error::FutureWarning")  # a setting that a dependency deprecates
@pytest.mark.parametrize("command", commands())
def test_commands_are_taken(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if command.startswith("trl-selfdistill"):
        options, flags = cli.make_parser().parse_known_args(shlex.split(command)[1:])
        name, config = cli.PROGRAMS[options.command], getattr(options, "config", None)
        flags += ["--config", config] if config else []
    else:
        script, *flags = shlex.split(command[re.search(r"scripts/\w+\.py", command).start() :])
        name = script.removeprefix("scripts/")
    assert (SCRIPTS / name).is_file()
    if name.startswith(OTHERS):
        with pytest.raises(SystemExit):
            run_script(name, "--help")
        text = capsys.readouterr().out
        assert not [flag for flag in flags if flag.startswith("--") and flag not in text]
        return
    if "mica" in flags and "mica" not in GROUPS:
        pytest.skip("this PEFT has fewer adapters")
    parser = parser_of(name, monkeypatch)
    parser.parse_args_and_config(flags)


@pytest.mark.parametrize("document", TEXTS)
def test_links_files_and_modules_exist(document):
    text, folder = TEXTS[document], (ROOT / document).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        own = OWN.match(target)
        assert own or not re.match("https://[^/]*github[^/]*/[^/]*/trl-selfdistill", target), "another owner's"
        if own or not target.startswith("http"):
            assert own or document != "README.md", "the package page has no such file: link to the repository"
            linked = ROOT / target[own.end() :] if own else folder / target if target else ROOT / document
            assert linked.is_file(), target
            headings = re.findall("^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]
    folders = ("trl_selfdistill", "scripts", "tests", "evaluate_metrics", "docs")
    files = [path.as_posix() for part in folders for path in ROOT.glob(f"{part}/**/*.py")]
    for name in re.findall(r"[\w/]+\.py\b", OWN.sub("", text)):
        assert any(f"/{file}".endswith(f"/{name}") for file in files), name
    for name in re.findall(r"trl_selfdistill(?:\.\w+)+", text):
        module, _, attribute = name.rpartition(".")
        try:
            import_module(name)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), attribute), name


def test_extras_that_are_named_exist_and_changelog_and_space_have_this_version():
    extras = PROJECT["optional-dependencies"]
    named = {extra for text in TEXTS.values() for extra in re.findall(r"(?:\.|trl-selfdistill)\[(\w+)\]", text)}
    assert named and named <= {*extras}
    newest = re.search(r"^## \[(.*?)\]", TEXTS["CHANGELOG.md"], re.MULTILINE)[1]
    assert newest == Version(PROJECT["version"]).base_version
    lines = (ROOT / "evaluate_metrics/hallucination/requirements.txt").read_text().splitlines()
    [ours] = [Requirement(line) for line in lines if line.startswith("trl-selfdistill")]
    assert ours.specifier.contains(trl_selfdistill.__version__, prereleases=True)


@pytest.mark.parametrize("script", ["self_distill_sft.py", "frozen_groups_sft.py"])
def test_a_script_tells_uv_what_it_needs(script):
    [header] = re.findall("^# /// script\n(.*?)^# ///$", (SCRIPTS / script).read_text(), re.MULTILINE | re.DOTALL)
    needs = tomllib.loads(re.sub("^# ", "", header, flags=re.MULTILINE))
    [ours] = map(Requirement, needs["dependencies"])
    assert needs["requires-python"] == PROJECT["requires-python"] and ours.url == f"git+{REPOSITORY}"
    assert ours.name == PROJECT["name"] and ours.extras <= {*PROJECT["optional-dependencies"]}
