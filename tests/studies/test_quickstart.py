# SPDX-License-Identifier: Apache-2.0
"""The quickstart's study on a tiny model: what it leaves, and that nothing is lost or done twice."""

import logging
import re
import shutil

import pytest
from PIL import Image
from safetensors import safe_open
from toy_study import AS_TEXT, VARIANTS, rerun, run_script, runs_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from trl_selfdistill.files import read_json
from trl_selfdistill.studies import check, runs
from trl_selfdistill.studies.fact_accuracy import ask_facts, read_records
from trl_selfdistill.studies.facts.table import read_facts
from trl_selfdistill.studies.results import read_result, render_table
from trl_selfdistill.studies.runs import StudySetup, Variant, train_variant
from trl_selfdistill.studies.stages import base_stage, facts_of_mix
from trl_selfdistill.studies.training_mix import load_mix


@pytest.mark.parametrize("name", ["stage1", *VARIANTS])
def test_checkpoints_load_answer_as_recorded_and_have_their_cards(toy_study, name):
    folder = toy_study.output / name
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob("_*"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    recorded = read_records(folder / "accuracy.jsonl")[-1].answers
    for split, facts in load_mix(toy_study.output / "mix").items():
        assert ask_facts(model, tokenizer, facts) == recorded[split]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "difference from the base" in card and "solved exemplars as turns of its chat template;" in card
    assert not any(private in card for private in (str(toy_study.output.parent), "/tmp/", "/home/", ".partial"))
    if name != "stage1":
        assert (toy_study.output / "report.md").read_text(encoding="utf-8").split("\n\n")[1] in card
        assert ("difference from plain SFT" in card) == (name != "sft")
        composition = read_json(folder / "training.json")["composition"]
        assert composition == {"known": {"HighlyKnown": 10}, "new": {"Unknown": 20}}


def test_the_base_is_asked_with_exemplars_and_through_its_template(toy_study, tmp_path, calls_of):
    model, tokenizer = toy_study.model, AutoTokenizer.from_pretrained(toy_study.model)
    asked = calls_of(check, "answer_prompts")
    config, records = SFTConfig(tmp_path, bf16=False, use_cpu=True, report_to="none"), []
    for name, template in (("text", None), ("chat", AS_TEXT)):
        shutil.copytree(model, tmp_path / name, ignore=shutil.ignore_patterns("chat_template.jinja"))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        setup = StudySetup(str(tmp_path / name), toy_study.output / "mix", config)
        records += read_records(base_stage(setup, toy_study.facts, tmp_path / f"{name}-answers"))
    assert [record.prompts for record in records] == ["few-shot", "few-shot chat"]
    assert records[0].answers == records[1].answers and records[0].accuracy("heldout") > 0.6
    heldout = load_mix(setup.mix)["heldout"]
    assert {*records[0].answers["heldout"]} == {*heldout["fact_id"]}
    for prompt, chat in zip(*(call.args[2] for call in asked), strict=True):
        assert len(chat) == 2 * 4 + 1 and sum(question in prompt for question in heldout["question"]) == 1


def test_variants_start_from_stage1_and_self_distillation_and_frozen_groups_forget_less(toy_study):
    stage1 = read_records(toy_study.output / "stage1" / "accuracy.jsonl")
    for name in VARIANTS:
        result = read_result(toy_study.output / name)
        assert [record.epoch for record in result.records] == [0.0, 1.0, 2.0]
        assert result.before == result.records[0] and result.before.answers == stage1[-1].answers
    assert len(stage1) == 1 and read_result(toy_study.output / "stage1").before is None
    # Finished runs are known by what their configurations had
    assert "teacher_model_revision" in read_json(toy_study.output / "selfdistill/run.json")["arguments"]["config"]
    results = read_json(toy_study.output / "results.json")
    assert results["sft"]["forgetting"]["low"] > 0
    assert results["selfdistill"]["forgetting_difference"]["high"] < 0
    assert results["frozen"]["forgetting_difference"]["high"] < 0


def test_report_and_results_are_of_the_variants_and_their_figure_is_beside_each(toy_study):
    """What stands in the table: test_report.py."""
    results, report = [read_result(toy_study.output / name) for name in VARIANTS], toy_study.output / "report.md"
    for text in (report.read_text(encoding="utf-8"), toy_study.stdout):
        assert render_table(results) in text
    assert "\n\nHeld-out facts were known" in report.read_text(encoding="utf-8")
    assert "over facts. Precision: float32.\n" in report.read_text(encoding="utf-8")
    summaries = read_json(toy_study.output / "results.json")
    for result, (name, summary) in zip(results, summaries.items(), strict=True):
        heldout = [record.accuracy("heldout") for record in result.records]
        assert name == result.name and summary["heldout_curve"] == heldout
        assert summary["forgetting"]["value"] == pytest.approx(max(heldout) - heldout[-1])
    folders = " ".join(str(toy_study.output / name) for name in VARIANTS)
    assert f"trl-selfdistill publish --checkpoints {folders} --repo_id YOUR_NAME/" in toy_study.stdout
    figure = (toy_study.output / "curves.png").read_bytes()
    assert Image.open(toy_study.output / "curves.png").format == "PNG"
    assert all((toy_study.output / name / "curves.png").read_bytes() == figure for name in VARIANTS)


def test_a_changed_argument_runs_what_depends_on_it_and_nothing_else(copied_study, caplog):
    report = (copied_study.output / "report.md").read_bytes()
    assert rerun(copied_study) == set()
    assert (copied_study.output / "report.md").read_bytes() == report
    flags = ("--kl_weight", "2", "--trainable_groups", "mlp", "--variants", "sft", "frozen")
    with caplog.at_level(logging.INFO):
        assert rerun(copied_study, *flags) == {"frozen"}
    assert read_json(copied_study.output / "results.json").keys() == {"sft", "frozen"}
    assert re.search(r"frozen: done in \d\d:\d\d", caplog.text) and "sft: nothing has changed, kept" in caplog.text


def test_every_stage_loads_the_model_with_the_arguments_asked_for(copied_study, calls_of):
    loads = calls_of(AutoModelForCausalLM, "from_pretrained")
    rerun(copied_study, "--model_init_kwargs", '{"attn_implementation": "eager"}', "--variants", "sft")
    assert [load.kwargs["attn_implementation"] for load in loads] == ["eager"] * 4  # SLiCK, the base, stage 1, SFT


def test_real_new_facts(copied_study):
    with pytest.raises(ValueError, match="`new_facts='real'`.*`slick_only_highly_known`"):
        rerun(copied_study, "--new_facts", "real", "--slick_only_highly_known", "true")
    flags = ("--new_facts", "real", "--num_new", "4", "--max_answer_share", "0.5", "--variants", "selfdistill")
    assert rerun(copied_study, *flags, "--num_train_epochs", "1") == {"mix", "base", "stage1", "selfdistill"}
    annotated = read_facts(copied_study.output / "annotated" / "facts.jsonl")
    unknown = {fact["fact_id"] for fact in annotated if fact["slick_category"] == "Unknown"}
    new = load_mix(copied_study.output / "mix")["new"]
    assert len(new) == 4 and set(new["fact_id"]) <= unknown
    assert "- 4 real new facts." in (copied_study.output / "selfdistill" / "README.md").read_text(encoding="utf-8")


def test_the_study_runs_in_4_bit(copied_study):
    """Adapters on a quantised base, from the annotation to the report."""
    adapter = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--num_train_epochs", "1"]
    assert rerun(copied_study, "--load_in_4bit", *adapter) == {"annotated", "mix", "base", "stage1", *VARIANTS}
    for name in ("stage1", *VARIANTS):
        folder = copied_study.output / name
        assert not (folder / "model.safetensors").exists()  # the base is not saved again, merged or not
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert file.keys() and all("lora_" in key and "teacher" not in key for key in file.keys())
        training = read_json(folder / "training.json")
        assert training["is_adapter"] and 0 < training["trainable_parameters"] < 0.1 * training["parameters"]
    log = read_json(copied_study.output / "selfdistill" / "training.json")["log_history"]
    assert max(row.get("kl_loss", 0) for row in log) > 0
    with pytest.raises(ValueError, match="`load_in_4bit` and `load_in_8bit` need `use_peft`"):
        rerun(copied_study, "--load_in_4bit")


def test_a_run_is_not_pushed_while_it_is_unfinished(tmp_path):
    config = SFTConfig(tmp_path, bf16=False, use_cpu=True, report_to="none", push_to_hub=True)
    with pytest.raises(ValueError, match="`push_to_hub` would publish.*trl-selfdistill publish .*sft"):
        train_variant(Variant("sft", "SFT"), StudySetup("org/model", tmp_path, config), tmp_path / "sft", facts_of_mix)


def test_ctrl_c_loses_nothing_and_the_next_run_resumes(toy_study, copied_study, monkeypatch, capsys, calls_of):
    before, on_step_end = runs_of(copied_study.output), runs.StepTimes.on_step_end
    shutil.rmtree(copied_study.output / "sft")
    flags = [*copied_study.flags(copied_study.output), "--variants", "sft"]

    def interrupted(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 6:  # in the second epoch, after the checkpoint of the first
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.StepTimes, "on_step_end", interrupted)
        with pytest.raises(SystemExit) as ended:
            run_script("run_study.py", *flags)
    message = "Interrupted. What is done stays: run the same command again to go on.\n"
    assert ended.value.code == 130 and capsys.readouterr().err.endswith(message)
    partial = copied_study.output / "sft.partial"
    assert (partial / "checkpoint-4" / "trainer_state.json").is_file() and not (copied_study.output / "sft").exists()

    found = calls_of(runs, "last_complete_checkpoint")
    run_script("run_study.py", *flags)
    assert [call.result for call in found] == [str(partial / "checkpoint-4")]
    after = runs_of(copied_study.output)
    assert all(before[name] == after[name] for name in before if name != "sft")
    for file in ("model.safetensors", "accuracy.jsonl"):
        assert (copied_study.output / "sft" / file).read_bytes() == (toy_study.output / "sft" / file).read_bytes()
