# SPDX-License-Identifier: Apache-2.0
"""The single-stage scripts: their help, their docstrings' commands, and that a chain of them is the study."""

import ast
import json
import runpy
import shlex
import sys

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from toy_study import ARMS, SCRIPTS, STUDY_FLAGS, run_script
from transformers import AutoModelForCausalLM

from trl_selfdistill.studies import command_line
from trl_selfdistill.studies.fact_accuracy import accuracy_by_group
from trl_selfdistill.studies.facts.table import load_facts


STAGE_SCRIPTS = [
    "annotate_facts.py",
    "build_training_mix.py",
    "self_distill_sft.py",
    "frozen_groups_sft.py",
    "evaluate_facts.py",
    "report.py",
    "run_study.py",
    "mechanism_study.py",
    "compare_methods.py",
]
PRESETS = [
    f"{script} {name}" for script in ("mechanism", "compare") for name in ("default", "small_llama", "paper", "tiny")
]
TRAINING = STUDY_FLAGS[STUDY_FLAGS.index("--num_train_epochs") :]
MIX = STUDY_FLAGS[STUDY_FLAGS.index("--num_known") : STUDY_FLAGS.index("--num_train_epochs")]
SLICK = STUDY_FLAGS[: STUDY_FLAGS.index("--num_known")]


def training_flags(**changes) -> list[str]:
    """The flags of the study's training that every training script has, with `changes`."""
    flags = [*TRAINING]
    at = flags.index("--stage1_learning_rate")
    del flags[at : at + 2]
    return flags + [text for name, value in changes.items() for text in (f"--{name}", str(value))]


def parser_of(name: str, monkeypatch):
    """The parser that a script builds."""
    parsers = []

    def note(main, dataclass_types, description, presets=None):
        parsers.append(command_line.build_parser(dataclass_types, description, name))

    monkeypatch.setattr(command_line, "run_script", note)
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return parsers[0]


