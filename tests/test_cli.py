# SPDX-License-Identifier: Apache-2.0
"""`trl-selfdistill`: what it says to wrong input, and how it starts and ends a program."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from accelerate.commands import config

from trl_selfdistill import cli


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """No GPU and no configuration of the user; what the command sets is undone."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    monkeypatch.setattr(config, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("line", "num_gpus", "message"),
    [
        ("anotate", 0, "invalid choice: 'anotate'.*annotate.*check-distributed"),
        ("compare --config huge", 0, "'huge' is no file and none of compare_default, .*, quickstart"),
        ("mix --config_file dp", 0, "'dp' is no file and none of cpu, ddp, deepspeed_zero2, deepspeed_zero3, fsdp2"),
        ("study --config_file ddp", 0, "ddp.yaml starts 8 processes.* torch finds 0 here. Use --config_file cpu.$"),
        ("study --num_processes 3", 2, "ddp.yaml starts 3 processes.*finds 2 here. Set --num_processes 2"),
        ("mix --accelerate_config fsdp2 --num_processes 4 --num_machines 2", 1, "2 processes.* Set --num_processes 2"),
        ("mix --num_machines 0", 1, "--num_machines: must be a whole number from 1 on, got '0'"),
        ("check --num_processes none", 1, "--num_processes: must be a whole number"),
        ("mix --config broken.yaml", 0, "--config: 'broken.yaml' is not YAML: .*expected ',' or ']'"),
        ("mix --config_file list.yaml", 0, "'list.yaml' must hold `name: value` in each line"),
        ("study --num_machines 2", 0, "you need to specify the main process IP"),
        ("report", 0, "report needs no_such_package. Run: pip install no_such_package"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, monkeypatch, capsys, line, num_gpus, message):
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("relations: [P17\nseed: 0\n")
    Path("list.yaml").write_text("- relations\n")
    monkeypatch.setattr(cli, "STUDY_PACKAGES", ("peft", *["no_such_package"] * (line == "report")))
    monkeypatch.setattr("sys.argv", ["trl-selfdistill", *line.split()])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_gpus)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    status = 1 if line.startswith("check ") else 2
    assert ended.value.code == status and re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("sys.exit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.kill(os.getppid(), signal.SIGINT); sys.exit(130)", 130),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)", 143),  # it does not go on alone
    ],
)
def test_a_program_has_all_cores_and_its_exit_status_is_the_command_s(tmp_path, capfd, end, status):
    program = tmp_path / "program.py"
    names = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "TQDM_MININTERVAL")
    shown = f"*sys.argv[1:], *map(os.environ.get, {names})"
    program.write_text(f"import os, signal, sys, time\nprint({shown}, flush=True)\n{end}\n")
    assert cli._launch([str(program), "--num_known", "3"], {}) == status
    assert capfd.readouterr().out.split() == ["--num_known", "3", str(torch.get_num_threads()), "8589934592", "30"]
