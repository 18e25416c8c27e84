# SPDX-License-Identifier: Apache-2.0
"""`check`: a tiny model that knows its facts, and others that were made from it and have lost some."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import made_once
from peft import LoraConfig, get_peft_model
from toy_study import AS_TEXT, run_script, taught_model, toy_facts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfdistill.files import read_json, read_jsonl, write_json, write_jsonl
from trl_selfdistill.hallucination import score_hallucinations
from trl_selfdistill.slick import slick
from trl_selfdistill.studies import check


def make_models(folder):
    """In `base` a model that was taught 100 facts, in `noisy` and `adapter` what noise has made of it."""
    model, tokenizer = taught_model(toy_facts(50), 50, num_steps=300, most_shown=5)
    tokenizer.chat_template = None
    write_jsonl(folder / "facts.jsonl", toy_facts(50))
    for name in ("base", "noisy"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "adapter")  # without a tokenizer
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory, worker_id):
    return made_once(tmp_path_factory, worker_id, "check-models", make_models)


def run_check(models, folder, *flags, before="base", after="noisy") -> int:
    """Runs the check in this process and returns its exit status."""
    paths = ["--before", models / before, "--after", models / after, "--known_dir", folder / "known"]
    paths += ["--facts", models / "facts.jsonl", "--output_dir", folder / "out", "--bf16", "false"]
    try:
        run_script("check.py", *paths, *flags)
    except SystemExit as ended:
        return ended.code
    return 0


def refuse(*args, **kwargs):
    raise AssertionError("asked once more")


def test_it_finds_what_was_lost_and_a_second_model_costs_one_pass(models, tmp_path, monkeypatch, capsys):
    assert run_check(models, tmp_path) == 2
    report = read_json(tmp_path / "out" / "check.json")
    [known] = [read_jsonl(path) for path in tmp_path.glob("known/base-*/known/facts.jsonl")]
    [answers] = [read_jsonl(path) for path in tmp_path.glob("known/base-*/noisy-*/model_answers.jsonl")]
    right, before = ([row[name] for row in known] for name in ("answer", "base_answer"))
    scores = score_hallucinations(answers, right, baseline_predictions=before)
    assert scores == report["scores"] and report["loss"]["value"] == -scores["net_change"]
    assert report["loss"]["low"] > 0.02 and report["num_known"] == len(known) >= check.LEAST_KNOWN
    rows = zip(known, answers, right, before, strict=True)
    lost = {row["fact_id"]: (old, new) for row, new, answer, old in rows if old == answer != new}
    assert {row["fact_id"]: (row["base_answer"], row["model_answer"]) for row in report["lost"]} == lost
    text = (tmp_path / "out" / "check.md").read_text()
    assert report["summary"] in text and report["summary"] in capsys.readouterr().out
    assert f"## Lost facts ({len(lost)})" in text and f"| {report['lost'][0]['question']} " in text
    assert (tmp_path / "out" / "check.png").stat().st_size > 1000 and "](check.png)" in text
    with monkeypatch.context() as patch:
        patch.setattr(check, "annotate_facts", refuse)
        run_check(models, tmp_path, after="adapter")
        assert read_json(tmp_path / "out" / "check.json")["model"] == "adapter"
    monkeypatch.setattr(check, "model_to_ask", refuse)  # another tolerance costs none
    assert run_check(models, tmp_path, "--tolerance", report["loss"]["high"]) == 0
    assert run_check(models, tmp_path, "--tolerance", report["loss"]["value"]) == 3
    assert read_json(tmp_path / "out" / "check.json")["num_needed"] is None
    assert run_check(models, tmp_path, "--tolerance", (report["loss"]["value"] + report["loss"]["high"]) / 2) == 3
    other = read_json(tmp_path / "out" / "check.json")
    to_ask = other["num_needed"] / other["num_known"] * other["num_asked"]
    assert f" or {to_ask:,.0f} facts to ask the base" in other["summary"] and to_ask > other["num_needed"]


@pytest.mark.parametrize("num_asked", [0, 1], ids=["base", "model"])
def test_a_stopped_check_goes_on_and_other_settings_take_nothing_from_it(models, tmp_path, monkeypatch, num_asked):
    run_check(models, tmp_path / "whole")
    called, answer = [], check.answer_prompts

    def stop(*args, title, **kwargs):
        if title is not None:  # not the examples
            called.append(title)
        if len(called) > num_asked:
            raise KeyboardInterrupt
        return answer(*args, title=title, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(check, "answer_prompts", stop)
        assert run_check(models, tmp_path) == 130 and len(called) == num_asked + 1
        assert run_check(models, tmp_path, "--seed", 1) == 130
    monkeypatch.setattr(slick, "_ask", refuse)  # SLiCK's results are there
    assert run_check(models, tmp_path) == 2
    ours, whole = (read_json(folder / "out" / "check.json") for folder in (tmp_path, tmp_path / "whole"))
    assert ours["scores"] == whole["scores"] and ours["lost"] == whole["lost"]


THINKING = "{% if add_generation_prompt and enable_thinking is not defined %}<think>{% endif %}"


def test_a_base_that_is_wrong_when_it_is_asked_once_more_is_refused(models, tmp_path, monkeypatch):
    """As after a chat template that ends in a blank, which its tokens of an answer begin with."""
    monkeypatch.setattr(check, "_ask", lambda loaded, model, facts, *args: ["Oslo"] * len(facts))
    with pytest.raises(ValueError, match=r"`before`: asked once more, .*base is right on 0.0\d of .*Mend its chat"):
        run_check(models, tmp_path)


def copy_with(folder, models, name, chat_template, more_tokens=()):
    """A copy of a model in `folder`, with a chat template and more tokens."""
    model = AutoModelForCausalLM.from_pretrained(models / name)
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    tokenizer.chat_template = chat_template
    if tokenizer.add_tokens([*more_tokens]):
        model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder / name)


def pickled_copy(model, folder):
    """A copy with pickled weights, tied ones twice."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(AutoModelForCausalLM.from_pretrained(model).state_dict(), folder / "pytorch_model.bin")