@pytest.mark.parametrize("name", STAGE_SCRIPTS)
def test_help_reads_well(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(name, "--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    preset = " [--preset {default,small_llama,paper,tiny}]" if name.split("_")[0] in ("mechanism", "compare") else ""
    assert text.startswith(f"usage: accelerate launch --quiet scripts/{name}{preset} [--config FILE.yaml] [flags]\n")
    assert ast.get_docstring(ast.parse((SCRIPTS / name).read_text())) in text
    own = text.split("training (SFTConfig")[0].split("other flags:")[0]
    assert "\n  --output_dir" in text and "(default: None)" not in text and "None" not in own
    assert own.count("\n  --") >= 2
    for action in parser_of(name, monkeypatch)._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_files_that_parse(preset, monkeypatch):
    script, name = preset.split()
    parser = parser_of({"mechanism": "mechanism_study.py", "compare": "compare_methods.py"}[script], monkeypatch)
    flags = ["--config", str(SCRIPTS / f"configs/{script}_{name}.yaml"), "--bf16", "false"]
    *_, config = parser.parse_args_and_config(flags)
    assert (
        config.output_dir.startswith("outputs/")
        and name.split("_")[0] in (SCRIPTS / f"configs/{script}_{name}.yaml").read_text()
    )


@pytest.mark.parametrize("script", ["mechanism_study.py", "compare_methods.py"])
def test_a_preset_that_does_not_exist_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        run_script(script, "--preset", "huge")
    assert "invalid choice: 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("name", STAGE_SCRIPTS)
def test_commands_of_the_docstring_parse(name, monkeypatch):
    docstring = ast.get_docstring(ast.parse((SCRIPTS / name).read_text()))
    commands = [
        shlex.split(text.replace("\\\n", " ")) for text in docstring.split("\n\n") if "accelerate launch" in text
    ]
    assert len(commands) >= 2
    monkeypatch.chdir(SCRIPTS.parent)
    for command in commands:
        assert command[:4] == ["accelerate", "launch", "--quiet", f"scripts/{name}"]
        flags = [flag for flag in command[4:] if flag != "--bf16"]  # what a CPU may lack is checked on parsing
        presets = runpy.run_path(str(SCRIPTS / name)).get("PRESETS", {})
        flags = command_line.expand_preset([*flags, "--bf16", "false"] if "sft" in name else flags, presets)
        parser_of(name, monkeypatch).parse_args_and_config(flags)


@pytest.mark.parametrize("name", STAGE_SCRIPTS)
def test_scripts_are_short(name):
    assert len((SCRIPTS / name).read_text().splitlines()) <= 150


@pytest.fixture(scope="module")
def chain(toy_study, tmp_path_factory):
    """The study by its single stages."""
    output = tmp_path_factory.mktemp("chain")
    given = ["--model_name_or_path", toy_study.model, "--facts", toy_study.facts]
    run_script("annotate_facts.py", "--output_dir", output, *given, *SLICK, "--seed", 42)
    annotated = output / "annotated" / "facts.jsonl"
    run_script("build_training_mix.py", "--annotated", annotated, "--output_dir", output / "mix", *MIX, "--seed", 42)
    stage1 = training_flags(num_train_epochs=1, learning_rate=1e-3, kl_weight=0, splits="known")
    runs = {
        "stage1": ("self_distill_sft.py", toy_study.model, stage1),
        "sft": ("self_distill_sft.py", output / "stage1", training_flags(kl_weight=0)),
        "selfdistill": ("self_distill_sft.py", output / "stage1", training_flags()),
        "frozen": ("frozen_groups_sft.py", output / "stage1", training_flags(trainable_groups="attention")),
    }
    for name, (script, model, flags) in runs.items():
        run_script(
            script, "--mix", output / "mix", "--model_name_or_path", model, "--output_dir", output / name, *flags
        )
    run_script("report.py", "--arms", *(output / name for name in ARMS), "--output_dir", output)
    return output


@pytest.mark.parametrize(
    "file",
    ["facts/facts.jsonl", "annotated/facts.jsonl", "mix/known.jsonl", "mix/new.jsonl", "mix/heldout.jsonl"]
    + [f"{name}/model.safetensors" for name in ("stage1", *ARMS)]
    + [f"{name}/accuracy.jsonl" for name in ARMS],
)
def test_the_stages_one_by_one_are_the_study(chain, toy_study, file):
    assert (chain / file).read_bytes() == (toy_study.output / file).read_bytes()


def test_report_of_the_stages_one_by_one_is_that_of_the_study(chain, toy_study):
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (chain, toy_study.output))
    for name in ARMS:
        for key in ("heldout_curve", "new_curve", "forgetting", "forgetting_difference", "trainable_parameters"):
            assert ours[name][key] == theirs[name][key]
    assert (chain / "frozen" / "parameter_groups.json").is_file()


@pytest.mark.parametrize("method", ["generate", "score"])
def test_evaluate_facts(toy_study, tmp_path, capsys, method):
    facts_file = toy_study.output / "mix" / "heldout.jsonl"
    flags = ["--facts", facts_file, "--output_dir", tmp_path / "out", "--method", method]
    run_script("evaluate_facts.py", "--model_name_or_path", toy_study.output / "sft", *flags)
    predictions = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    last = json.loads((toy_study.output / "sft" / "accuracy.jsonl").read_text().splitlines()[-1])
    assert {row["fact_id"]: row["correct"] for row in predictions} == last["correct"]["heldout"]
    assert all((row["prediction"] is None) == (method == "score") for row in predictions)
    accuracy = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert accuracy == accuracy_by_group(load_facts(facts_file), predictions)
    assert {*accuracy} == {"overall", "relation", "slick_category"} and {*accuracy["relation"]} == {"country", "river"}
    assert f"overall: {accuracy['overall']['accuracy']:.3f} of 40 facts" in capsys.readouterr().out
    before = (tmp_path / "out" / "run.json").read_bytes()
    run_script("evaluate_facts.py", "--model_name_or_path", toy_study.output / "sft", *flags)
    assert (tmp_path / "out" / "run.json").read_bytes() == before


OWN_FLAGS = training_flags(max_steps=2, save_strategy="no")
TEXT = [{"prompt": f"Q: {i}\nA:", "completion": " Norway"} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in TEXT
]


@pytest.mark.parametrize("rows", [TEXT, CHATS], ids=["prompt-completion", "conversational"])
def test_self_distillation_on_a_file_of_the_user(toy_study, tmp_path, rows):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset_name", data, "--output_dir", tmp_path / "out", *OWN_FLAGS]
    run_script("self_distill_sft.py", "--model_name_or_path", toy_study.model, *flags)
    check_trained(toy_study.model, tmp_path / "out")
    assert "self-distill-sft" in (tmp_path / "out" / "README.md").read_text()


def test_frozen_groups_on_a_saved_dataset_by_a_config_file(toy_study, tmp_path):
    dataset = Dataset.from_list(TEXT)
    DatasetDict(train=dataset, validation=dataset.select(range(2))).save_to_disk(tmp_path / "data")
    config = {"dataset_name": str(tmp_path / "data"), "dataset_test_split": "validation", "eval_strategy": "epoch"}
    config |= {"model_name_or_path": str(toy_study.model), "frozen_groups": ["mlp"], "output_dir": "not this one"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    run_script(
        "frozen_groups_sft.py", "--config", tmp_path / "config.yaml", "--output_dir", tmp_path / "out", *OWN_FLAGS
    )
    moved = check_trained(toy_study.model, tmp_path / "out")
    assert moved and not any(".mlp." in name for name in moved)


def check_trained(model, folder) -> set[str]:
    """The folder holds a model that loads and is not the one it started from; returns the names of what moved."""
    AutoModelForCausalLM.from_pretrained(folder)
    before, after = (load_file(path / "model.safetensors") for path in (model, folder))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    return moved


def test_dataset_with_other_splits_is_told(toy_study, tmp_path):
    Dataset.from_list(TEXT).save_to_disk(tmp_path / "data")
    flags = ["--dataset_name", tmp_path / "data", "--dataset_train_split", "sft", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="`dataset_train_split` is 'sft', and .* has the splits train"):
        run_script("self_distill_sft.py", "--model_name_or_path", toy_study.model, *flags, *OWN_FLAGS)


@pytest.mark.parametrize("flags", [[], ["--mix", "a", "--dataset_name", "b"]])
def test_a_mix_or_a_dataset(flags):
    with pytest.raises(ValueError, match="Set one of `mix` and `dataset_name`"):
        run_script("self_distill_sft.py", "--model_name_or_path", "m", *flags, *OWN_FLAGS)


def test_training_on_the_held_out_facts_is_refused():
    with pytest.raises(ValueError, match="`splits` may hold known and new.*heldout is for evaluation only"):
        run_script("self_distill_sft.py", "--model_name_or_path", "m", "--mix", "a", "--splits", "heldout", *OWN_FLAGS)


def test_a_misspelt_key_of_a_config_file_is_told(tmp_path):
    (tmp_path / "config.yaml").write_text("num_knwon: 3\n")
    with pytest.raises(ValueError, match="num_knwon"):
        run_script("build_training_mix.py", "--annotated", "a", "--config", tmp_path / "config.yaml")


def test_ctrl_c_ends_with_its_status_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_script(interrupted, (), "x")
    assert ended.value.code == 130 and "run the same command again" in capsys.readouterr().err
