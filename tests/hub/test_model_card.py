# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, parse_eval_result_entries
from peft import LoraConfig
from study_records import fading_outcomes, make_records, write_arm

from trl_selfdistill import (
    FrozenGroupsSFTConfig,
    FrozenGroupsSFTTrainer,
    SelfDistillSFTConfig,
    SelfDistillSFTTrainer,
)
from trl_selfdistill.hub.model_card import read_record, update_model_card, weights_sha256
from trl_selfdistill.studies.card import measure, write_model_card
from trl_selfdistill.studies.fact_accuracy import write_records
from trl_selfdistill.studies.report import load_arms


RECORDS = make_records(fading_outcomes(40, [1.0, 0.5]))
HOSTILE = "a: [b]\n---\n| <script>alert('x')</script> | {{ 7 * 7 }} ```\n# Heading"


def write_card(folder, **training) -> ModelCard:
    (arm,) = load_arms([write_arm(folder, RECORDS, **training)])
    return ModelCard.load(write_model_card(arm, [arm], folder))


def test_card_of_an_arm_of_a_study(tmp_path):
    better = make_records(fading_outcomes(40, [1.0, 0.9]), fading_outcomes(40, [0.0, 0.8]))
    folders = [
        write_arm(tmp_path / "sft", RECORDS),
        write_arm(tmp_path / "frozen", better, trainer="FrozenGroupsSFTTrainer", settings={"seed": 7}),
    ]
    (folders[1] / "curves.png").write_bytes(b"")
    arms = load_arms(folders)
    card = ModelCard.load(write_model_card(arms[1], arms, folders[1]))
    data = card.data.to_dict()
    assert data["base_model"] == "org/model" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert {"frozen-groups-sft", "arxiv:2604.15574", "arxiv:2405.05904"} <= {*data["tags"]}
    assert "license" not in data  # that of org/model is not known here
    assert "\n# model: Frozen groups\n\n[org/model](https://huggingface.co/org/model) fine-tuned" in card.text
    assert "| SFT " in card.text and "| Frozen groups " in card.text and "forgets clearly less" in card.text
    assert "](curves.png)" in card.text and "`FrozenGroupsSFTTrainer`" in card.text
    assert "- 40 invented new facts." in card.text and "falsehoods" in card.text
    assert "Unknown means never produced under this protocol" in card.text and "Seed: 7." in card.text
    assert "2604.15574" in card.text and "2405.05904" in card.text


