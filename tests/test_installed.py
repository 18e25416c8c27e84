# SPDX-License-Identifier: Apache-2.0
"""What `pip install` brings works from an empty folder: the command, its programs and configurations, the metric."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import build_model, build_tokenizer
from toy_study import SCRIPTS, toy_facts

from trl_selfdistill.files import write_jsonl


ROOT = SCRIPTS.parent
PARTS = ("trl_selfdistill", "scripts", "evaluate_metrics")
TRAINING = "--use_cpu --bf16 false --max_steps 1 --report_to none --save_strategy no".split()


class Installed(NamedTuple):
    """A folder with what the wheel brings, and an empty one beside it with a model and data to work in."""

    packages: Path
    folder: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess:
        """Runs `trl-selfdistill` with flags, or Python with `-c`."""
        words = [sys.executable, *(() if command[0] == "-c" else [self.packages / "bin/trl-selfdistill"]), *command]
        environment = os.environ | {"PYTHONPATH": str(self.packages), "HF_HOME": str(self.folder / "hf")}
        return subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    source, packages, folder = (tmp_path_factory.mktemp(name) for name in ("source", "packages", "empty"))
    for part in PARTS:
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", source, source], check=True)
    [wheel] = source.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--target", packages, wheel], check=True)
    tokenizer = build_tokenizer()
    for saved in (build_model(tokenizer), tokenizer):
        saved.save_pretrained(folder / "model")
    rows = [{"prompt": f"Q: {i}\nA:", "completion": " Norway"} for i in range(8)]
    write_jsonl(folder / "data.jsonl", rows)
    write_jsonl(folder / "facts.jsonl", toy_facts().select(range(12)))
    return Installed(packages, folder)


def test_the_wheel_holds_every_file(installed):
    files = {path.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*") if path.is_file()}
    files -= {path for path in files if "__pycache__" in path.parts or path == Path("evaluate_metrics/README.md")}
    package = installed.packages / "trl_selfdistill"
    missing = [path for path in files if not any((root / path).is_file() for root in (package, package.parent))]
    assert len(files) > 100 and not missing


def test_the_readme_and_the_metric_work(installed):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [change] = re.findall("```diff\n(.*?)```", readme, re.DOTALL)
    snippet = "\n".join(line[2:] for line in change.splitlines() if not line.startswith("-"))
    snippet = snippet.replace("Qwen/Qwen2.5-1.5B-Instruct", "model")
    for_a_cpu = "use_cpu=True", "bf16=False"
    assert all(f"`{setting}`" in readme for setting in for_a_cpu)
    snippet = snippet.replace('"out",', f'"out", {", ".join(for_a_cpu)}, max_steps=1, report_to="none",')
    code = f"""
import datasets, evaluate, trl_selfdistill
from trl_selfdistill.files import shipped
dataset = datasets.load_dataset("json", data_files="data.jsonl", split="train")
{snippet}
metric = evaluate.load(str(shipped("evaluate_metrics/hallucination")))
print([trl_selfdistill.__file__, metric.compute(predictions=["a"], references=["a"])["accuracy"]])
"""
    done = installed.run("-c", code)
    assert f"['{installed.packages}/trl_selfdistill/__init__.py', 1.0]" in done.stdout, done.stderr[-3000:]


def test_the_commands_work_one_after_another(installed):
    help = installed.run("--help").stdout
    assert "\n    annotate " in help and "quickstart" in help and "deepspeed_zero3" in help
    slick = "--slick_num_prompts 1 --slick_num_shots 2".split()
    flags = "--num_processes 2 --model_name_or_path model --facts facts.jsonl".split()
    done = installed.run("annotate", *flags, *slick)
    assert done.stdout.count("Annotated facts: outputs/study/annotated/facts.jsonl") == 1, done.stderr[-3000:]
    assert len((installed.folder / "outputs/study/annotated/facts.jsonl").read_text().splitlines()) == 10
    flags = ["--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--output_dir", "trained"]
    done = installed.run("self-distill", *flags, *TRAINING)
    assert "Model: trained" in done.stdout, done.stderr[-3000:]
    card = (installed.folder / "trained/README.md").read_text(encoding="utf-8")
    assert f"\ntrl-selfdistill self-distill {' '.join([*flags, *TRAINING])}\n" in card
    names = ["--checkpoints", "trained", "--repo_id", "your-name/m", "--metric_repo_id", "your-name/hallucination"]
    done = installed.run("publish", *names, "--license", "mit", "--base_model", "org/m", "--dry-run")
    assert "Nothing was sent" in done.stdout and "hallucination.py" in done.stdout, done.stderr[-3000:]
