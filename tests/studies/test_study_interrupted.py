# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, a kill and a full disk in the middle of a study: what is done stays, and the next run resumes."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from full_disk import file_size_limit
from toy_study import SCRIPTS, rerun, run_script, runs

from trl_selfdistill.studies import training_stage
from trl_selfdistill.studies.arguments import ModelAndFactsArguments, SlickArguments
from trl_selfdistill.studies.stages import annotate_stage, facts_stage


def start(tmp_path, patch: str, flags: list[str]) -> subprocess.Popen:
    """Starts run_study.py in a process of its own, after `patch`."""
    driver = tmp_path / "driver.py"
    run = f"import runpy, sys\nsys.argv = {[str(SCRIPTS / 'run_study.py'), *flags]!r}\n"
    driver.write_text(f"{patch}\n{run}runpy.run_path(sys.argv[0], run_name='__main__')\n")
    return subprocess.Popen(
        [sys.executable, str(driver)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell lets its background jobs ignore Ctrl-C, and what they start inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


SLOW_AT_STEP_6 = """
import time
from trl_selfdistill.studies.run_cost import RunCost

on_step_end = RunCost.on_step_end

def slow(self, args, state, control, **kwargs):
    on_step_end(self, args, state, control, **kwargs)
    if state.global_step == 6:  # in the second epoch, after the checkpoint of the first
        open(args.output_dir + "/waiting", "w").close()
        time.sleep(250)

RunCost.on_step_end = slow
"""


def test_ctrl_c_loses_nothing_and_the_next_run_resumes(toy_study, copied_study, tmp_path, monkeypatch):
    before = runs(copied_study)
    shutil.rmtree(copied_study.output / "sft")
    process = start(tmp_path, SLOW_AT_STEP_6, [*copied_study.flags(copied_study.output), "--arms", "sft"])
    partial = copied_study.output / "sft.partial"
    while process.poll() is None and not (partial / "waiting").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.endswith("Interrupted. What is done stays: run the same command again to go on.\n")
    assert (partial / "checkpoint-4" / "trainer_state.json").is_file() and not (copied_study.output / "sft").exists()

    resumed = []
    find = training_stage.last_complete_checkpoint
    monkeypatch.setattr(
        training_stage, "last_complete_checkpoint", lambda path: resumed.append(find(path)) or resumed[-1]
    )
    run_script("run_study.py", *copied_study.flags(copied_study.output), "--arms", "sft")
    assert resumed == [str(partial / "checkpoint-4")]
    after = runs(copied_study)
    assert all(before[name] == after[name] for name in before if name != "sft")
    for file in ("model.safetensors", "accuracy.jsonl"):
        assert (copied_study.output / "sft" / file).read_bytes() == (toy_study.output / "sft" / file).read_bytes()


KILL_AT_UNIT_3 = """
import os, signal
from trl_selfdistill.slick.progress_file import ProgressFile

append = ProgressFile.append

def append_or_die(self, unit, result):
    append(self, unit, result)
    if len(self.results) == 3:
        with self._path.open("a") as file:
            file.write('{"unit": "cut o')
        os.kill(os.getpid(), signal.SIGKILL)

ProgressFile.append = append_or_die
"""


def test_kill_in_the_annotation_loses_nothing(toy_study, tmp_path, monkeypatch):
    study = toy_study._replace(output=tmp_path / "study")
    process = start(tmp_path, KILL_AT_UNIT_3, study.flags(study.output))
    _, errors = process.communicate(timeout=250)
    assert process.returncode == -signal.SIGKILL, errors
    facts_run = (study.output / "facts" / "run.json").read_bytes()
    progress = (study.output / "annotated.partial" / "progress.jsonl").read_bytes()

    slick = SlickArguments(slick_num_prompts=2, slick_num_shots=2)
    facts = facts_stage(ModelAndFactsArguments(str(study.model), str(study.facts)), study.output / "facts")
    annotated = annotate_stage(str(study.model), facts, slick, study.output / "annotated", seed=42)
    assert (study.output / "facts" / "run.json").read_bytes() == facts_run
    assert annotated.read_bytes() == (toy_study.output / "annotated" / "facts.jsonl").read_bytes()
    whole = progress.rpartition(b"\n")[0]
    assert whole.count(b"\n") == 3  # identity and three units, of four
    assert (annotated.parent / "progress.jsonl").read_bytes().startswith(whole)


@pytest.mark.parametrize("limit, what", [(1_000, "run file"), (100_000, "model"), (250_000, "optimizer")])
def test_full_disk_while_an_arm_is_saved(toy_study, copied_study, limit, what):
    flags = (*copied_study.flags(copied_study.output), "--arms", "sft")
    shutil.rmtree(copied_study.output / "sft")
    shutil.copytree(
        copied_study.output / "selfdistill", copied_study.output / "sft"
    )  # an old result by other arguments
    before = runs(copied_study)
    with file_size_limit(limit), pytest.raises(OSError, match=r"could not write into .*sft\.partial.*same command"):
        run_script("run_study.py", *flags)
    assert runs(copied_study) == before
    run_script("run_study.py", *flags)
    for file in ("model.safetensors", "accuracy.jsonl"):
        assert (copied_study.output / "sft" / file).read_bytes() == (toy_study.output / "sft" / file).read_bytes()


def test_full_disk_while_the_report_is_written(copied_study):
    with file_size_limit(10_000), pytest.raises(OSError, match="'report' could not write into"):
        run_script("run_study.py", *copied_study.flags(copied_study.output))
    assert rerun(copied_study) == set()


def test_cut_off_checkpoints_are_not_resumed_from(tmp_path):
    for step, content in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    assert training_stage.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert training_stage.last_complete_checkpoint(tmp_path / "checkpoint-4") is None
