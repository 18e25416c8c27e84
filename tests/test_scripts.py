# SPDX-License-Identifier: Apache-2.0
"""The single-stage scripts: their help, their docstrings' commands, and that a chain of them is the study."""

import ast
import json
import re
import runpy

import psutil
import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from toy_study import SCRIPTS, STUDY_FLAGS, run_script

from trl_selfdistill import FrozenGroupsSFTTrainer, cli
from trl_selfdistill.files import read_json, read_jsonl, write_json, write_jsonl
from trl_selfdistill.hallucination import RATES
from trl_selfdistill.studies import command_line


STAGE_SCRIPTS = sorted({*cli.PROGRAMS.values()} - {"publish_model.py", "check_distributed.py"})
TRAINING = STUDY_FLAGS[STUDY_FLAGS.index("--num_train_epochs") :]
MIX = STUDY_FLAGS[STUDY_FLAGS.index("--num_known") : STUDY_FLAGS.index("--num_train_epochs")]
SLICK = STUDY_FLAGS[: STUDY_FLAGS.index("--num_known")]


def training_flags(**changes) -> list[str]:
    """The flags of the study's training that every training script has, with `changes`."""
    flags = [*TRAINING]
    at = flags.index("--stage1_learning_rate")
    del flags[at : at + 2]
    return flags + [text for name, value in changes.items() for text in (f"--{name}", str(value))]


def parser_of(name: str, monkeypatch) -> command_line.ScriptParser:
    """A parser of what a script parses."""
    calls = []
    monkeypatch.setattr(command_line, "run_script", lambda *arguments, **options: calls.append(arguments))
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return command_line.ScriptParser(calls[0][1])


@pytest.mark.parametrize("name", STAGE_SCRIPTS)
def test_help_is_the_docstring_with_commands(name, monkeypatch, capsys):
    docstring = ast.get_docstring(ast.parse((SCRIPTS / name).read_text()))
    monkeypatch.setenv("TRL_SELFDISTILL_COMMAND", "trl-selfdistill a-command --help")  # as cli.py sets it
    with pytest.raises(SystemExit) as ended:
        run_script(name, "--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: trl-selfdistill a-command [--config FILE.yaml]")
    assert ended.value.code == 0 and docstring in text and "\n  --output_dir" in text
    assert docstring.count("\n    trl-selfdistill ") >= 2  # tests/test_documents.py parses them


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--aftr model", "--aftr, did you mean --after?"),
        ("--num_process 2", "--num_process, did you mean --num_processes?"),
    ],
)
def test_a_flag_that_is_unknown_is_named_before_those_that_are_missing(capsys, flags, message):
    with pytest.raises(SystemExit):
        run_script("check.py", *flags.split())
    assert capsys.readouterr().err.endswith(f"error: unrecognized argument {message}\n")


def test_the_stages_one_by_one_are_the_study(toy_study, tmp_path):
    given = ["--model_name_or_path", toy_study.model, "--facts", toy_study.facts]
    run_script("annotate_facts.py", "--output_dir", tmp_path, *given, *SLICK, "--seed", 42, "--bf16", "false")
    annotated, mix = tmp_path / "annotated" / "facts.jsonl", tmp_path / "mix"
    run_script("build_training_mix.py", "--annotated", annotated, "--output_dir", mix, *MIX, "--seed", 42)
    stage1 = training_flags(num_train_epochs=1, learning_rate=1e-3, kl_weight=0, splits="known")
    runs = {
        "stage1": ("self_distill_sft.py", toy_study.model, stage1),
        "sft": ("self_distill_sft.py", tmp_path / "stage1", training_flags(kl_weight=0)),
        "frozen": ("frozen_groups_sft.py", tmp_path / "stage1", training_flags(trainable_groups="attention")),
    }
    for name, (script, model, flags) in runs.items():
        run_script(script, "--mix", mix, "--model_name_or_path", model, "--output_dir", tmp_path / name, *flags)
    run_script("report.py", "--variants", tmp_path / "sft", tmp_path / "frozen", "--output_dir", tmp_path)
    files = "facts/facts annotated/facts annotated/progress mix/known mix/new mix/heldout".split()
    for file in [*(f"{name}.jsonl" for name in files), *(f"{name}/model.safetensors" for name in runs)]:
        assert (tmp_path / file).read_bytes() == (toy_study.output / file).read_bytes(), file
    ours, theirs = (read_json(folder / "results.json") for folder in (tmp_path, toy_study.output))
    for name in ("sft", "frozen"):
        for key in ("heldout_curve", "new_curve", "forgetting", "forgetting_difference", "trainable_parameters"):
            assert ours[name][key] == theirs[name][key]
    assert (tmp_path / "frozen" / "parameter_groups.json").is_file()
    flags = ["--mix", mix, "--model_name_or_path", toy_study.model, "--output_dir", tmp_path / "stage1"]
    run_script("self_distill_sft.py", *flags, *stage1, "--splits", "known", "new")
    assert read_json(tmp_path / "stage1" / "training.json")["splits"] == ["known", "new"]  # made again


