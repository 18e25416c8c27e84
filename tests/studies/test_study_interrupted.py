# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in the middle of a study: what is done stays, and the next run goes on."""

import shutil
import signal
import subprocess
import sys
import time

from toy_study import SCRIPTS, run_script, runs_of

from trl_selfdistill.studies import runs


SLOW_AT_STEP_6 = """
import runpy, sys, time
from trl_selfdistill.studies.runs import StepTimes

on_step_end = StepTimes.on_step_end

def slow(self, args, state, control, **kwargs):
    on_step_end(self, args, state, control, **kwargs)
    if state.global_step == 6:  # in the second epoch, after the checkpoint of the first
        open(args.output_dir + "/waiting", "w").close()
        time.sleep(250)

StepTimes.on_step_end = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_loses_nothing_and_the_next_run_resumes(toy_study, copied_study, tmp_path, monkeypatch):
    before = runs_of(copied_study.output)
    shutil.rmtree(copied_study.output / "sft")
    flags = [*copied_study.flags(copied_study.output), "--variants", "sft"]
    (tmp_path / "driver.py").write_text(
        f"import sys\nsys.argv = {[str(SCRIPTS / 'run_study.py'), *flags]!r}\n{SLOW_AT_STEP_6}"
    )
    # A shell lets its background jobs ignore Ctrl-C, and what they start inherits that
    options = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), text=True)
    command, pipe = [sys.executable, tmp_path / "driver.py"], subprocess.PIPE
    process = subprocess.Popen(command, stderr=pipe, stdout=pipe, **options)
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
    run_script("run_study.py", *flags)
    assert resumed == [str(partial / "checkpoint-4")]
    after = runs_of(copied_study.output)
    assert all(before[name] == after[name] for name in before if name != "sft")
    for file in ("model.safetensors", "accuracy.jsonl"):
        assert (copied_study.output / "sft" / file).read_bytes() == (toy_study.output / "sft" / file).read_bytes()
