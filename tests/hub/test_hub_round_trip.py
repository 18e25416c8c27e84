# SPDX-License-Identifier: Apache-2.0
"""What is pushed loads with the unmodified clients of Hugging Face, from a Hub that is a folder, and does the same."""

import copy
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import evaluate
import pytest
import torch
from conftest import add_code, build_model
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, get_peft_model
from sft_runs import train
from study_records import write_checkpoint
from toy_study import run_script
from transformers import AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer, Wav2Vec2FeatureExtractor

from trl_selfdistill.files import read_json, write_jsonl
from trl_selfdistill.hub.model_card import update_model_card
from trl_selfdistill.studies.tables import load_table


PROMPT = "Q: Which country is Lyon located in?\nA:"
TOKEN = "hf_" + "w" * 34


class FolderHub:
    """Takes what is pushed to a repository into `<root>/<type>/<repo_id>`; a pull request into `<type>.pr`."""

    def __init__(self, root: Path):
        self.root, self.private, self.commits, self.refusals = root, {}, [], []

    def create_repo(self, api, repo_id, *, private=None, **options):
        self.private.setdefault(repo_id, private)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, api, repo_id, operations, *, repo_type=None, create_pr=None, **options):
        if self.refusals:
            raise OSError(f"{self.refusals.pop()} for a request of Bearer {TOKEN}")  # a client may show all of it
        self.commits.append(repo_id)
        for operation in operations:
            with operation.as_file() as file:
                self._write(f"{repo_type}{'.pr' * create_pr}/{repo_id}/{operation.path_in_repo}", file.read())
        return SimpleNamespace(commit_url=f"{repo_id}/commit/1", pr_url=f"{repo_id}/discussions/1" * create_pr)

    def upload_folder(self, api, *, repo_id, folder_path, path_in_repo=None, ignore_patterns=None, **options):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            self._write(f"model/{repo_id}/{path_in_repo or '.'}/{name}", Path(folder_path, name).read_bytes())
        done = Future()
        done.set_result(None)
        return done

    def _write(self, name: str, content: bytes) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process pushes to, by the signatures of the installed huggingface_hub."""
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("create_repo", "create_commit", "upload_folder"):
        monkeypatch.setattr(HfApi, name, create_autospec(getattr(HfApi, name), side_effect=getattr(hub, name)))
        monkeypatch.setattr(f"transformers.trainer.{name}", getattr(HfApi(), name), raising=False)  # of version 4
    return hub


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tokenizer)


def with_code(folder: Path, tokenizer) -> Path:
    """The checkpoint with code, two templates and a feature extractor."""
    add_code(folder)
    (folder / "train.py").write_text("not of the model")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ documents }}"}
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    return folder


def publish(*flags) -> None:
    run_script("publish_model.py", "--license", "apache-2.0", *flags)


def answer(model, tokenizer) -> list[int]:
    return model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist()


def test_what_is_published_loads_and_does_the_same(hub, checkpoint, tmp_path, tokenizer):
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
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

    assert [name for name, private in hub.private.items() if private] == ["alice/adapter"]
    assert sorted(hub.commits) == [f"alice/{name}" for name in ("adapter", "code", "facts", "hallucination", "m")]
    published = [path for path in hub.root.rglob("*") if path.is_file()]
    assert not any(path.name == "train.py" or str(tmp_path).encode() in path.read_bytes() for path in published)
    models, alice = hub.root / "model/alice", hub.root / "dataset/alice/facts"
    card = ModelCard.load(models / "m/README.md")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["alice/facts"]
    assert read_json(models / "adapter/adapter_config.json")["base_model_name_or_path"] == "alice/m"

    shutil.rmtree(checkpoint)
    loaded = AutoTokenizer.from_pretrained(models / "code", trust_remote_code=True)
    assert sorted(loaded.chat_template) == ["default", "rag"]
    assert AutoFeatureExtractor.from_pretrained(models / "code").sampling_rate == 8000
    code = AutoModelForCausalLM.from_pretrained(models / "code", trust_remote_code=True)
    expected = answer(build_model(tokenizer).eval(), tokenizer)
    assert type(code).__name__ == "Tiny" and answer(code, loaded) == expected
    assert answer(AutoModelForCausalLM.from_pretrained(models / "m"), loaded) == expected
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "m"), models / "adapter")
    assert answer(found, loaded) == answer(adapter, tokenizer) != expected
    assert load_dataset(str(alice), "mix", split="new")["question"][:] == ["new"]
    assert load_table(alice, "new", "mix")["answer"][:] == ["1789-07-14"]
    rates = evaluate.load(str(hub.root / "space/alice/hallucination"))
    assert rates.compute(predictions=["Paris", "Bonn"], references=["Paris", "Berlin"])["hallucination_rate"] == 0.5


def test_the_trainers_push_the_card_that_they_save(hub, tmp_path, model_dir):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1, teacher_snapshot_steps=1)
    settings |= dict(push_to_hub=True, hub_model_id="alice/trained", hub_private_repo=True)
    run = train(tmp_path, str(model_dir), **settings)
    repo = hub.root / "model/alice/trained"
    for push in (run.save_model, lambda: run.push_to_hub(dataset_name="alice/data")):
        push()
        assert hub.private["alice/trained"]
        assert not any(path.name.startswith(("_teacher", "checkpoint-")) for path in repo.iterdir())
        card = (repo / "README.md").read_text()
        assert card == (tmp_path / "run" / "README.md").read_text() and str(tmp_path) not in card
        assert "1 steps of plain SFT on all of the data (in the paper, on its Known facts only). SHA-256" in card
    assert ModelCard(card).data.datasets == ["alice/data"]


def test_a_refusal_is_explained_and_the_next_run_completes_it(hub, checkpoint, capsys):
    hub.refusals = [403]
    flags = ("--checkpoints", checkpoint, "--repo_id", "alice/m")
    with pytest.raises(SystemExit, match="alice/m was not published: 403 .*`hf auth login`") as refused:
        publish(*flags)
    assert TOKEN not in str(refused.value) and not hub.commits
    publish(*flags, "--create-pr")
    assert hub.commits == ["alice/m"] and "Published: alice/m/discussions/1" in capsys.readouterr().out
    assert (hub.root / "model.pr/alice/m/README.md").is_file() and not (hub.root / "model").exists()
