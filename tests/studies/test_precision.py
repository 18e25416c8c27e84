# SPDX-License-Identifier: Apache-2.0
"""Precision by device: what is native is chosen, what is said is kept, what is emulated is warned of."""

import logging
import os
import re
from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from trl import SFTConfig

from trl_selfdistill.files import write_json
from trl_selfdistill.studies import command_line, precision


@pytest.fixture
def cpu(monkeypatch):
    """A machine without an accelerator. The fixture's function says what oneDNN and the CPU have."""

    def has(onednn: bool, avx512: bool = False, amx: bool = False, machine: str = "x86_64") -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(precision.platform, "machine", lambda: machine)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return has


@pytest.mark.parametrize(
    ("onednn", "has", "native"),
    [
        (True, {"avx512": True}, True),
        (True, {"amx": True}, True),
        (True, {"machine": "aarch64"}, True),
        (True, {}, False),  # AVX-512 without BF16: oneDNN emulates it, and says yes
        (False, {"avx512": True}, False),  # ONEDNN_MAX_CPU_ISA=AVX2
    ],
)
def test_a_cpu_has_bf16_if_onednn_and_its_instructions_say_so(cpu, onednn, has, native):
    cpu(onednn, **has)
    assert precision.has_native_bf16("cpu") is native


@dataclass
class Arguments:
    output_dir: str = "outputs"
    bf16: bool | None = None


@pytest.mark.parametrize("dataclass_type", [Arguments, SFTConfig])
@pytest.mark.parametrize(
    ("native", "flags", "recorded", "launched", "bf16", "reason"),
    [
        (True, "", None, "no", True, "computes natively"),
        (False, "", None, "no", False, "computes natively"),
        (False, "--bf16 true", {"bf16": False}, "no", True, "as asked for.*emulates"),
        (True, "--bf16 false", {"bf16": True}, "no", False, "as asked for"),
        (True, "--config {}/c.yaml", None, "no", False, "as asked for"),
        (False, "", {"bf16": True}, "no", True, "like what .*emulates"),  # a study that was moved here
        (True, "", {"partial": {"config": {"bf16": False}}}, "no", False, "like what"),  # a killed training run
        (False, "", {"bf16": False}, "bf16", True, "--mixed_precision bf16"),
        (True, "--bf16 false", None, "bf16", False, "as asked for"),
    ],
)
def test_what_is_said_wins_then_what_is_there_then_the_device(
    cpu, tmp_path, monkeypatch, caplog, dataclass_type, native, flags, recorded, launched, bf16, reason
):
    cpu(native, avx512=native)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    if recorded is not None:
        folder = {"bf16": "out/annotated", "config": "out", "partial": "out.partial"}[next(iter(recorded))]
        write_json(tmp_path / folder / "run.json", {"arguments": recorded.get("partial", recorded)})
    (tmp_path / "c.yaml").write_text("bf16: false\n")
    monkeypatch.setattr("sys.argv", f"x.py --output_dir {{}}/out {flags}".replace("{}", str(tmp_path)).split())
    parsed = []
    with caplog.at_level(logging.INFO):
        command_line.run_script(parsed.append, (dataclass_type,), "x")
    assert parsed[0].bf16 is bf16 and getattr(parsed[0], "use_cpu", True)
    assert (getattr(parsed[0], "mixed_precision", "no") == "bf16") <= bf16
    [record] = [record for record in caplog.records if record.message.startswith("Precision: ")]
    assert record.levelno == (logging.WARNING if bf16 and not native else logging.INFO)
    assert re.search(f"Precision: {'bf16' if bf16 else 'fp'}.*{reason}", record.message)


def test_fp16_of_the_launcher_is_what_a_training_computes_in_and_what_else_decides_is_said(cpu, monkeypatch):
    cpu(False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    training = Namespace(output_dir=None, bf16=None, fp16=False, use_cpu=False)
    assert "fp16 autocast" in precision.choose_precision(training)[1] and training.fp16 and not training.bf16
    assert "fp32, the fastest" in precision.choose_precision(Namespace(output_dir=None, bf16=None))[1]
    level, message = precision.choose_precision(Namespace(output_dir=None, bf16=None, dtype="bfloat16"))
    assert level == logging.WARNING and re.search("fp32, .*Weights: bfloat16, .*emulates", message)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    training = Namespace(output_dir=None, bf16=None, fp16=False, use_cpu=False)
    assert "Precision: fp8" in precision.choose_precision(training)[1] and training.bf16 is False
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp8"
