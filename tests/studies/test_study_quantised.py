# SPDX-License-Identifier: Apache-2.0
"""The whole study in 4 bit: adapters on a quantised base, from the annotation to the report."""

import json

from safetensors import safe_open
from toy_study import rerun


ADAPTER = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]


def test_the_study_runs_in_4_bit(copied_study):
    arms = ["--arms", "sft", "selfdistill", "frozen"]
    assert rerun(copied_study, "--load_in_4bit", *ADAPTER, *arms) >= {"annotated", "stage1", "sft", "selfdistill"}
    for name in ("stage1", "sft", "selfdistill", "frozen"):
        folder = copied_study.output / name
        assert not (folder / "model.safetensors").exists()  # the base is not saved again, merged or not
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert file.keys() and all("lora_" in key and "teacher" not in key for key in file.keys())
        training = json.loads((folder / "training.json").read_text())
        assert training["is_adapter"] and 0 < training["trainable_parameters"] < 0.1 * training["parameters"]
    log = json.loads((copied_study.output / "selfdistill" / "training.json").read_text())["log_history"]
    assert max(row.get("kl_loss", 0) for row in log) > 0
    assert (copied_study.output / "report.md").read_text().count("|") > 20
