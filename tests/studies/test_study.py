# SPDX-License-Identifier: Apache-2.0
"""The whole study on a tiny model: what it leaves, and that nothing is lost or done twice."""

import csv
import json
import re

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from toy_study import ARMS, rerun, toy_facts
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from trl_selfdistill import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer
from trl_selfdistill.studies.arguments import ModelAndFactsArguments, SlickArguments, StudyArguments
from trl_selfdistill.studies.fact_accuracy import answered_correctly, read_records
from trl_selfdistill.studies.facts.table import load_facts
from trl_selfdistill.studies.forgetting import forgetting, forgetting_difference
from trl_selfdistill.studies.stages import annotate_stage, facts_stage, train_stage
from trl_selfdistill.studies.training_mix import load_mix


# What it leaves behind


@pytest.mark.parametrize("name", ["stage1", *ARMS])
def test_checkpoints_load_and_answer_as_recorded(toy_study, name):
    folder = toy_study.output / name
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("checkpoint-*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    recorded = read_records(folder / "accuracy.jsonl")[-1].correct
    for split, facts in load_mix(toy_study.output / "mix").items():
        assert answered_correctly(model, tokenizer, facts) == recorded[split]


def test_arms_start_from_stage1_and_are_evaluated_each_epoch(toy_study):
    start = read_records(toy_study.output / "stage1" / "accuracy.jsonl")[-1]
    for name in ARMS:
        records = read_records(toy_study.output / name / "accuracy.jsonl")
        assert [record.epoch for record in records] == [0.0, 1.0, 2.0]
        assert records[0].correct == start.correct


def test_frozen_arm_trained_the_attention_only(toy_study):
    before, after = (load_file(toy_study.output / name / "model.safetensors") for name in ("stage1", "frozen"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".self_attn." in name}


def test_report_holds_the_numbers_of_the_records(toy_study):
    report = (toy_study.output / "report.md").read_text(encoding="utf-8")
    results = json.loads((toy_study.output / "results.json").read_text(encoding="utf-8"))
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in report.splitlines() if line.startswith("| ")][2:]
    baseline = read_records(toy_study.output / "sft" / "accuracy.jsonl")
    assert [*results] == [*ARMS]
    for name, row in zip(ARMS, rows, strict=True):
        records = read_records(toy_study.output / name / "accuracy.jsonl")
        heldout = [record.accuracy("heldout") for record in records]
        assert row[1] == f"{heldout[0]:.3f} / {max(heldout):.3f} / {heldout[-1]:.3f}"
        lost = forgetting(records)
        assert row[2] == f"{lost.value:.3f} [{lost.low:.3f}, {lost.high:.3f}]"
        assert results[name]["forgetting"] == lost._asdict() and results[name]["heldout_curve"] == heldout
        if name != "sft":
            difference = forgetting_difference(records, baseline)
            assert row[3] == f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        assert row[4:6] == [f"{records[-1].accuracy(split):.3f}" for split in ("new", "known")]
        assert float(row[6]) == pytest.approx(results[name]["seconds_per_step"], abs=0.006)
    table = report[report.index("| arm") :].split("\n\n![")[0]
    assert table in toy_study.stdout
    assert table.count("forgets clearly less than SFT") == sum(
        results[name]["forgetting_difference"]["high"] < 0 for name in ARMS[1:]
    )


def test_self_distillation_and_frozen_groups_forget_less(toy_study):
    results = json.loads((toy_study.output / "results.json").read_text(encoding="utf-8"))
    assert results["sft"]["forgetting"]["low"] > 0
    assert results["selfdistill"]["forgetting_difference"]["high"] < 0
    assert results["frozen"]["forgetting_difference"]["high"] < 0


def test_figure_is_an_image(toy_study):
    figure = (toy_study.output / "curves.png").read_bytes()
    with Image.open(toy_study.output / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and len(image.getcolors(1 << 20)) > 10
    assert all((toy_study.output / name / "curves.png").read_bytes() == figure for name in ARMS)


@pytest.mark.parametrize("name", ["stage1", *ARMS])
def test_each_checkpoint_has_a_card(toy_study, name):
    card = ModelCard.load(toy_study.output / name / "README.md")
    assert card.data.library_name == "transformers" and "trl-selfdistill" in card.data.tags
    assert "num_train_epochs" in card.text and "accelerate launch" in card.text
    for private in (str(toy_study.output.parent), "/tmp/", "/home/", ".partial"):
        assert private not in card.content
    if name != "stage1":
        table = (toy_study.output / "report.md").read_text(encoding="utf-8").split("\n\n")[1]
        assert table in card.text


def test_cards_of_the_arms_compare_with_the_base_and_plain_sft(toy_study):
    base = read_records(toy_study.output / "stage1" / "accuracy.jsonl")[0]
    for name in ARMS:
        assert read_records(toy_study.output / name / "base_accuracy.jsonl") == [base]
        card = ModelCard.load(toy_study.output / name / "README.md")
        assert f"| {base.accuracy('heldout'):.3f} [" in card.text and "difference from the base" in card.text
        assert ("difference from plain SFT" in card.text) == (name != "sft")
        assert "| known | 10 | 0 | 0 | 0 | 0 |" in card.text and "| new | 0 | 0 | 0 | 20 | 0 |" in card.text
        assert len(card.data.eval_results) == 3 and "](curves.png)" in card.text


def test_the_study_ends_with_the_command_that_publishes(toy_study):
    folders = " ".join(str(toy_study.output / name) for name in ARMS)
    assert f"python scripts/publish_model.py --checkpoints {folders} --repo_id YOUR_NAME/" in toy_study.stdout


def test_splits_are_plain_datasets_for_any_sft(toy_study):
    dataset = load_dataset("json", data_files=str(toy_study.output / "mix" / "new.jsonl"), split="train")
    assert {"prompt", "completion", "fact_id", "slick_category"} <= {*dataset.column_names} and len(dataset) == 20


# A stage whose output is there is not run again, and a changed argument runs it again


def test_the_same_command_runs_nothing_again(copied_study):
    report = (copied_study.output / "report.md").read_bytes()
    assert rerun(copied_study) == set()
    assert (copied_study.output / "report.md").read_bytes() == report


def test_a_changed_argument_runs_what_depends_on_it(copied_study):
    assert rerun(copied_study, "--kl_weight", "2") == {"selfdistill"}
    assert rerun(copied_study, "--kl_weight", "2", "--trainable_groups", "mlp", "--arms", "sft", "frozen") == {
        "frozen"
    }
    assert json.loads((copied_study.output / "results.json").read_text()).keys() == {"sft", "frozen"}


def test_another_file_with_the_same_facts_keeps_the_annotation(copied_study, tmp_path):
    with (tmp_path / "facts.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["relation", "subject", "question", "answer"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(toy_facts().to_list())
    study = copied_study._replace(facts=tmp_path / "facts.csv")
    assert rerun(study) == {"facts"}


def test_real_new_facts(copied_study):
    flags = ("--new_facts", "real", "--num_new", "4", "--max_answer_share", "0.5", "--arms", "selfdistill")
    flags += ("--num_train_epochs", "1", "--stage1_num_train_epochs", "1")
    assert rerun(copied_study, *flags) == {"mix", "stage1", "selfdistill"}
    annotated = load_facts(copied_study.output / "annotated" / "facts.jsonl")
    unknown = {fact["fact_id"] for fact in annotated if fact["slick_category"] == "Unknown"}
    new = load_mix(copied_study.output / "mix")["new"]
    assert len(new) == 4 and set(new["fact_id"]) <= unknown
    assert "- 4 real new facts." in (copied_study.output / "selfdistill" / "README.md").read_text(encoding="utf-8")


# Bad input


def read_facts(path, tmp_path):
    return facts_stage(ModelAndFactsArguments("unused", str(path)), tmp_path / "facts")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"relation": "r", "subject": "s", "question": "q?"}, r"facts.jsonl, line 2: missing columns \['answer'\]"),
        ({"relation": "r", "subject": "s", "question": "q?", "answer": " "}, "facts.jsonl, line 2: answer is empty"),
    ],
)
def test_bad_facts_are_named_by_row(tmp_path, row, message):
    good = {"relation": "r", "subject": "t", "question": "q of t?", "answer": "yes"}
    (tmp_path / "facts.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=message):
        read_facts(tmp_path / "facts.jsonl", tmp_path)
    (tmp_path / "facts.jsonl").write_text(f"{json.dumps(good)}\n")  # corrected
    assert len(load_facts(read_facts(tmp_path / "facts.jsonl", tmp_path))) == 1


def test_missing_facts_and_missing_relation(toy_study, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.csv: there is no such file"):
        read_facts(tmp_path / "nothing.csv", tmp_path)
    arguments = ModelAndFactsArguments("unused", str(toy_study.facts), fact_relations=["sea", "river"])
    with pytest.raises(ValueError, match="`fact_relations` asks for sea, which .*It has: country, river"):
        facts_stage(arguments, tmp_path / "facts")


def test_facts_are_limited_by_relation_and_answer(toy_study, tmp_path):
    arguments = ModelAndFactsArguments(
        "unused", str(toy_study.facts), fact_relations=["river"], max_facts_per_relation=7, max_facts_per_answer=2
    )
    facts = load_facts(facts_stage(arguments, tmp_path / "facts"))
    assert facts["relation"][:] == ["river"] * 7
    assert facts["answer"][:] == ["Rhone", "Glomma", "Rimac", "Yodo", "Mur", "Rhone", "Glomma"]


def test_missing_model(toy_study, tmp_path):
    slick = SlickArguments(slick_num_prompts=1, slick_num_shots=1)
    with pytest.raises(FileNotFoundError, match="`model_name_or_path` got 'no/model'.*`save_pretrained`"):
        annotate_stage("no/model", toy_study.facts, slick, tmp_path / "annotated")


def test_relation_with_too_few_known_facts(copied_study):
    with pytest.raises(ValueError, match="relation 'river' has too few Known facts.*lower `min_known_share`"):
        rerun(copied_study, "--relations", "river", "--min_known_share", "0.99")
    assert rerun(copied_study) == set()


def test_unknown_arm():
    with pytest.raises(ValueError, match="`arms` may hold sft, selfdistill and frozen, got "):
        StudyArguments(arms=["sft", "lora"])


def test_a_stage_is_not_pushed_while_it_is_unfinished(tmp_path):
    config = FrozenGroupsSFTConfig(push_to_hub=True, bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="`push_to_hub` is not for stages.*publish_model.py .*frozen"):
        train_stage(FrozenGroupsSFTTrainer, config, "org/model", tmp_path, ("known",), tmp_path / "frozen")


def test_model_without_attention(toy_study, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy_study.model)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    config = FrozenGroupsSFTConfig(trainable_groups=["attention"], bf16=False, use_cpu=True, report_to="none")
    mix = toy_study.output / "mix"
    with pytest.raises(ValueError, match="contains 'attention', but MambaForCausalLM has no attention modules"):
        train_stage(FrozenGroupsSFTTrainer, config, str(tmp_path / "mamba"), mix, ("known",), tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()