def test_what_the_same_weights_know_in_other_files_is_kept(models, tmp_path, monkeypatch):
    run_check(models, tmp_path)
    report = read_json(tmp_path / "out" / "check.json")
    for name in ("pickled", "shards"):
        pickled_copy(models / "base", tmp_path / name)
    (tmp_path / "shards" / "pytorch_model.bin").unlink()
    AutoModelForCausalLM.from_pretrained(models / "base").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    monkeypatch.setattr(check, "annotate_facts", refuse)
    for name in ("pickled", "shards"):
        assert run_check(models, tmp_path, before=tmp_path / name) == 2
        other = read_json(tmp_path / "out" / "check.json")
        assert other["base"] == name and other["scores"] == report["scores"] and other["lost"] == report["lost"]


def test_instruct_models_are_asked_through_their_templates_and_without_thinking(models, tmp_path):
    run_check(models, tmp_path / "text")
    copy_with(tmp_path, models, "base", AS_TEXT + THINKING)
    copy_with(tmp_path, models, "noisy", AS_TEXT, ["one more"])
    text = read_json(tmp_path / "text" / "out" / "check.json")
    for flags in ((), ("--chat", "false")):
        run_check(tmp_path, tmp_path, *flags, "--facts", models / "facts.jsonl")
        chat = read_json(tmp_path / "out" / "check.json")
        assert chat["prompts"] == ("text" if flags else "chat") and len(chat["notes"]) == (1 if flags else 2)
        assert "Their tokenizers differ, and each was" in (tmp_path / "out" / "check.md").read_text()
        assert chat["scores"] == text["scores"] and chat["lost"] == text["lost"]


