# SPDX-License-Identifier: Apache-2.0
"""Stages that ask a model: two processes share the facts, and write what one writes."""

import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from toy_study import SCRIPTS, run_script, save_toy_model, toy_facts
from trl import SFTConfig, SFTTrainer
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill.knowledge import fact_accuracy
from trl_selfdistill.slick.process_sharding import map_in_parallel, on_main_process, share_of_process
from trl_selfdistill.slick.progress_file import ProgressFile
from trl_selfdistill.studies.fact_accuracy import FactAccuracyCallback
from trl_selfdistill.studies.facts.table import save_facts
from trl_selfdistill.studies.models import load_model_and_tokenizer


SLICK_FLAGS = ["--slick_num_shots", "2", "--slick_num_samples", "3", "--slick_temperature", "1.0"]


@pytest.fixture(scope="module")
def model_and_facts(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("toy")
    save_toy_model(folder / "model")
    save_facts(toy_facts(), folder / "facts.jsonl")
    return ["--model_name_or_path", str(folder / "model"), "--facts", str(folder / "facts.jsonl")]


def flags_of(run: str, flags: list[str], folder: Path) -> tuple[str, list[str]]:
    """The script and its flags of a run: how SLiCK asks and with how many prompts, or a method of prediction."""
    kind, method, *number = run.split()
    if kind == "evaluate":
        return "evaluate_facts.py", [*flags, "--output_dir", str(folder), "--method", method, "--batch_size", "7"]
    relations = ["--fact_relations", "country"] if number == ["1"] else []
    slick = ["--slick_method", method, "--slick_num_prompts", *number, *relations, *SLICK_FLAGS]
    return "annotate_facts.py", [*flags, "--output_dir", str(folder), *slick]


def files_of(folder: Path) -> dict[str, bytes]:
    """What a stage wrote, but for when and where."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# "1": one unit of work for two processes; 3 prompts, and chunks of 28 of 80 facts, do not divide by two either
@pytest.mark.parametrize("run", ["annotate score 3", "annotate generate 1", "evaluate score", "evaluate generate"])
def test_two_processes_write_what_one_writes(model_and_facts, tmp_path, run):
    script, flags = flags_of(run, model_and_facts, tmp_path / "one")
    run_script(script, *flags)
    script, flags = flags_of(run, model_and_facts, tmp_path / "two")
    run_in_two_processes(str(SCRIPTS / script), *flags)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert one == two and len(one) >= 2


def test_a_killed_annotation_goes_on_with_another_number_of_processes(model_and_facts, tmp_path):
    script, flags = flags_of("annotate generate 3", model_and_facts, tmp_path / "whole")
    run_script(script, *flags)
    script, flags = flags_of("annotate generate 3", model_and_facts, tmp_path / "cut")
    with pytest.raises(AssertionError):
        run_in_two_processes(__file__, "annotate", str(SCRIPTS / script), *flags)
    progress = tmp_path / "cut/annotated.partial/progress.jsonl"
    assert len(progress.read_text().splitlines()) == 1 + 3  # the header, and three of six units
    run_script(script, *flags)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_one_process_does_all():
    assert map_in_parallel(lambda item: item**2, range(5)) == [0, 1, 4, 9, 16]
    assert share_of_process("abc") == ["a", "b", "c"]
    with pytest.raises(KeyError, match="x"):
        map_in_parallel({}.__getitem__, ["x"])
    with pytest.raises(KeyError, match="x"):
        on_main_process(lambda: {}["x"])


def test_work_and_errors_are_shared(tmp_path):
    run_in_two_processes(__file__, "share", tmp_path)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        assert seen["map"] == [(0, "a"), (1, "b"), (0, "c")] and seen["nothing"] == [] and seen["main"] == 0
        assert seen["main error"] == "ValueError('on the main process')"
    failed, waited = (torch.load(tmp_path / f"{rank}.pt")["map error"] for rank in (1, 0))
    assert failed == "ValueError('b is bad')"
    assert waited == """RuntimeError("Process 1 of 2 failed: ValueError('b is bad')")"""


def test_accuracy_during_training_is_shared(model_and_facts, tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
    alone = asked_in_training(model_and_facts[1], tmp_path / "one")
    run_in_two_processes(__file__, "train", model_and_facts[1], tmp_path / "two")
    assert (tmp_path / "two/accuracy.jsonl").read_bytes() == (tmp_path / "one/accuracy.jsonl").read_bytes()
    shares = [torch.load(tmp_path / f"two/{rank}.pt") for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(alone) and min(map(len, shares)) > 0


def asked_in_training(model: str, folder: Path) -> list[str]:
    """Trains without changing a weight; returns the questions that this process asked meanwhile."""
    asked = []
    score = fact_accuracy.score_answers
    fact_accuracy.score_answers = lambda m, t, prompts, *args, **kwargs: (
        asked.extend(prompts) or score(m, t, prompts, *args, **kwargs)
    )
    try:
        language_model, tokenizer = load_model_and_tokenizer(model)
        rows = Dataset.from_dict({"prompt": ["Q: a\nA:"] * 4, "completion": [" b"] * 4})
        args = SFTConfig(
            str(folder / "run"), learning_rate=0.0, num_train_epochs=1, report_to=[], use_cpu=True, bf16=False
        )
        trainer = SFTTrainer(language_model, args, train_dataset=rows, processing_class=tokenizer)
        path = folder / "accuracy.jsonl"
        trainer.add_callback(FactAccuracyCallback(trainer, {"facts": toy_facts()}, path, batch_size=5))
        trainer.train()
    finally:
        fact_accuracy.score_answers = score
    return asked


def share(folder: Path) -> None:
    seen = {"nothing": map_in_parallel(str, [])}
    rank = PartialState().process_index
    seen["map"] = map_in_parallel(lambda item: (PartialState().process_index, item), "abc")
    seen["main"] = on_main_process(lambda: rank)

    def fail_at_b(item: str) -> None:
        if item == "b":
            raise ValueError("b is bad")

    def fail() -> None:
        raise ValueError("on the main process")

    for name, call in {
        "map error": lambda: map_in_parallel(fail_at_b, "abc"),
        "main error": lambda: on_main_process(fail),
    }.items():
        try:
            call()
        except Exception as error:
            seen[name] = repr(error)
    torch.save(seen, folder / f"{rank}.pt")


def annotate_until_killed(script: str, *flags: str) -> None:
    append = ProgressFile.append

    def append_or_die(self, unit, result):
        append(self, unit, result)
        if len(self.results) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    ProgressFile.append = append_or_die
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "annotate":
        annotate_until_killed(*rest)
    PartialState(cpu=True)
    if task == "share":
        share(Path(rest[0]))
    if task == "train":
        torch.save(asked_in_training(rest[0], Path(rest[1])), Path(rest[1]) / f"{PartialState().process_index}.pt")
    leave_processes()
