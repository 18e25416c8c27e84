# SPDX-License-Identifier: Apache-2.0
"""Push and load over HTTP: the unmodified clients of Hugging Face, each a process, against hub_server.py."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import build_model
from hub_server import READ_TOKEN, WRITE_TOKEN, Repo, run_hub, validate_metadata
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from study_records import write_checkpoint
from toy_study import SCRIPTS
from transformers import AutoModelForCausalLM, AutoTokenizer


METRIC = Path(__file__).parents[2] / "evaluate_metrics" / "hallucination"
PROMPT = "Q: Which country is Lyon located in?\nA:"
GENERATE = f"""
import json, sys
ids = tokenizer({PROMPT!r}, return_tensors="pt")
output = model.generate(**ids, max_new_tokens=12, do_sample=False)
print("RESULT", json.dumps(output[0].tolist()))
"""


@pytest.fixture
def hub():
    with run_hub() as hub:
        yield hub


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", tokenizer)


class Clients:
    """Processes that talk to the loopback Hub only, with a cache of their own."""

    def __init__(self, hub, home: Path):
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # the loopback Hub stores by LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self, command: list, token: str | None = WRITE_TOKEN, **options) -> subprocess.Popen:
        environment = {**self.environment, "HF_TOKEN": token or ""}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes, **options)

    def publish(self, *flags, token: str | None = WRITE_TOKEN, **options) -> tuple[int, str]:
        """Exit status and output of scripts/publish_model.py, in which there is never a token."""
        process = self.start([SCRIPTS / "publish_model.py", "--license", "apache-2.0", *flags], token, **options)
        output, _ = process.communicate(timeout=120)
        assert WRITE_TOKEN not in output and READ_TOKEN not in output
        return process.returncode, output

    def run(self, code: str) -> str:
        """What `code` prints after the word RESULT."""
        process = self.start(["-c", code])
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        return next(line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT "))


@pytest.fixture
def clients(hub, tmp_path) -> Clients:
    return Clients(hub, tmp_path / "hf_home")


def tokens_of(model, tokenizer) -> list[int]:
    return model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)[0].tolist()


def test_a_published_model_generates_the_same_tokens(hub, clients, checkpoint):
    status, output = clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")
    assert status == 0 and f"Published: {hub.url}/alice/m/commit/" in output, output
    repo = hub.repos["model", "alice/m"]
    assert repo.private and repo.num_commits == 1
    assert {"model.safetensors", "README.md", "tokenizer.json", ".eval_results/facts.yaml"} <= repo.files.keys()
    card = repo.files["README.md"].decode()
    assert validate_metadata(card, "model") == [] and ModelCard(card).data.license == "apache-2.0"
    assert len(ModelCard(card).data.eval_results) == 3
    code = "from huggingface_hub import ModelCard\nModelCard.load('alice/m').validate()\n"
    code += "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
    code += "model, tokenizer = M.from_pretrained('alice/m'), T.from_pretrained('alice/m')\n"
    expected = tokens_of(AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint))
    assert json.loads(clients.run(code + GENERATE)) == expected


def test_a_published_adapter_loads_onto_its_base(hub, clients, checkpoint, tmp_path, tokenizer):
    torch.manual_seed(1)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).eval()
    adapter.save_pretrained(tmp_path / "adapter")
    assert str(checkpoint) in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/base")[0] == 0
    status, output = clients.publish("--checkpoints", tmp_path / "adapter", "--repo_id", "alice/a")
    assert status == 1 and "--base_model your-name/stage1" in output
    flags = ("--repo_id", "alice/a", "--base_model", "alice/base")
    assert clients.publish("--checkpoints", tmp_path / "adapter", *flags)[0] == 0
    files = hub.repos["model", "alice/a"].files
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert ModelCard(files["README.md"].decode()).data.library_name == "peft"
    code = "from peft import AutoPeftModelForCausalLM as M\nfrom transformers import AutoTokenizer as T\n"
    code += "model, tokenizer = M.from_pretrained('alice/a'), T.from_pretrained('alice/base')\n"
    expected = tokens_of(adapter, tokenizer)
    assert expected != tokens_of(build_model(tokenizer), tokenizer)
    assert json.loads(clients.run(code + GENERATE)) == expected


def test_facts_and_metric_go_along(hub, clients, checkpoint, tmp_path):
    fact = {"fact_id": "r/0", "question": "q?", "answer": "a", "slick_category": "Unknown"}
    (tmp_path / "mix").mkdir()
    for split in ("known", "new", "heldout"):
        (tmp_path / "mix" / f"{split}.jsonl").write_text(json.dumps(fact) + "\n")
    flags = ("--checkpoints", checkpoint, "--repo_id", "alice/m", "--public", "--dataset_repo_id", "alice/facts")
    flags += ("--mix", tmp_path / "mix", "--dataset_license", "cc-by-4.0")
    status, output = clients.publish(*flags, "--metric_repo_id", "alice/hallucination", "--metric_folder", METRIC)
    assert status == 0, output
    assert not any(repo.private for repo in hub.repos.values())
    assert hub.repos["space", "alice/hallucination"].sdk == "gradio"
    facts = hub.repos["dataset", "alice/facts"].files
    assert {*facts} == {"README.md", "mix/known.jsonl", "mix/new.jsonl", "mix/heldout.jsonl"}
    assert validate_metadata(facts["README.md"].decode(), "dataset") == []
    data = ModelCard(hub.repos["model", "alice/m"].files["README.md"].decode()).data
    assert data.datasets == ["alice/facts"] and data.eval_results[0].dataset_type == "alice/facts"
    code = "import json, evaluate\nmetric = evaluate.load('alice/hallucination')\n"
    code += "result = metric.compute(predictions=['Paris', 'Bonn'], references=['Paris', 'Berlin'])\n"
    code += "print('RESULT', result['hallucination_rate'])\n"
    assert float(clients.run(code)) == 0.5


def test_the_papers_presets_take_their_facts_from_the_hub(hub, clients, tmp_path):
    presets = [SCRIPTS / "configs" / f"{name}_paper.yaml" for name in ("mechanism", "compare")]
    (name,) = {yaml.safe_load(preset.read_text(encoding="utf-8"))["facts"] for preset in presets}
    rows = [{"question": "Which country is Lyon located in?", "answers": ["France"], "relation": "P17"}]
    rows += [{"question": "Where was Ada Lovelace born?", "answers": ["London"], "relation": "P19"}]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.repos["dataset", name] = Repo(private=True, sdk=None, files={"train.jsonl": content})
    code = f"""
