# SPDX-License-Identifier: Apache-2.0
"""Pushed over HTTP to hub_server.py, and loaded from there by the unmodified clients of Hugging Face."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from hub_server import TOKEN, run_hub
from huggingface_hub import ModelCard, constants, hf_api
from peft import LoraConfig, get_peft_model
from study_records import write_checkpoint
from toy_study import run_script
from transformers import AutoModelForCausalLM, Wav2Vec2FeatureExtractor
from transformers.utils import hub as hub_of_transformers

from trl_selfdistill import SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.files import read_json, write_json, write_jsonl
from trl_selfdistill.hub.model_card import update_model_card


PROMPT = "Q: Which country is Lyon located in?\nA:"


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process pushes to."""
    with run_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # The client of transformers; version 4 uses that of huggingface_hub
        monkeypatch.setattr(getattr(hub_of_transformers, "hf_api", lambda: hf_api.api)(), "endpoint", hub.url)
        yield hub


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tokenizer)


def with_code(folder: Path, tokenizer) -> Path:
    """The checkpoint with a class whose modules import each other, two templates and a feature extractor."""
    (folder / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import Config\n"
        "class Tiny(LlamaForCausalLM):\n    config_class = Config\n"
    )
    (folder / "configuration_tiny.py").write_text(
        "from transformers import LlamaConfig\nfrom .names import NAME\n"
        "class Config(LlamaConfig):\n    model_type = NAME\n"
    )
    (folder / "names.py").write_text("NAME = 'tiny'\n")
    (folder / "train.py").write_text("not of the model")
    names = {"AutoConfig": "configuration_tiny.Config", "AutoModelForCausalLM": "modeling_tiny.Tiny"}
    write_json(folder / "config.json", read_json(folder / "config.json") | {"auto_map": names, "model_type": "tiny"})
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ documents }}"}
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    return folder


def publish(*flags) -> None:
    run_script("publish_model.py", "--license", "apache-2.0", *flags)


def load_all(hub, home: Path) -> dict:
    """The `result` of [`LOAD`] in a process with `hub` as its Hub and a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.split("RESULT")[-1])


LOAD = f"""
import evaluate, json
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer
from trl_selfdistill.studies.tables import load_table

tokenizer = AutoTokenizer.from_pretrained("alice/code", trust_remote_code=True)
ids = tokenizer({PROMPT!r}, return_tensors="pt")
models = {{"m": AutoModelForCausalLM.from_pretrained("alice/m")}}
models["adapter"] = AutoPeftModelForCausalLM.from_pretrained("alice/adapter")
base = AutoModelForCausalLM.from_pretrained("alice/m")
models["mine"] = PeftModel.from_pretrained(base, "alice/adapter", subfolder="mine")
models["code"] = AutoModelForCausalLM.from_pretrained("alice/code", trust_remote_code=True)
result = {{"templates": sorted(tokenizer.chat_template), "class": type(models["code"]).__name__}}
result["sampling_rate"] = AutoFeatureExtractor.from_pretrained("alice/code").sampling_rate
for name, model in models.items():
    result[name] = model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist()
