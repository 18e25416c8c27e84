# SPDX-License-Identifier: Apache-2.0
"""What is published and what never is, without a network."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard
from study_records import write_checkpoint
from toy_study import SCRIPTS, run_script

from trl_selfdistill.hub.publishing import PublishError, plan_metric, plan_model, refuse_tokens, select_files
from trl_selfdistill.studies.publishing import plan_dataset, publish_command, repo_ids


TOKEN = "hf_" + "a" * 34
LICENCE = {"license": "apache-2.0"}


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """A finished arm with everything that a run may leave in its folder."""
    folder = write_checkpoint(tmp_path / "study" / "sft", tokenizer)
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (folder / name).write_text(TOKEN)
    for name in ("_teacher", "checkpoint-1", ".cache", "wandb", "runs", "__pycache__", ".git"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("secret")
    (folder / "train.log").write_text(TOKEN)
    (folder / ".env").write_text(TOKEN)
    return folder


def test_only_the_model_its_card_and_its_evaluation_are_published(checkpoint):
    plan = plan_model(checkpoint, "alice/m", LICENCE)
    assert {*plan.contents} == {
        ".eval_results/facts.yaml",
        "README.md",
        "accuracy.jsonl",
        "config.json",
        "curves.png",
        "chat_template.jinja",
        "generation_config.json",
        "model.safetensors",
        "model_card.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {"optimizer.pt", "training_args.bin", "_teacher/", "checkpoint-1/", ".cache/", "train.log", ".env"} <= {
        *plan.left_out
    }
    card = ModelCard(plan.contents["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.model_name == "m"


def test_links_are_not_followed(checkpoint, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to(tmp_path / "outside.json")
    (checkpoint / "vocab.json").symlink_to(checkpoint / "tokenizer.json")
    (checkpoint / "added_tokens.json").symlink_to(tmp_path / "nothing")
    (checkpoint / "LICENSES").symlink_to(tmp_path / "folder")
    os.mkfifo(checkpoint / "vocab.txt")
    plan = plan_model(checkpoint, "alice/m", LICENCE)
    for name in ("config.json", "vocab.json", "added_tokens.json", "LICENSES"):
        assert plan.left_out[name] == "a link" and name not in plan.contents
    assert plan.left_out["vocab.txt"] == "no plain file"
    assert all(isinstance(c, bytes) or c.parent == checkpoint for c in plan.contents.values())


def test_a_token_in_a_text_stops_the_publication_and_is_not_shown(checkpoint):
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"token": TOKEN}))
    with pytest.raises(PublishError, match="tokenizer_config.json holds what looks like an access token") as error:
        plan_model(checkpoint, "alice/m", LICENCE)
    assert TOKEN not in str(error.value)


def test_the_token_of_the_login_is_found_whatever_it_looks_like(checkpoint, monkeypatch):
    plan = plan_model(checkpoint, "alice/m", LICENCE)
    monkeypatch.setenv("HF_TOKEN", "Unknown means never produced")
    with pytest.raises(PublishError, match="README.md holds"):
        refuse_tokens(plan)


def test_what_is_missing_is_named(checkpoint, tmp_path):
    with pytest.raises(PublishError, match="licence of sft is not known.*org/model.*`--license apache-2.0`"):
        plan_model(checkpoint, "alice/m", {})
    with pytest.raises(PublishError, match="nothing is not a folder"):
        plan_model(tmp_path / "nothing", "alice/m", LICENCE)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(PublishError, match="holds no weights"):
        plan_model(checkpoint, "alice/m", LICENCE)


def test_an_adapter_gets_a_base_that_loads_elsewhere(checkpoint):
    config = {"base_model_name_or_path": str(checkpoint), "peft_type": "LORA"}
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match="trained on a local model.*`--base_model your-name/stage1`"):
        plan_model(checkpoint, "alice/m", LICENCE)
    plan = plan_model(checkpoint, "alice/m", {**LICENCE, "base_model": "alice/stage1"})
    assert json.loads(plan.contents["adapter_config.json"])["base_model_name_or_path"] == "alice/stage1"
    data = ModelCard(plan.contents["README.md"].decode()).data.to_dict()
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == (
        "peft",
        "alice/stage1",
        "adapter",
    )


def test_repositories_are_named_after_folders():
    assert repo_ids([Path("a/sft")], "alice/m") == {"alice/m": Path("a/sft")}
    with pytest.raises(PublishError, match="your-name/my-model, got 'm'"):
        repo_ids([Path("a/sft")], "m")
    with pytest.raises(PublishError, match="told apart by the names"):
        repo_ids([Path("a/sft"), Path("b/sft")], "alice/m")


def test_a_metric_is_called_as_its_space(tmp_path):
    for name in ("hallucination.py", "README.md", "app.py", "requirements.txt", "notes.log"):
        (tmp_path / name).write_text("")
    plan = plan_metric(tmp_path, "alice/hallucination")
    assert {*plan.contents} == {"hallucination.py", "README.md", "app.py", "requirements.txt"}
    assert plan.repo_type == "space" and plan.left_out == {"notes.log": "not a part of the model"}
    with pytest.raises(PublishError, match="loads the Space alice/other from its file other.py"):
        plan_metric(tmp_path, "alice/other")


HOSTILE = "x: [y]\n---\n<script>alert(1)</script> ](http://evil)"


def test_facts_have_a_card_that_nothing_in_them_breaks(tmp_path):
    rows = [{"slick_category": "HighlyKnown", "relation": HOSTILE}, {"slick_category": "Unknown", "relation": "r"}]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "progress.jsonl").write_text("")
    run = {"arguments": {"slick": {"num_prompts": 4, HOSTILE: HOSTILE}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    plan = plan_dataset("alice/facts", str(tmp_path), None, "cc-by-4.0", "org/model")
    assert {*plan.contents} == {"README.md", "annotated/facts.jsonl"}
    card = DatasetCard(plan.contents["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.configs[0]["config_name"] == "annotated"
    assert "| annotated | train | 1 | 0 | 0 | 1 | 2 |" in card.text and "<script>" not in card.content
    assert "| num_prompts | 4 |" in card.text and "](http://evil)" not in card.content
    with pytest.raises(PublishError, match="`dataset_license` is not set"):
        plan_dataset("alice/facts", str(tmp_path), None, None, None)
    with pytest.raises(PublishError, match="neither `annotated` nor `mix`"):
        plan_dataset("alice/facts", None, None, "mit", None)
    with pytest.raises(PublishError, match="`mix` is .* which holds no heldout.jsonl, known.jsonl, new.jsonl"):
        plan_dataset("alice/facts", None, str(tmp_path), "mit", None)


def test_dry_run_shows_every_file_and_writes_the_card_without_a_connection(checkpoint, capsys, monkeypatch):
    def no_connection(*args, **kwargs):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr("socket.socket.connect", no_connection)
    flags = ("--checkpoints", checkpoint, "--repo_id", "alice/m", "--license", "mit", "--dry-run")
    run_script("publish_model.py", *flags)
    shown = capsys.readouterr().out
    chosen, _ = select_files(checkpoint, ["*.safetensors", "README.md", "model_card.json", "tokenizer.json"])
    for name, path in chosen.items():
        assert f"{path.stat().st_size:>16,}  {name}\n" in shown
    assert "left out  _teacher/ (a folder)" in shown and TOKEN not in shown and "Nothing was sent" in shown
    assert ModelCard.load(checkpoint / "README.md").data.license == "mit"


def test_dry_run_beside_a_folder_that_cannot_be_written(checkpoint, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    flags = ["--checkpoints", checkpoint, "--repo_id", "alice/m", "--license", "mit", "--dry-run"]
    run_script("publish_model.py", *flags, "--card_dir", tmp_path / "cards")
    assert ModelCard.load(tmp_path / "cards" / "sft" / "README.md").data.license == "mit"
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="could not be written.*`--card_dir`"):
        run_script("publish_model.py", *flags, "--card_dir", tmp_path / "file")


def test_the_script_takes_no_token():
    command = [sys.executable, str(SCRIPTS / "publish_model.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--dry_run" in shown and "--create_pr" in shown and "--token" not in shown and "--hub_token" not in shown


def test_the_printed_command_is_the_one_that_publishes(checkpoint, capsys):
    command = shlex.split(publish_command([checkpoint]))
    assert command[:2] == ["python", "scripts/publish_model.py"] and command[-1] == "YOUR_NAME/model-facts"
    run_script("publish_model.py", *command[2:], "--license", "mit", "--dry-run")
    assert "model YOUR_NAME/model-facts: " in capsys.readouterr().out
