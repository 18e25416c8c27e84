# SPDX-License-Identifier: Apache-2.0
"""The folder of `build_hub_kernel.py` is a Hub kernel, which runs away from this package."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch


SCRIPT = Path(__file__).parents[1] / "scripts" / "build_hub_kernel.py"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "kernel"
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--output_dir", str(folder), "--repo_id", "me/kernel"])
    for _ in range(2):  # once more in the place of the first
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return folder


def load(variant: Path):
    """As `kernels` imports a variant: by its file, under a name that nobody else has."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(kernel):
    assert not kernel.linear_ce_kl.__module__.startswith("trl_selfdistill")
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.tensor([0, 4, -100])
    head = kernel.LMHead(weight)
    for impl in ("torch", "triton"):
        output = kernel.linear_ce_kl(hidden, head, hidden, head, labels, kl_weight=0.3, impl=impl)
        expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
        torch.testing.assert_close(output.loss, expected)  # the KL to itself is 0
        assert torch.autograd.grad(output.loss, weight)[0].abs().sum() > 0


def test_it_runs_without_this_package(folder):
    assert (folder / "torch-ext" / "linear_ce_kl" / "ce_kl_triton.py").is_file()
    check(load(folder / "build" / "torch-cuda"))


def test_the_kernels_library_reads_it(folder):
    kernels = pytest.importorskip("kernels")
    kernels._rust.Build.open(folder)  # build.toml is checked
    check(kernels.get_local_kernel(folder, backend="cpu"))