result["facts"] = load_dataset("alice/facts", "mix", split="new")["question"][:]
result["answers"] = load_table("alice/facts", "new", "mix")["answer"][:]
metric = evaluate.load("alice/hallucination")
result["metric"] = metric.compute(predictions=["Paris", "Bonn"], references=["Paris", "Berlin"])["hallucination_rate"]
print("RESULT", json.dumps(result))
"""


def test_what_is_published_loads_and_does_the_same(hub, checkpoint, tmp_path, tokenizer):
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
    adapter.add_adapter("mine", config)
    adapter.save_pretrained(tmp_path / "adapter")
    update_model_card(tmp_path / "adapter", training={"is_adapter": True})
    for split in ("known", "new", "heldout"):
        fact = {"fact_id": "r/0", "question": split, "answer": "1789-07-14", "slick_category": "Unknown"}
        write_jsonl(tmp_path / "mix" / f"{split}.jsonl", [fact])
    dataset = ("--dataset_repo_id", "alice/facts", "--mix", tmp_path / "mix", "--dataset_license", "cc-by-4.0")
    metric = ("--metric_repo_id", "alice/hallucination")
    publish("--checkpoints", checkpoint, "--repo_id", "alice/m", "--public", *dataset, *metric)
    flags = ("--checkpoints", tmp_path / "adapter", "--repo_id", "alice/adapter")
    with pytest.raises(SystemExit, match="trained on a local model.*`--base_model your-name/stage1`"):
        publish(*flags)
    publish(*flags, "--base_model", "alice/m")
    publish("--checkpoints", with_code(checkpoint, tokenizer), "--repo_id", "alice/code", "--public")

    assert {key for key, repo in hub.repos.items() if repo.private} == {("model", "alice/adapter")}
    assert all(repo.num_commits == 1 for repo in hub.repos.values())
    published = [content for repo in hub.repos.values() for content in repo.files.values()]
    assert not any(str(tmp_path).encode() in content for content in published)
    assert "train.py" not in hub.repos["model", "alice/code"].files
    card = ModelCard(hub.repos["model", "alice/m"].files["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.datasets == ["alice/facts"]

    ids = tokenizer(PROMPT, return_tensors="pt")
    models = {"m": build_model(tokenizer).eval(), "adapter": adapter, "mine": adapter}
    expected = {"facts": ["new"], "answers": ["1789-07-14"], "metric": 0.5, "templates": ["default", "rag"]}
    expected |= {"class": "Tiny", "sampling_rate": 8000}
    for name, model in models.items():
        adapter.set_adapter("mine" if name == "mine" else "default")
        expected[name] = model.generate(**ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert expected["m"] != expected["adapter"] != expected["mine"]
    expected["code"] = expected["m"]
    assert load_all(hub, tmp_path / "home") == expected


def test_the_trainers_push_the_card_that_they_save(hub, tmp_path, model_dir):
    rows = {"prompt": ["Q: a\nA:"] * 4, "completion": [" x"] * 4}
    settings = dict(max_steps=2, save_steps=1, use_cpu=True, bf16=False, report_to="none", teacher_snapshot_steps=1)
    settings |= dict(push_to_hub=True, hub_model_id="alice/trained", hub_private_repo=True)
    config = SelfDistillSFTConfig(str(tmp_path / "run"), **settings)
    trainer = SelfDistillSFTTrainer(str(model_dir), config, train_dataset=Dataset.from_dict(rows))
    trainer.train()
    repo = hub.repos["model", "alice/trained"]
    for push in (trainer.save_model, lambda: trainer.push_to_hub(dataset_name="alice/data")):
        push()
        assert repo.private and not any(name.startswith(("_teacher", "checkpoint-")) for name in repo.files)
        card = repo.files["README.md"].decode()
        assert card == (tmp_path / "run" / "README.md").read_text() and str(tmp_path) not in card
        assert "1 steps of plain SFT on all of the data (in the paper, on its Known facts only). SHA-256" in card
    assert ModelCard(card).data.datasets == ["alice/data"]


@pytest.mark.parametrize("status, advice", [(401, "hf auth login"), (403, "--create_pr"), (500, "no file twice")])
def test_a_refusal_is_explained_without_the_token_and_the_next_run_completes_it(hub, checkpoint, status, advice):
    hub.failing_commits = [status]
    flags = ("--checkpoints", checkpoint, "--repo_id", "alice/m")
    with pytest.raises(SystemExit, match=f"alice/m was not published.*{advice}") as refused:
        publish(*flags)
    assert TOKEN not in str(refused.value) and hub.repos["model", "alice/m"].num_commits == 0
    publish(*flags)
    assert hub.repos["model", "alice/m"].num_commits == 1


def test_a_pull_request_by_choice(hub, checkpoint, capsys):
    publish("--checkpoints", checkpoint, "--repo_id", "alice/m", "--create-pr")
    assert f"Published: {hub.url}/alice/m/discussions/1" in capsys.readouterr().out
    repo = hub.repos["model", "alice/m"]
    assert repo.num_commits == 0 and "README.md" in repo.pull_requests[0]
