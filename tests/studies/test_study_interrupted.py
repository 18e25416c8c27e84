# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, a kill and a full disk in the middle of a study: what is done stays, and the next run goes on."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
from toy_study import SCRIPTS, run_script, runs_of
from trl import ModelConfig

from trl_selfdistill.slick.process_sharding import ProgressFile
from trl_selfdistill.studies import runs
from trl_selfdistill.studies.arguments import SlickArguments
from trl_selfdistill.studies.stages import annotate_stage


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
from trl_selfdistill.studies.runs import StepTimes

on_step_end = StepTimes.on_step_end

def slow(self, args, state, control, **kwargs):
    on_step_end(self, args, state, control, **kwargs)
    if state.global_step == 6:  # in the second epoch, after the checkpoint of the first
        open(args.output_dir + "/waiting", "w").close()
        time.sleep(250)

StepTimes.on_step_end = slow
"""


def test_ctrl_c_loses_nothing_and_the_next_run_resumes(toy_study, copied_study, tmp_path, monkeypatch):
    before = runs_of(copied_study.output)
    shutil.rmtree(copied_study.output / "sft")
    process = start(tmp_path, SLOW_AT_STEP_6, [*copied_study.flags(copied_study.output), "--variants", "sft"])
    partial = copied_study.output / "sft.partial"
    while process.poll() is None and not (partial / "waiting").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.endswith("Interrupted. What is done stays: run the same command again to go on.\n")
    assert (partial / "checkpoint-4" / "trainer_state.json").is_file() and not (copied_study.output / "sft").exists()

    resumed = []
    find = runs.last_complete_checkpoint
    monkeypatch.setattr(runs, "last_complete_checkpoint", lambda path: resumed.append(find(path)) or resumed[-1])
    run_script("run_study.py", *copied_study.flags(copied_study.output), "--variants", "sft")
    assert resumed == [str(partial / "checkpoint-4")]
    after = runs_of(copied_study.output)
    assert all(before[name] == after[name] for name in before if name != "sft")
    for file in ("model.safetensors", "accuracy.jsonl"):
        assert (copied_study.output / "sft" / file).read_bytes() == (toy_study.output / "sft" / file).read_bytes()


class Killed(BaseException):
    """Ends the annotation as a kill would, but for the process."""


def test_kill_in_the_annotation_loses_nothing(toy_study, tmp_path, monkeypatch):
    """A half-written line at the end of the progress is dropped, what stands before it is kept."""
    slick = SlickArguments(slick_num_prompts=2, slick_num_shots=2)
    run = type("Run", (), {"bf16": False, "seed": 42, "trust_remote_code": False})
    annotate = [
        str(toy_study.model),
        ModelConfig(),
        toy_study.output / "facts/facts.jsonl",
        slick,
        tmp_path / "out",
    ]
    append = ProgressFile.append

    def append_or_die(self, unit, result):
        append(self, unit, result)
        if len(self.results) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ProgressFile, "append", append_or_die)
        annotate_stage(*annotate, run)
    progress = tmp_path / "out.partial" / "progress.jsonl"
    whole = progress.read_bytes()
    assert whole.count(b"\n") == 4  # identity and three units, of four
    progress.write_bytes(whole + b'{"unit": "cut o')
    annotated = annotate_stage(*annotate, run)
    assert annotated.read_bytes() == (toy_study.output / "annotated" / "facts.jsonl").read_bytes()
    assert (annotated.parent / "progress.jsonl").read_bytes().startswith(whole)