def test_a_run_on_a_mix_depends_on_its_anchors_which_are_no_held_out_facts(copied_study, tmp_path):
    mix, prompts, run = copied_study.output / "mix", tmp_path / "prompts.jsonl", tmp_path / "run"
    flags = training_flags(anchors="kl", anchor_dataset_name=prompts, max_steps=1)
    flags += ["--mix", mix, "--model_name_or_path", copied_study.output / "stage1", "--output_dir", run]
    keys, trained = set(), read_jsonl(mix / "known.jsonl")  # which may be anchors as well
    for number in (1, 2):
        write_jsonl(prompts, trained[:number])
        run_script("self_distill_sft.py", *flags)
        keys.add(read_json(run / "run.json")["key"])
    assert len(keys) == 2
    write_jsonl(prompts, read_jsonl(mix / "heldout.jsonl"))
    with pytest.raises(ValueError, match="is one of 40 that are in `eval_dataset`, too"):
        run_script("self_distill_sft.py", *flags)


def test_evaluate_facts(toy_study, tmp_path, capsys):
    facts_file = toy_study.output / "mix" / "heldout.jsonl"
    flags = ["--facts", facts_file, "--output_dir", tmp_path / "out"]
    run_script("evaluate_facts.py", "--model_name_or_path", toy_study.output / "sft", *flags, "--bf16", "false")
    predictions = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    last = read_jsonl(toy_study.output / "sft" / "accuracy.jsonl")[-1]
    assert {row["fact_id"]: [row["outcome"], row["prediction"]] for row in predictions} == last["answers"]["heldout"]
    accuracy = read_json(tmp_path / "out" / "accuracy.json")
    assert {*accuracy} == {"overall", "relation", "slick_category"} and {*accuracy["relation"]} == {"country", "river"}
    for relation, group in accuracy["relation"].items():
        outcomes = [row["outcome"] for row in predictions if row["fact_id"].startswith(relation)]
        shares = {rate: outcomes.count(outcome) / len(outcomes) for rate, outcome in RATES.items()}
        assert group == shares | {"num_facts": len(outcomes)}
    shown = ", ".join(f"{rate.replace('_', ' ')} {accuracy['overall']['overall'][rate]:.3f}" for rate in RATES)
    assert f"\noverall: {shown} of 40 facts" in "\n" + capsys.readouterr().out
    assert len(read_jsonl(tmp_path / "out" / "progress.jsonl")) == 2  # what it is of, and one piece
    before = (tmp_path / "out" / "run.json").read_bytes()
    for changes in ([], ["--max_new_tokens", 31]):
        flags += ["--bf16", "false", *changes]
        run_script("evaluate_facts.py", "--model_name_or_path", toy_study.output / "sft", *flags)
        assert ((tmp_path / "out" / "run.json").read_bytes() == before) == (not changes)


OWN_FLAGS = training_flags(max_steps=2, save_strategy="no")
TEXT = [{"prompt": f"Q: {i}\nA:", "completion": " Norway"} for i in range(8)]


