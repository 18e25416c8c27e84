# SPDX-License-Identifier: Apache-2.0
"""The task for lm-evaluation-harness asks what this package asks, and the real client finds the same accuracy."""

import importlib.util
import os
import runpy
import subprocess
import sys
from itertools import zip_longest

import pytest
import yaml
from toy_study import run_script

from trl_selfdistill.files import read_json, read_jsonl, write_jsonl
from trl_selfdistill.hallucination import score_hallucinations
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.prompts import few_shot_prompt
from trl_selfdistill.studies.models import load_model_and_tokenizer


def export(toy_study, folder, task, num_fewshot) -> tuple[list[str], list[list[str]]]:
    """Writes the task, moves it, and returns the prompts that this package makes of it, and what is accepted."""
    # Full-width letters, which are the same to this package's match alone
    rows = [row | {"answer": row["answer"].replace("Peru", "Ｐｅｒｕ")} for row in read_jsonl(toy_study.facts)]
    write_jsonl(folder / "facts.jsonl", rows)
    flags = ["--facts", folder / "facts.jsonl", "--task", task, "--num_fewshot", num_fewshot]
    run_script("export_lm_eval.py", *flags, "--output_dir", folder / "written")
    (folder / "written").rename(folder / task)
    questions, shots = (read_jsonl(folder / task / name) for name in ("questions.jsonl", "exemplars.jsonl"))
    exemplars = [(shot["question"], shot["accepted"][0]) for shot in shots]
    return [few_shot_prompt(row["question"], exemplars) for row in questions], [row["accepted"] for row in questions]


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_the_task_asks_and_judges_as_this_package_does(toy_study, tmp_path, num_fewshot):
    prompts, accepted = export(toy_study, tmp_path, "towns", num_fewshot)
    text = (tmp_path / "towns" / "towns.yaml").read_text()
    assert str(tmp_path) not in text and text.count("!function towns.") == 2
    task = yaml.safe_load(text.replace("!function", ""))
    assert task["num_fewshot"] == num_fewshot and task["doc_to_target"] == "accepted"
    functions = runpy.run_path(str(tmp_path / "towns" / "towns.py"))
    splits = functions[task["custom_dataset"].removeprefix("towns.")](version=2.0)
    shots, rows = [*splits["fewshot"]], [*splits["test"]]
    assert [shot["question"].split()[1] for shot in shots] == ["country", "river", "country"][:num_fewshot]
    texts = [task["doc_to_text"].replace("{{question}}", row["question"]) for row in (*shots, rows[0])]
    answers = [task["target_delimiter"] + shot["accepted"][0] for shot in shots]
    assert task["fewshot_delimiter"].join(map("".join, zip_longest(texts, answers, fillvalue=""))) == prompts[0]
    assert not {row["question"] for row in rows} & {shot["question"] for shot in shots}
    facts = {fact["fact_id"]: [fact["answer"], *fact["aliases"]] for fact in read_jsonl(tmp_path / "facts.jsonl")}
    assert [facts[row["fact_id"]] for row in rows] == accepted and len(rows) == len(facts) - (4 if shots else 0)
    judge = functions[task["process_results"].removeprefix("towns.")]
    judged = [judge({"accepted": ["Ｐｅｒｕ"]}, [answer]) for answer in ("the peru.", "France")]
    assert judged == [{"exact_match": True}, {"exact_match": False}]


def test_only_the_exemplars_that_are_used_are_left_out(tmp_path):
    fact = {"subject": "x", "answer": "y"}
    rows = [fact | {"relation": f"r{i % 30}", "subject": f"s{i}", "question": f"{i}?"} for i in range(61)]
    write_jsonl(tmp_path / "facts.jsonl", [*rows, fact | {"relation": "alone", "question": "?"}])
    run_script("export_lm_eval.py", "--facts", tmp_path / "facts.jsonl", "--output_dir", tmp_path / "task")
    questions, exemplars = (read_jsonl(tmp_path / f"task/{name}.jsonl") for name in ("questions", "exemplars"))
    assert len(exemplars) == 4 and len(questions) == 62 - 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_fewshot", 99], "cannot spare so many"),
        (["--task", "other"], "holds the task facts"),
        (["--task", "a b"], "`task` must be a word and `num_fewshot` at least 0"),
        (["--num_fewshot", -1], "`task` must be a word and `num_fewshot` at least 0"),
    ],
)
def test_a_task_that_cannot_be_is_refused(toy_study, tmp_path, capsys, flags, message):
    if "other" in flags:
        (tmp_path / "facts.yaml").write_text("")
    with pytest.raises((SystemExit, ValueError)) as ended:
        run_script("export_lm_eval.py", "--facts", toy_study.facts, "--output_dir", tmp_path, *flags)
    assert message in f"{ended.value} {capsys.readouterr().err}"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `lm-eval`")
def test_the_client_finds_the_accuracy_that_this_package_finds(toy_study, tmp_path):
    tasks = {name: export(toy_study, tmp_path, name, num_fewshot) for name, num_fewshot in (("zero", 0), ("three", 3))}
    line = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--include_path", tmp_path]
    line += ["--model_args", f"pretrained={toy_study.model},dtype=float32", "--tasks", ",".join(tasks)]
    line += ["--output_path", tmp_path / "out.json"]
    subprocess.run([*map(str, line)], env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    [results] = [read_json(path)["results"] for path in tmp_path.glob("out*.json")]
    model, tokenizer = load_model_and_tokenizer(toy_study.model)
    for name, (prompts, accepted) in tasks.items():
        answers = [answer for [answer] in predict_answers(model, tokenizer, prompts)]
        expected = score_hallucinations(answers, accepted)["accuracy"]
        assert 0 < expected < 1 and results[name]["exact_match,answer"] == pytest.approx(expected)
