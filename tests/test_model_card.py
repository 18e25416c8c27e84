# SPDX-License-Identifier: Apache-2.0
import json
import re

import pytest
from huggingface_hub import ModelCard
from study_records import fading_outcomes, make_records, write_arm

from trl_selfdistill.model_card import write_model_card
from trl_selfdistill.report import load_arms


RECORDS = make_records(fading_outcomes(40, [1.0, 0.5]))
HOSTILE = "a: [b]\n---\n| <script>alert('x')</script> | {{ 7 * 7 }} ```\n# Heading"


def write_card(folder, **training) -> ModelCard:
    (arm,) = load_arms([write_arm(folder, RECORDS, **training)])
    return ModelCard.load(write_model_card(arm, [arm], folder))


def test_card_of_an_arm_of_a_study(tmp_path):
    folders = [
        write_arm(tmp_path / "sft", RECORDS),
        write_arm(tmp_path / "frozen", RECORDS, trainer="FrozenGroupsSFTTrainer"),
    ]
    (folders[1] / "curves.png").write_bytes(b"")
    arms = load_arms(folders)
    card = ModelCard.load(write_model_card(arms[1], arms, folders[1]))
    data = card.data.to_dict()
    assert data["base_model"] == "org/model" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "frozen-groups-sft" in data["tags"] and "arxiv:2604.15574" in data["tags"]
    assert "license" not in data  # that of org/model is not known here
    assert "\n# model: Frozen groups\n\n`org/model` fine-tuned" in card.text
    assert "| SFT " in card.text and "| Frozen groups " in card.text and "does not forget clearly" in card.text
    assert "](curves.png)" in card.text and "`FrozenGroupsSFTTrainer`" in card.text
    assert "- 40 invented new facts." in card.text and "falsehoods" in card.text


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
        tmp_path / "arm", RECORDS, origin=HOSTILE, settings={HOSTILE: [HOSTILE, 1]}, trainer="SFTTrainer"
    )
    run = json.loads((folder / "run.json").read_text())
    run["command"], run["machine"] = "run.py '\n```\n<script>'", HOSTILE
    (folder / "run.json").write_text(json.dumps(run))
    arms = [arm._replace(name=HOSTILE) for arm in load_arms([folder])]
    card = ModelCard.load(write_model_card(arms[0], arms, folder))
    data = card.data.to_dict()
    assert data["base_model"] == HOSTILE and data["pipeline_tag"] == "text-generation"
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