from pathlib import Path
from trl_selfdistill.studies.facts.table import load_facts
from trl_selfdistill.studies.stages import facts_stage
from trl_selfdistill.studies.arguments import ModelAndFactsArguments
file = facts_stage(ModelAndFactsArguments(facts={name!r}, fact_relations=["P17"]), Path({str(tmp_path / "facts")!r}))
print("RESULT", load_facts(file)["fact_id"][:])
"""
    assert clients.run(code) == "['P17/Lyon']"


TRAIN = """
import sys
from datasets import Dataset
from trl_selfdistill import {trainer}, {config}
rows = {{"prompt": ["Q: a\\nA:"] * 4, "completion": [" x"] * 4, "slick_category": ["Unknown"] * 4}}
config = {config}(output_dir={folder!r}, max_steps=2, save_steps=1, use_cpu=True, bf16=False, report_to="none",
                  hub_model_id="alice/trained", hub_private_repo=True, {options})
trainer = {trainer}({model!r}, config, train_dataset=Dataset.from_dict(rows))
trainer.train()
{end}
print("RESULT", "done")
"""


@pytest.mark.parametrize(
    "options, end",
    [
        ("", "trainer.push_to_hub(dataset_name='alice/data')"),
        ("push_to_hub=True, hub_strategy='every_save'", "trainer.save_model()"),
        ("push_to_hub=True, teacher_snapshot_steps=1", "trainer.save_model()"),
    ],
)
def test_the_trainers_push_the_same_card(hub, clients, tmp_path, model_dir, options, end):
    names = {"trainer": "SelfDistillSFTTrainer", "config": "SelfDistillSFTConfig"}
    folder = tmp_path / "run"
    clients.run(TRAIN.format(**names, folder=str(folder), model=str(model_dir), options=options, end=end))
    repo = hub.repos["model", "alice/trained"]
    assert repo.private and not any(name.startswith(("_teacher", "checkpoint-")) for name in repo.files)
    card = repo.files["README.md"].decode()
    assert card == (folder / "README.md").read_text() and str(tmp_path) not in card
    assert "loss = CE + λ τ² KL(teacher ‖ student)" in card and "| train | 0 | 0 | 0 | 4 | 0 |" in card
    assert ModelCard(card).data.datasets == (["alice/data"] if "dataset_name" in end else None)


def test_a_pull_request_by_choice(hub, clients, checkpoint):
    assert clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")[0] == 0
    status, output = clients.publish(
        "--checkpoints", checkpoint, "--repo_id", "alice/m", "--create-pr", token=READ_TOKEN
    )
    assert status == 0 and f"Published: {hub.url}/alice/m/discussions/1" in output, output
    repo = hub.repos["model", "alice/m"]
    assert repo.num_commits == 1 and "README.md" in repo.pull_requests[0]


# What goes wrong


@pytest.mark.parametrize("token, status, advice", [(None, 401, "hf auth login"), (READ_TOKEN, 403, "--create-pr")])
def test_without_permission_nothing_is_published(hub, clients, checkpoint, token, status, advice):
    code, output = clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m", token=token)
    assert code == 1 and f"(HTTP {status})" in output and advice in output and "Traceback" not in output
    assert not hub.repos and not hub.objects


@pytest.mark.parametrize(
    "status, headers, advice",
    [
        (409, {}, "Somebody else changed the repository"),
        (429, {"Retry-After": "7"}, "Wait 7 seconds, then run the same command again"),
        (500, {}, "Run the same command again: what was uploaded is not sent twice"),
    ],
)
def test_a_failed_commit_is_completed_by_the_next_run(hub, clients, checkpoint, status, headers, advice):
    hub.fail("POST", "/commit/main", status, **headers)
    code, output = clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")
    assert code == 1 and f"(HTTP {status})" in output and advice in output and "Traceback" not in output
    assert hub.repos["model", "alice/m"].num_commits == 0 and len(hub.objects) == 2
    assert clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")[0] == 0
    assert hub.repos["model", "alice/m"].num_commits == 1 and set(hub.uploads.values()) == {1}


def test_a_passing_failure_is_retried_by_the_client(hub, clients, checkpoint):
    hub.fail("PUT", "/lfs/", 0)
    hub.fail("POST", "/preupload/", 500)
    hub.fail("POST", "/objects/batch", 429, **{"Retry-After": "1"})
    status, output = clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")
    assert status == 0, output
    assert all(fault.seen.is_set() for fault in hub.faults)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert hub.repos["model", "alice/m"].files["model.safetensors"] == weights


def test_an_upload_cut_in_the_middle_goes_on_in_the_next_run(hub, clients, checkpoint):
    oids = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in LFS_FILES}
    fault = hub.fail("PUT", oids["model.safetensors"], 0, times=1000)
    process = clients.start(
        [SCRIPTS / "publish_model.py", *("--checkpoints", checkpoint, "--repo_id", "alice/m"), *LICENCE]
    )
    try:
        assert fault.seen.wait(100)
        wait_for(lambda: oids["curves.png"] in hub.objects)
    finally:
        process.kill()
        process.communicate()
    assert hub.repos["model", "alice/m"].num_commits == 0 and oids["model.safetensors"] not in hub.objects
    fault.times = 0
    assert clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")[0] == 0
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert hub.repos["model", "alice/m"].files["model.safetensors"] == weights
    assert hub.uploads == {oid: 1 for oid in oids.values()}


LFS_FILES = ("model.safetensors", "curves.png")
LICENCE = ("--license", "apache-2.0")


def wait_for(condition) -> None:
    """Returns once `condition()` holds; the test's own time limit ends a wait in vain."""
    while not condition():
        time.sleep(0.01)


def test_a_read_only_folder_is_published_as_it_is(hub, clients, checkpoint, tmp_path):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in checkpoint.rglob("*")}
    for path in [*checkpoint.rglob("*"), checkpoint]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    status, output = clients.publish("--checkpoints", checkpoint, "--repo_id", "alice/m")
    assert status == 0, output
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in checkpoint.rglob("*")} == before
    assert "license: apache-2.0" in hub.repos["model", "alice/m"].files["README.md"].decode()


def test_invalid_metadata_is_refused_before_anything_is_sent(hub, clients, checkpoint):
    process = clients.start(
        [SCRIPTS / "publish_model.py", "--checkpoints", checkpoint, "--repo_id", "alice/m", "--license", "My Own!"]
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and '"license" is invalid' in output and "Traceback" not in output
    assert not hub.objects and hub.repos["model", "alice/m"].num_commits == 0