@pytest.mark.parametrize("adapter", ["", "--use_peft --lora_target_modules q_proj v_proj"], ids=["full", "adapter"])
def test_frozen_groups_on_a_saved_dataset_by_a_config_file(toy_study, tmp_path, calls_of, capsys, adapter):
    saved = calls_of(FrozenGroupsSFTTrainer, "save_model")
    dataset = Dataset.from_list(TEXT)
    DatasetDict(train=dataset, validation=dataset.select(range(2))).save_to_disk(tmp_path / "data")
    config = {"dataset_name": str(tmp_path / "data"), "dataset_test_split": "validation", "eval_strategy": "epoch"}
    config |= {"model_name_or_path": str(toy_study.model), "frozen_groups": ["mlp"], "output_dir": "not this one"}
    config |= {"model_init_kwargs": {"attn_implementation": "eager"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    flags = ["--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "out", *OWN_FLAGS, *adapter.split()]
    with pytest.raises((SystemExit, ValueError)) as ended:
        run_script("frozen_groups_sft.py", *flags[2:], "--model_name_or_path", toy_study.model, "--dataset_name", "a")
    assert "Nothing would be frozen" in f"{capsys.readouterr().err}{ended.value}"
    run_script("frozen_groups_sft.py", *flags, "--disable_tqdm", "false")
    shown = capsys.readouterr()
    assert "2/2" in shown.err and "'eval_loss'" in shown.out
    [model] = [call.args[0].model for call in saved]
    assert model.config._attn_implementation == "eager"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert adapter or frozen == {name for name in load_file(tmp_path / "out/model.safetensors") if ".mlp." in name}


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("", "Set one of `mix` and `dataset_name`"),
        ("--mix a --dataset_name b", "Set one of `mix` and `dataset_name`"),
        ("--mix a --splits heldout", "`splits` may hold known and new.*heldout is for evaluation only"),
        ("--dataset_name data --dataset_train_split sft", r"data: no split 'sft'; there are \['train'\]"),
        ("--dataset_name holes.jsonl", r"holes.jsonl` \(split 'train'\), row 2: there is no completion; fill it in"),
        ("--dataset_name turns.jsonl", "turns.jsonl` .*: messages is 'hello'; give text, or a list of `role` and"),
        ("--dataset_name nobody.jsonl", r"nobody.jsonl` .*: messages is \[\]; give text, or a list of `role` and"),
        ("--dataset_name numbers.jsonl", "numbers.jsonl` .*: (prompt|completion) is 1; give text, or a list of"),
        ("--dataset_name qa.jsonl", "qa.jsonl` .*'train'.* has the columns answer, prompt: give prompt and"),
        ("--dataset_name qa.jsonl --output_dir stage", "`output_dir`: stage is the model to train, or a stage's"),
        ("--dataset_name qa.jsonl --model_name_or_path a --output_dir ./a", "`output_dir`: a is the model to train"),
        ("--dataset_name qa.jsonl --model_name_or_path no/model", "`model_name_or_path`: 'no/model' is neither a fo"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(toy_study, tmp_path, monkeypatch, capsys, flags, error):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(TEXT).save_to_disk("data")
    write_jsonl("holes.jsonl", [TEXT[0], {"prompt": "Q"}])
    write_jsonl("qa.jsonl", [{"prompt": "Q", "answer": "A"}])
    write_jsonl("turns.jsonl", [{"messages": "hello"}])
    write_json("stage/run.json", {})
    write_jsonl("nobody.jsonl", [{"messages": []}])
    write_jsonl("numbers.jsonl", [{"prompt": 1, "completion": 1}])
    model = ("--model_name_or_path", toy_study.model, "--output_dir", "out")
    with pytest.raises((SystemExit, ValueError)) as ended:
        run_script("self_distill_sft.py", *model, *flags.split(), *OWN_FLAGS)
    assert re.search(error, f"{capsys.readouterr().err}{ended.value}")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("num_knwon: 3", "--num_knwon, did you mean --num_known?"),
        ("num_kno: 3", "--num_kno, did you mean --num_known?"),  # no name is shortened here
        ("num_known: 0", "`num_known` must be"),
        ("num_known: {a: 3}", "argument --num_known: expected one number, got {'a': 3}"),
        ("num_known: [3", "expected ',' or ']'"),
    ],
)
def test_a_mistake_in_a_config_file_is_told_without_a_traceback(tmp_path, capsys, line, error):
    (tmp_path / "config.yaml").write_text(f"{line}\n")
    with pytest.raises(SystemExit) as ended:
        run_script("build_training_mix.py", "--annotated", "a", "--config", tmp_path / "config.yaml")
    assert ended.value.code == 2 and error in capsys.readouterr().err


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_measurement(tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPTS / "measure_on_gpu.py"))
    launcher = """import signal, subprocess, sys
worker = subprocess.Popen(["sleep", "60"], start_new_session=True)  # as torchrun's
signal.signal(signal.SIGTERM, lambda *_: sys.exit(worker.kill() or worker.wait()))
print(worker.pid, flush=True)
signal.pause()"""
    codes = {
        "wrong": "import sys; sys.exit('no')",
        "slow": launcher,
        "right": "print('2 passed in 1.00s', 'leaked', sep=chr(10))",
    }
    parts = [script["Part"](name, 4, [["-c", code]], script["last_line"]) for name, code in codes.items()]
    monkeypatch.setitem(script["main"].__globals__, "checks", lambda folder: parts[:2])
    monkeypatch.setitem(script["main"].__globals__, "timings", lambda folder, small: parts[2:])
    monkeypatch.setattr("sys.argv", ["measure_on_gpu.py", "--small", "--output_dir", str(tmp_path)])
    assert script["main"]() == 1
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[1][:2] == ["| wrong", "FAILED, exit status 1"] and rows[1][3:] == ["no", "NO |"]
    assert rows[2][:3] == ["| slow", "cut off", "4"] and rows[2][4:] == ["NO |"]
    assert not psutil.pid_exists(int(rows[2][3]))
    assert rows[3][:2] == ["| right", "ended"] and rows[3][3:] == ["2 passed in 1.00s", "yes |"]