def test_results_are_those_of_the_records_against_the_base_and_plain_sft(tmp_path):
    better = make_records(fading_outcomes(40, [0.95, 0.9]), fading_outcomes(40, [0.0, 0.8]))
    settings = {"kl_weight": 1.0}
    folders = [
        write_arm(tmp_path / "sft", RECORDS),
        write_arm(tmp_path / "selfdistill", better, trainer="SelfDistillSFTTrainer", settings=settings),
    ]
    write_records(folders[1] / "base_accuracy.jsonl", make_records(fading_outcomes(40, [1.0])))
    arms = load_arms(folders)
    stability, plasticity, hallucination = measure(arms[1], arms)
    assert stability["model"]["value"] == 0.9 and stability["base"]["value"] == 1.0
    assert stability["minus_base"]["value"] == pytest.approx(-0.1) and stability["minus_base"]["high"] < 0
    assert stability["minus_sft"]["value"] == pytest.approx(0.4) and stability["minus_sft"]["low"] > 0
    assert plasticity["model"]["value"] == 0.8 and plasticity["num_facts"] == 40
    assert hallucination["model"]["value"] == pytest.approx(1 - stability["model"]["value"])
    assert hallucination["minus_sft"]["high"] < 0 and hallucination["minus_sft"]["value"] == pytest.approx(-0.4)

    card = ModelCard.load(write_model_card(arms[1], arms, folders[1]))
    row = next(line for line in card.text.splitlines() if line.startswith("| Stability"))
    assert row.startswith("| Stability ↑ | 0.900 [") and "| 1.000 [1.000, 1.000] |" in row and "| +0.400 [" in row
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("factual_stability", 0.9),
        ("factual_plasticity", 0.8),
        ("hallucination_rate", 0.1),
    }
    entries = parse_eval_result_entries(yaml.safe_load((folders[1] / ".eval_results" / "facts.yaml").read_text()))
    assert {(e.task_id, e.value) for e in entries} == {(r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert all("95 % bootstrap interval [" in entry.notes and entry.date.startswith("2026-01-02") for entry in entries)


def test_method_box_names_equation_teacher_groups_and_data(tmp_path):
    rows = {"mlp": {"parameters": 1000, "trainable_parameters": 0, "frozen_sha256": "ab" * 32}}
    about = {
        "settings": {"kl_weight": 0.7, "temperature": 0.5, "seed": 0},
        "teacher": {"identity": "org/model, frozen when training started", "sha256": "cd" * 32},
        "groups": {"groups": rows},
        "composition": {"known": {"HighlyKnown": 80}, "new": {"Unknown": 120, "odd": 3}},
    }
    text = write_card(tmp_path / "arm", trainer="SelfDistillSFTTrainer", **about).text
    assert "loss = CE + λ τ² KL(teacher ‖ student)" in text
    assert "| kl_weight (λ) | 0.7 |" in text and "| temperature (τ) | 0.5 |" in text
    assert "frozen when training started" in text and "cd" * 32 in text
    assert f"| mlp | 1,000 | 0 | {'ab' * 32} |" in text
    assert "| known | 80 | 0 | 0 | 0 | 0 |" in text and "| new | 0 | 0 | 0 | 120 | 3 |" in text


def test_card_of_the_embedded_model_carries_its_licence(tmp_path):
    card = write_card(tmp_path / "sft", origin="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert card.data.to_dict()["license"] == "apache-2.0"


def test_card_of_a_local_model_names_no_base(tmp_path):
    card = write_card(tmp_path / "sft", origin=None)
    assert {"base_model", "base_model_relation"}.isdisjoint(card.data.to_dict())
    assert "A local model fine-tuned" in card.text and "None" not in card.text


def test_card_before_there_is_a_comparison_and_without_new_facts(tmp_path):
    text = write_card(tmp_path / "stage1", splits=["known"]).text
    assert "**stage1**" in text and "curves.png" not in text and "clearly" not in text
    assert "new facts." not in text and "falsehoods" not in text and "- 1 facts that" in text


def test_card_of_real_new_facts_does_not_speak_of_invented_ones(tmp_path):
    text = write_card(tmp_path / "sft", mix={"mix": {"new_facts": "real"}}).text
    assert "- 40 real new facts." in text and "falsehoods" not in text


@pytest.mark.parametrize(
    "trainer, settings, tag",
    [
        ("SFTTrainer", {}, "sft"),
        ("SelfDistillSFTTrainer", {"kl_weight": 1.0}, "self-distill-sft"),
        ("SelfDistillSFTTrainer", {"kl_weight": 0.0}, "sft"),  # has no teacher
        ("FrozenGroupsSFTTrainer", {}, "frozen-groups-sft"),
    ],
)
def test_method_is_that_of_the_trainer_whatever_the_folder_is_called(tmp_path, trainer, settings, tag):
    card = write_card(tmp_path / "any name", trainer=trainer, settings=settings)
    assert tag in card.data.to_dict()["tags"]
    assert ("KL(teacher" in card.text) == (tag == "self-distill-sft")


def test_hostile_values_break_neither_the_yaml_nor_the_tables(tmp_path):
    folder = write_arm(
        tmp_path / "arm",
        RECORDS,
        origin=HOSTILE,
        settings={HOSTILE: [HOSTILE, 1]},
        trainer="SFTTrainer",
        composition={HOSTILE: {HOSTILE: 1}},
        dataset_name=HOSTILE,
        teacher={"identity": HOSTILE, "sha256": HOSTILE},
    )
    run = json.loads((folder / "run.json").read_text())
    run["command"], run["machine"] = "run.py '\n```\n<script>'", HOSTILE
    (folder / "run.json").write_text(json.dumps(run))
    arms = [arm._replace(name=HOSTILE) for arm in load_arms([folder])]
    card = ModelCard.load(write_model_card(arms[0], arms, folder))
    data = card.data.to_dict()
    assert "base_model" not in data and data["pipeline_tag"] == "text-generation"
    lines = card.text.splitlines()
    outside = [line for line, fenced in zip(lines, fences(lines), strict=True) if not fenced]
    assert not any("<script>" in line for line in outside)
    assert [line for line in outside if line.startswith("# ")] == [line for line in outside if line.startswith("# ")][
        :1
    ]
    (start,) = [i for i, line in enumerate(lines) if line == "|---|---|"]
    assert len(re.split(r"(?<!\\)\|", lines[start + 1])) == 4 and lines[start + 2] == ""
    assert "## Citation" in outside and "49" not in card.text


def fences(lines: list[str]) -> list[bool]:
    """Whether each line is in a fenced block."""
    inside, result = False, []
    for line in lines:
        is_fence = line.startswith("```")
        result.append(inside or is_fence)
        inside ^= is_fence
    assert not inside
    return result


@pytest.mark.parametrize(
    "word, shown",
    [
        ("/home/alice/my facts.csv", "'my facts.csv'"),
        ("--facts=/home/alice/facts.csv", "--facts=facts.csv"),
        ("~/facts.csv", "facts.csv"),
        ("../../alice/facts.csv", "facts.csv"),
        ("C:\\Users\\alice\\facts.csv", "facts.csv"),
        ("outputs/study", "outputs/study"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("5e-5", "5e-5"),
    ],
)
def test_command_shows_no_path_of_the_machine(tmp_path, monkeypatch, word, shown):
    folder = write_arm(tmp_path / "sft", RECORDS)
    run = json.loads((folder / "run.json").read_text())
    run["command"] = f"scripts/a.py --x {json.dumps(word)}" if "\\" not in word else f"scripts/a.py --x '{word}'"
    (folder / "run.json").write_text(json.dumps(run))
    (arm,) = load_arms([folder])
    text = write_model_card(arm, [arm], folder).read_text()
    assert f"\naccelerate launch scripts/a.py --x {shown}\n" in text and "alice" not in text


def test_secrets_in_the_command_are_hidden(tmp_path):
    folder = write_arm(tmp_path / "sft", RECORDS)
    run = json.loads((folder / "run.json").read_text())
    run["command"] = f"a.py --hub_token s3cret --wandb_api_key=s3cret --note hf_{'a' * 34}"
    (folder / "run.json").write_text(json.dumps(run))
    (arm,) = load_arms([folder])
    text = write_model_card(arm, [arm], folder).read_text()
    assert "a.py --hub_token HIDDEN --wandb_api_key=HIDDEN --note HIDDEN" in text and "s3cret" not in text


# The trainers


DATA = {
    "prompt": ["Q: a\nA:", "Q: b\nA:", "Q: c\nA:"],
    "completion": [" x", " y", " z"],
    "slick_category": ["HighlyKnown", "Unknown", "Unknown"],
}
TRAINERS = {
    "self-distill-sft": (SelfDistillSFTTrainer, SelfDistillSFTConfig, {}),
    "frozen-groups-sft": (FrozenGroupsSFTTrainer, FrozenGroupsSFTConfig, {"trainable_groups": ["attention"]}),
}


def make_trainer(folder, model, method="self-distill-sft", peft_config=None, **options):
    trainer_class, config_class, own = TRAINERS[method]
    settings = dict(max_steps=2, save_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    config = config_class(output_dir=str(folder), **{**settings, **own, **options})
    return trainer_class(model, config, train_dataset=Dataset.from_dict(DATA), peft_config=peft_config)


@pytest.mark.parametrize("method", TRAINERS)
def test_every_checkpoint_has_the_card_and_trl_does_not_rewrite_it(tmp_path, model_dir, method):
    trainer = make_trainer(tmp_path / "run", str(model_dir), method)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2"):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        assert {method, "trl-selfdistill"} <= {*data["tags"]} and data["pipeline_tag"] == "text-generation"
        assert "| train | 1 | 0 | 0 | 2 | 0 |" in card.text and "Not measured for this checkpoint" in card.text
        assert str(tmp_path) not in card.content and str(model_dir) not in card.content
        assert ("SHA-256 of its parameters: " in card.text) == (method == "self-distill-sft")
        assert ("SHA-256 of the frozen ones" in card.text) == (method == "frozen-groups-sft")
        assert ("they did not move" in card.text) == (method == "frozen-groups-sft")
        assert "| lr_scheduler_type | linear |" in card.text
    if method == "frozen-groups-sft":
        saved = json.loads((tmp_path / "run" / "parameter_groups.json").read_text())["groups"]["mlp"]
        assert f"| mlp | {saved['parameters']:,} | 0 | {saved['frozen_sha256']} |" in card.text


def test_results_stay_while_the_weights_do(tmp_path, model_dir):
    trainer = make_trainer(tmp_path / "run", str(model_dir))
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    results = {"arm": "An arm", "metrics": [], "table": "| measured |", "findings": "", "num_facts": {}}
    update_model_card(folder, results={**results, "weights_sha256": weights_sha256(folder)})
    trainer.create_model_card(dataset_name="org/facts", tags="extra")  # as `push_to_hub` calls it
    trainer.save_model()
    card = ModelCard.load(folder / "README.md")
    assert "| measured |" in card.text and card.data.datasets == ["org/facts"] and "extra" in card.data.tags
    next(trainer.model.parameters()).data.add_(1.0)
    trainer.save_model()
    assert "| measured |" not in (folder / "README.md").read_text() and "results" not in read_record(folder)


def test_a_chain_of_local_stages_keeps_the_hub_id_and_the_licence(tmp_path, model_dir, tokenizer, model):
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n")
    for start, end in (("start", "stage1"), ("stage1", "stage2")):
        trainer = make_trainer(tmp_path / end, str(tmp_path / start), save_strategy="no", max_steps=1)
        trainer.train()
        trainer.save_model()
        card = ModelCard.load(tmp_path / end / "README.md")
        assert card.data.base_model == "org/base" and card.data.license == "mit"
        assert "a local stage of org/base, frozen when training started" in card.text


def test_card_of_an_adapter(tmp_path, model_dir):
    trainer = make_trainer(tmp_path / "run", str(model_dir), peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert data["library_name"] == "peft" and "base_model" not in data
        assert str(model_dir) not in (folder / "README.md").read_text()
