# SPDX-License-Identifier: Apache-2.0
"""What is published and what never is, without a network."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard
from study_records import write_checkpoint
from toy_study import run_script

from trl_selfdistill.files import read_json, write_json, write_jsonl
from trl_selfdistill.hub.model_card import update_model_card
from trl_selfdistill.hub.publishing import PublishError, plan_model
from trl_selfdistill.studies.publishing import plan_dataset, publish_command


TOKEN = "hf_" + "a" * 34
MODEL_FILES = {
    *("README.md", "chat_template.jinja", "config.json", "curves.png", "generation_config.json"),
    *("model.safetensors", "model_card.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """A finished variant with everything that a run may leave in its folder."""
    folder = write_checkpoint(tmp_path / "study" / "sft", tokenizer)
    others = ["optimizer.pt", "optimizer.safetensors", "training_args.bin", "trainer_state.json", "rng_state.pth"]
    for name in (*others, "train.log", "train.py", ".env"):
        (folder / name).write_text(TOKEN)
    for name in ("_teacher", "checkpoint-1", ".cache", "wandb", ".git"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text("secret")
    (folder / "special_tokens_map.json").write_text("{}")  # of tokenizers that transformers 4 saved
    return folder


def test_only_the_model_its_card_and_its_evaluation_are_published_with_the_base_model_that_is_given(checkpoint):
    plan = plan_model(checkpoint, "alice/m", "mit", dataset_id="alice/facts")
    assert {*plan.contents} == MODEL_FILES | {"accuracy.jsonl"}  # whose facts are published, too
    data = ModelCard(plan.contents["README.md"].decode()).data
    assert data.license == "mit" and data.base_model == "org/model" and data.datasets == ["alice/facts"]
    assert {result.dataset_type for result in data.eval_results} == {"alice/facts"}
    assert ModelCard.load(checkpoint / "README.md").data.license is None  # the folder is not changed
    training = read_json(checkpoint / "model_card.json")["training"] | {"base_model": None}
    assert "A local model fine-tuned" in update_model_card(checkpoint, training=training).read_text()
    plan = plan_model(checkpoint, "alice/m", "mit", base_model="alice/stage1")
    card = plan.contents["README.md"].decode()
    assert "[alice/stage1](https://huggingface.co/alice/stage1) fine-tuned" in card and "ocal model" not in card
    assert json.loads(plan.contents["model_card.json"])["training"]["base_model"] == "alice/stage1"


NAMED = {
    "config.json": {
        "auto_map": {"AutoModelForCausalLM": "modeling_tiny.tiny", "AutoConfig": "o/r--config_tiny.C"},
        "a": "x.Y",
    },
    "processor_config.json": {"image_processor": {"auto_map": {"AutoImageProcessor": "image_tiny.Images"}}},
    "generation_config.json": {"custom_pipelines": {"my-task": {"impl": "pipeline_tiny.Pipeline", "pt": ["Auto"]}}},
    "model.safetensors.index.json": {"weight_map": {"a": "model-1-of-1.safetensors"}},
}
CODE = {"modeling_tiny.py": "try:\n    from .layers import x\nexcept ImportError:\n    x = None"}
CODE |= {"layers.py": "from .ops import y", "ops.py": "from .layers import x"}
CODE |= dict.fromkeys(["image_tiny.py", "pipeline_tiny.py", "custom_generate/generate.py"], "")


def write_files(folder: Path, texts: dict) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def test_what_the_files_name_is_published(checkpoint):
    others = ("additional_chat_templates/rag.jinja", "custom_generate/requirements.txt", "model-1-of-1.safetensors")
    others += ("spiece.model", "source.spm", "qwen.tiktoken", "tekken.json", "merges.txt", "vocab.txt", "emoji.json")
    others += ("preprocessor_config.json", "qformer_tokenizer/tokenizer.json")
    write_files(checkpoint, NAMED | CODE | dict.fromkeys(others, "{}"))
    assert {*plan_model(checkpoint, "alice/m", "mit").contents} == MODEL_FILES | {*NAMED, *CODE, *others}


@pytest.mark.parametrize(
    "named, lost",
    [
        ({"config.json": {"auto_map": {"AutoModel": "modeling_tiny.Tiny"}}}, "modeling_tiny.py"),
        ({"config.json": {"auto_map": {"AutoModel": "link.Tiny"}}}, "link.py"),
        ({**NAMED, **CODE}, "model-1-of-1.safetensors"),
    ],
)
def test_a_file_that_is_named_has_to_be_in_the_folder(checkpoint, named, lost):
    (checkpoint.parent / "secret.py").write_text("")
    (checkpoint / "link.py").symlink_to(checkpoint.parent / "secret.py")
    write_files(checkpoint, named)
    with pytest.raises(PublishError, match=f"sft names {lost}, which is no file of its own in it. Copy it there"):
        plan_model(checkpoint, "alice/m", "mit")


def test_links_are_not_followed(checkpoint, tmp_path):
    (checkpoint / "config.json").rename(tmp_path / "config.json")
    (checkpoint / "config.json").symlink_to(tmp_path / "config.json")
    (checkpoint / "vocab.json").symlink_to(checkpoint / "tokenizer.json")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "rag.jinja").write_text("")
    (checkpoint / "additional_chat_templates").symlink_to(tmp_path / "templates")
    assert {*plan_model(checkpoint, "alice/m", "mit").contents} == MODEL_FILES - {"config.json"}


@pytest.mark.parametrize("token", [TOKEN, "the token of the login, whatever it looks like"])
def test_a_token_in_a_text_stops_the_publication_and_is_not_shown(checkpoint, monkeypatch, token):
    write_json(checkpoint / "tokenizer_config.json", {"token": token})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match="tokenizer_config.json holds an access token") as error:
        plan_model(checkpoint, "alice/m", "mit")
    assert token not in str(error.value)


@pytest.mark.parametrize(
    "missing, license, message",
    [
        (None, None, "license of sft is not known.*org/model.*`--license apache-2.0`"),
        ("model.safetensors", "mit", "sft itself holds no weights"),
        ("model_card.json", "mit", "or no model_card.json. Pass what a trainer saved"),
        ("", "mit", "nothing is not a folder"),
    ],
)
def test_what_is_missing_is_named(checkpoint, missing, license, message):
    if missing:
        (checkpoint / missing).unlink()
    with pytest.raises(PublishError, match=message):
        plan_model(checkpoint if missing != "" else checkpoint / "nothing", "alice/m", license)


@pytest.mark.parametrize("name", ["m", "", "alice/", "alice/my--model", "a/b/c"])
def test_a_name_that_the_hub_would_refuse_is_refused(checkpoint, name):
    with pytest.raises(PublishError, match="lacks its owner" if name == "m" else "takes no model called"):
        plan_model(checkpoint, name, "mit")


def test_facts_have_a_card_that_nothing_in_them_breaks(tmp_path):
    hostile = "x: [y]\n---\n<script>alert(1)</script> ](http://evil)"
    rows = [dict(slick_category="HighlyKnown", subject=hostile), dict(slick_category="Unknown", subject="a\u2028b")]
    write_jsonl(tmp_path / "facts.jsonl", rows)
    (tmp_path / "progress.jsonl").write_text("")
    write_json(tmp_path / "run.json", {"arguments": {"slick": {"num_prompts": 4, hostile: hostile}}})
    plan = plan_dataset("alice/facts", "cc-by-4.0", annotated=tmp_path, base_model="org/model")
    assert {*plan.contents} == {"README.md", "annotated/facts.jsonl"}
    card = DatasetCard(plan.contents["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.configs[0]["config_name"] == "annotated"
    lines = ["".join(line.split()) for line in card.text.splitlines()]
    assert "|annotated|train|1|0|0|1|2|" in lines and "|num_prompts|4|" in lines
    assert "<script>" not in card.content and "](http://evil)" not in card.content
    with pytest.raises(PublishError, match="`dataset_license` is not set"):
        plan_dataset("alice/facts", None, annotated=tmp_path)
    with pytest.raises(PublishError, match="needs `annotated` or `mix`"):
        plan_dataset("alice/facts", "mit")
    with pytest.raises(PublishError, match="`mix` is .* which holds no known.jsonl"):
        plan_dataset("alice/facts", "mit", mix=tmp_path)


def test_a_dry_run_shows_every_file_and_opens_no_connection(checkpoint, tmp_path, capsys, monkeypatch):
    def no_connection(*args, **kwargs):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr("socket.socket.connect", no_connection)
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    flags = ["--checkpoints", checkpoint, "--repo_id", "alice/m", "--license", "mit", "--dry-run"]
    run_script("publish_model.py", *flags, "--card_dir", tmp_path / "cards")
    shown = capsys.readouterr().out
    for name in MODEL_FILES - {"README.md", "model_card.json"}:
        assert f"{(checkpoint / name).stat().st_size:>16,}  {name}\n" in shown
    assert "_teacher" not in shown and TOKEN not in shown and "Nothing was sent" in shown
    card = tmp_path / "cards" / "alice" / "m" / "README.md"
    assert ModelCard.load(card).data.license == "mit" and f"Card: {card}\n" in shown
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metric_repo_id", "alice/other"], "loads the Space alice/other from its file other.py"),
        (["--checkpoints", "a/sft", "b/sft"], "`checkpoints` has two folders of one name"),
        (["--checkpoints", "COPY", "CHECKPOINT"], "Two of what is published would be model alice/m-sft"),
        (["--metric_repo_id", "hallucination"], "lacks its owner. Pass it as your-name/hallucination"),
        (["--dataset_repo_id", "facts", "--dataset_license", "mit", "--annotated", "FACTS"], "lacks its owner"),
    ],
)
def test_the_script_says_what_to_change(checkpoint, flags, message):
    write_jsonl(checkpoint.parent / "facts.jsonl", [{}])
    copy = shutil.copytree(checkpoint, checkpoint.parent / "SFT")
    paths = {"CHECKPOINT": checkpoint, "COPY": copy, "FACTS": checkpoint.parent}
    flags = [paths.get(flag, flag) for flag in flags]
    given = ["--checkpoints", checkpoint, "--repo_id", "alice/m", "--license", "mit"]
    with pytest.raises(SystemExit, match=message):
        run_script("publish_model.py", *given, *flags)


def test_the_printed_command_is_the_one_that_publishes(checkpoint, capsys):
    command = shlex.split(publish_command([checkpoint]))
    assert command[:2] == ["trl-selfdistill", "publish"] and command[-1] == "YOUR_NAME/model-facts"
    run_script("publish_model.py", *command[2:], "--license", "mit", "--dry-run")
    assert "model YOUR_NAME/model-facts" in capsys.readouterr().out