def test_both_are_loaded_in_4_bit(models, tmp_path, calls_of):
    pytest.importorskip("bitsandbytes")
    asked = calls_of(check, "answer_prompts")
    assert run_check(models, tmp_path, "--load_in_4bit", "true", after="adapter") == 2
    kinds = [{type(module).__name__ for module in call.args[0].modules()} for call in asked]
    assert len(kinds) == 3 and all("Linear4bit" in kind for kind in kinds)  # three examples, all facts, the model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--after copy", "`after` copy has the weights of `before`: pass the trained model"),
        ("--after pickled", "`after` pickled has the weights of `before`"),
        ("--after nothing", "`after`: 'nothing' is neither a folder with a model nor one on the Hub"),
        ("--before orphan", "`before`: 'nowhere' is neither a folder with a model nor one on the Hub"),
        ("--after broken", "broken cannot be loaded as a causal language model: .*header"),
        ("--facts nothing.csv", "`facts`: .*No such file or directory: 'nothing.csv'"),
        ("--facts org/nothing", "`facts`: org/nothing cannot be read here, nor as a dataset of the Hub"),
        ("--chat true", "base has no chat template, and both models are asked alike. Pass `--chat false`"),
        ("--facts french.jsonl", r"base HighlyKnows [1-9]\d? of 84 .* 50.* 'Which .*\?', expected 'la .*', answered"),
        ("--tolerance 1.5", "`tolerance` is 1.5; it must be a fraction"),
        ("--batch_size 0", "`batch_size` must be 1 or more .* got 0"),
        ("--after a/b --update_card", "`update_card` needs a folder as `after`, got 'a/b'"),
        ("--tolerence 0.1", "tolerence"),
    ],
)
def test_wrong_input_ends_with_status_1(models, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "noisy"):
        shutil.copytree(models / name, name)
    shutil.copytree("base", "copy")
    pickled_copy(Path("base"), Path("pickled"))
    shutil.copytree("noisy", "broken")
    Path("broken/model.safetensors").write_bytes(b"cut off")
    shutil.copytree(models / "adapter", "orphan")
    write_json("orphan/adapter_config.json", {"base_model_name_or_path": "nowhere"})
    french = {"country": "", "river": "la "}
    write_jsonl("french.jsonl", toy_facts(50).map(lambda row: {"answer": french[row["relation"]] + row["answer"]}))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # puts back what the script sets
    line = ["--before", "base", "--after", "noisy", "--facts", models / "facts.jsonl", "--bf16", "false"]
    with pytest.raises((SystemExit, ValueError)) as ended:
        run_script("check.py", *line, *flags.split())
    if ended.type is ValueError:
        sys.excepthook(ended.type, ended.value, ended.tb)
    else:
        assert ended.value.code == 1
    error = capsys.readouterr().err
    assert re.search(f"check.py: error: .*{message}", error) and "Traceback" not in error
    assert not list(tmp_path.glob("outputs/check"))


def test_the_section_of_a_foreign_card_replaces_itself(models, tmp_path):
    shutil.copytree(models / "noisy", tmp_path / "noisy")
    card = tmp_path / "noisy" / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n")
    for tolerance in (0.02, 0.9):
        run_check(models, tmp_path, "--update_card", "true", "--tolerance", tolerance, after=tmp_path / "noisy")
    text, report = card.read_text(), read_json(tmp_path / "out" / "check.json")
    assert text.startswith("---\nlicense: mit\n---\n\n# Mine\n\n<!-- trl-selfdistill check -->\n## Facts that it for")
    assert text.count("## Facts that it forgot") == 1 and report["summary"] in text
    assert len([*tmp_path.glob("known/base-*/noisy-*")]) == 1  # the card is no part of the model


def test_facts_as_users_have_them(models, tmp_path, calls_of):
    """A column of our own, a relation without exemplars to spare, and a form of an answer longer than the others."""
    facts = read_jsonl(models / "facts.jsonl")
    rows = [{**fact, "base_answer": "?", "aliases": ["long " * 40]} for fact in facts]
    rows += [{**fact, "relation": "tiny", "question": f"{i}?", "fact_id": f"t{i}"} for i, fact in enumerate(facts[:8])]
    write_jsonl(tmp_path / "facts.jsonl", rows)
    asked = calls_of(check, "answer_prompts")
    assert run_check(models, tmp_path, "--facts", tmp_path / "facts.jsonl") == 2
    report = read_json(tmp_path / "out" / "check.json")
    assert "tiny" not in report["relations"] and min(call.kwargs["max_new_tokens"] for call in asked) > 40
    [slick_file] = tmp_path.glob("known/base-*/known/slick.jsonl")
    units = [row for row in map(json.loads, slick_file.read_text().splitlines()[1:]) if "/0/" in row["unit"]]
    assert report["num_asked"] == sum(len(row["result"]) for row in units) < len(facts)


def test_a_model_that_is_changed_in_place_is_asked_again(models, tmp_path):
    shutil.copytree(models / "noisy", tmp_path / "noisy")
    run_check(models, tmp_path, after=tmp_path / "noisy")
    before = read_json(tmp_path / "out" / "check.json")["loss"]["value"]
    config = tmp_path / "noisy" / "config.json"
    write_json(config, read_json(config) | {"rms_norm_eps": 5.0})
    run_check(models, tmp_path, after=tmp_path / "noisy")
    assert read_json(tmp_path / "out" / "check.json")["loss"]["value"] > before
