# SPDX-License-Identifier: Apache-2.0
"""The folder of `build_hub_kernel.py` is a Hub kernel, which runs away from this package."""

import importlib.util
import json
import sys

import pytest
import torch
from toy_study import run_script


def load(folder):
    """A variant as `kernels` imports it: by its file, under a name that nobody else has."""
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("library", ["importlib", "kernels"])
def test_a_hub_kernel_runs_without_this_package(tmp_path, library):
    folder = tmp_path / "kernel"
    for _ in range(2):  # once more in the place of the first
        run_script("build_hub_kernel.py", "--output_dir", folder, "--repo_id", "me/kernel")
    kernel = load(folder / "build" / "torch-cuda")
    if library == "kernels":
        kernels = pytest.importorskip("kernels")
        kernels._rust.Build.open(folder)  # checks build.toml
        kernel = kernels.get_local_kernel(folder, backend="cpu")
    assert not kernel.linear_ce_kl.__module__.startswith("trl_selfdistill.")
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.tensor([0, 4, -100])
    inputs = (hidden, kernel.LMHead(weight)) * 2
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)  # the KL to itself is 0
    for impl in ("torch", "triton"):
        torch.testing.assert_close(kernel.linear_ce_kl(*inputs, labels, kl_weight=0.3, impl=impl).loss, expected)


def test_a_folder_of_somebody_else_stays(tmp_path, capsys):
    (tmp_path / "build.toml").write_text("[general]")
    with pytest.raises(SystemExit):
        run_script("build_hub_kernel.py", "--output_dir", tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / "build.toml"] and "no kernel of this script" in capsys.readouterr().err
