# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from answering_model import TOWNS, build_answering_model
from datasets import Dataset

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.knowledge import slick
from trl_selfdistill.slick.exemplars import reserve_exemplars
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.progress_file import ProgressFile
from trl_selfdistill.slick.prompts import few_shot_prompt
from trl_selfdistill.slick.slick import (
    PRESETS,
    SLICK_COLUMNS,
    SlickCategory,
    SlickSettings,
    annotate_facts,
    slick_category,
)


COUNTRIES = ["Norway", "Peru", "France", "Japan", "Austria"]
SCORE = SlickSettings(num_prompts=3, num_shots=2, num_samples=4, temperature=1.0, top_k=None)
GENERATE = replace(SCORE, method="generate")


def build_facts() -> Dataset:
    """Two relations, whose rows alternate."""
    rows = [
        {
            "fact_id": f"{relation}/{town}",
            "relation": relation,
            "subject": town,
            "question": question.format(town),
            "answer": COUNTRIES[i % 5],
            "aliases": [COUNTRIES[(i + 1) % 5]] if i % 4 == 0 else [],
        }
        for i, town in enumerate(TOWNS)
        for relation, question in (("P17", "Which country is {} located in?"), ("P495", "Where is {} from?"))
    ]
    return Dataset.from_list(rows)


def annotate(facts, settings, tokenizer, **options):
    model = build_answering_model(tokenizer)
    return annotate_facts(facts, model, tokenizer, settings, progress=False, **options)


@pytest.mark.parametrize(
    ("p_greedy", "p_sampled", "name"),
    [
        (1.0, 0.0, "HighlyKnown"),
        (1.0, 1.0, "HighlyKnown"),
        (0.1, 0.0, "MaybeKnown"),
        (0.9, 1.0, "MaybeKnown"),
        (0.0, 1e-9, "WeaklyKnown"),
        (0.0, 0.0, "Unknown"),
    ],
)
def test_slick_category(p_greedy, p_sampled, name):
    assert slick_category(p_greedy, p_sampled) == name == SlickCategory(name).value


def test_presets_are_the_papers():
    assert PRESETS["gekhman2024"] == SlickSettings(10, 4, 16, 0.5, 40, "generate", 0)
    assert PRESETS["kaplan2026"].num_prompts * PRESETS["kaplan2026"].num_samples == 20
    assert (PRESETS["quick"].num_prompts, PRESETS["quick"].method) == (4, "score")


@pytest.mark.parametrize(
    "wrong", [{"num_prompts": 0}, {"num_shots": 0}, {"num_samples": -1}, {"temperature": 0.0}, {"method": "guess"}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
        SlickSettings(**wrong)


def test_exemplars_are_reserved():
    facts = build_facts()
    exemplars, kept = reserve_exemplars(facts, num_prompts=3, num_shots=2, seed=0)
    assert exemplars == reserve_exemplars(facts, num_prompts=3, num_shots=2, seed=0)[0]
    assert exemplars != reserve_exemplars(facts, num_prompts=3, num_shots=2, seed=1)[0]
    shuffled = facts.shuffle(seed=4)
    other, other_kept = reserve_exemplars(shuffled, num_prompts=3, num_shots=2, seed=0)
    assert other == exemplars and {*shuffled[other_kept]["fact_id"]} == {*facts[kept]["fact_id"]}
    assert kept == sorted(kept)
    used = {question for prompts in exemplars.values() for prompt in prompts for question, _ in prompt}
    assert used == {*facts["question"]} - {*facts[kept]["question"]}
    questions = dict(zip(facts["question"], facts["relation"], strict=True))
    for relation, prompts in exemplars.items():
        assert [len(prompt) for prompt in prompts] == [2, 2, 2]
        assert {questions[question] for prompt in prompts for question, _ in prompt} == {relation}


def test_exemplars_of_a_large_relation_are_distinct():
    rows = [
        {"fact_id": f"{i:03}", "relation": "P", "question": f"q{i}", "answer": "ab"[i % 17 == 0]} for i in range(200)
    ]
    exemplars, kept = reserve_exemplars(Dataset.from_list(rows), num_prompts=10, num_shots=2, seed=0)
    assert len(kept) == 180
    # Answer "b" is rare: it is in every prompt as soon as the reserve has one.
    reserved = {row["question"]: row["answer"] for row in rows} | {}
    drawn = [[answer for _, answer in prompt] for prompt in exemplars["P"]]
    has_both = "b" in [reserved[f"q{i}"] for i in range(200) if i not in kept]
    assert has_both and all({*answers} == {"a", "b"} for answers in drawn)
    # Those with the common answer are no repeats: each prompt has its own.
    firsts = [question for prompt in exemplars["P"] for question, answer in prompt if answer == "a"]
    assert len({*firsts}) == 10


def test_relation_with_too_few_facts():
    facts = build_facts().select(range(5))  # three facts of P17, two of P495
    with pytest.raises(ValueError, match=r"relation 'P495' has 2 facts, and `num_shots` = 2"):
        reserve_exemplars(facts, num_prompts=3, num_shots=2, seed=0)
    assert len(reserve_exemplars(facts, num_prompts=3, num_shots=1, seed=0)[1]) == 3


def test_scores_of_a_fact_come_from_all_its_prompts(tokenizer):
    facts = build_facts()
    annotated = annotate(facts, SCORE, tokenizer)
    exemplars, kept = reserve_exemplars(facts, 3, 2, SCORE.seed)
    assert annotated["fact_id"][:] == facts[kept]["fact_id"]
    assert annotated.column_names == [*facts.column_names, *SLICK_COLUMNS]
    model = build_answering_model(tokenizer)
    for row in annotated:
        prompts = [few_shot_prompt(row["question"], exemplar) for exemplar in exemplars[row["relation"]]]
        scores = score_answers(model, tokenizer, prompts, [[row["answer"], *row["aliases"]]] * 3)
        p = [score.p_sampled for score in scores]
        assert row["p_correct_greedy"] == pytest.approx(sum(score.is_greedy for score in scores) / 3)
        assert row["p_correct_sampled"] == pytest.approx(sum(p) / 3, abs=1e-5)
        assert row["p_any_sample_correct"] == pytest.approx(1 - math.prod(1 - x for x in p) ** 4, abs=1e-4)
    assert len({*annotated["slick_category"]}) >= 3


def test_generated_answers_of_a_fact_come_from_all_its_prompts(tokenizer):
    facts = build_facts()
    annotated = annotate(facts, GENERATE, tokenizer)
    exemplars, kept = reserve_exemplars(facts, 3, 2, GENERATE.seed)
    model = build_answering_model(tokenizer)
    for row in annotated:
        accepted = [row["answer"], *row["aliases"]]
        prompts = [few_shot_prompt(row["question"], exemplar) for exemplar in exemplars[row["relation"]]]
        greedy = [exact_match(answer, accepted) for [answer] in predict_answers(model, tokenizer, prompts)]
        assert row["p_correct_greedy"] == pytest.approx(sum(greedy) / 3)
        assert row["p_correct_sampled"] * 12 == pytest.approx(round(row["p_correct_sampled"] * 12))
        assert row["p_any_sample_correct"] == float(row["p_correct_sampled"] > 0)
        assert row["slick_category"] == slick_category(row["p_correct_greedy"], row["p_correct_sampled"])
    by_score = annotate(facts, SCORE, tokenizer)
    assert annotated["p_correct_greedy"] == by_score["p_correct_greedy"]
    # About 220 draws in all: the means differ by less than 4 standard errors.
    means = [sum(table["p_correct_sampled"]) / len(table) for table in (annotated, by_score)]
    assert abs(means[0] - means[1]) < 4 * (means[1] * (1 - means[1]) / (12 * len(annotated))) ** 0.5


def test_weakly_known_threshold(tokenizer):
    facts = build_facts()
    never = annotate(facts, SCORE, tokenizer, weakly_known_threshold=1.1)
    always = annotate(facts, SCORE, tokenizer, weakly_known_threshold=0.0)
    default = annotate(facts, SCORE, tokenizer)
    assert "WeaklyKnown" not in never["slick_category"] and "Unknown" not in always["slick_category"]
    for low, row in zip(always, default, strict=True):
        if row["p_correct_greedy"] == 0:
            expected = "WeaklyKnown" if row["p_any_sample_correct"] >= 0.5 else "Unknown"
            assert (row["slick_category"], low["slick_category"]) == (expected, "WeaklyKnown")


def test_annotating_again_replaces_the_columns(tokenizer):
    facts = build_facts()
    stale = facts
    for name in SLICK_COLUMNS:
        stale = stale.add_column(name, ["stale"] * len(facts))
    assert annotate(stale, SCORE, tokenizer).to_dict() == annotate(facts, SCORE, tokenizer).to_dict()


def test_wrong_facts_and_presets(tokenizer, model):
    with pytest.raises(ValueError, match="lacks the columns .*'aliases'"):
        annotate_facts(build_facts().remove_columns("aliases"), model, tokenizer)
    with pytest.raises(ValueError, match="0 rows"):
        annotate_facts(build_facts().select([]), model, tokenizer)
    with pytest.raises(ValueError, match="'quick'"):
        annotate_facts(build_facts(), model, tokenizer, "quickest")


@pytest.mark.parametrize("settings", [SCORE, GENERATE], ids=["score", "generate"])
def test_interrupted_run_goes_on(settings, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(slick, "_CHUNK_SIZE", {"score": 4, "generate": 4})
    expected = annotate(build_facts(), settings, tokenizer, progress_file=tmp_path / "whole.jsonl").to_dict()
    path, asked = tmp_path / "new folder" / "half.jsonl", []
    ask = slick._ask

    def interrupted(*args):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(args[-1])
        return ask(*args)

    monkeypatch.setattr(slick, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        annotate(build_facts(), settings, tokenizer, progress_file=path)
    path.write_bytes(path.read_bytes()[:-7])  # the fifth result is cut off, as by a crash
    monkeypatch.setattr(slick, "_ask", lambda *args: asked.append(args[-1]) or ask(*args))
    assert annotate(build_facts(), settings, tokenizer, progress_file=path).to_dict() == expected
    counts = Counter(asked)
    assert counts.pop(asked[4]) == 2 and {*counts.values()} == {1}
    asked.clear()
    assert annotate(build_facts(), settings, tokenizer, progress_file=path).to_dict() == expected
    assert not asked
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


KILLED_RUN = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/knowledge"]
import test_slick
from conftest import build_tokenizer
from trl_selfdistill.knowledge import slick
slick._CHUNK_SIZE = {{"generate": 4}}
predict, calls = slick.predict_answers, []
def killing(*args, **kwargs):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict(*args, **kwargs)
slick.predict_answers = killing
test_slick.annotate(test_slick.build_facts(), test_slick.GENERATE, build_tokenizer(), progress_file={path!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_killed_run_goes_on(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(slick, "_CHUNK_SIZE", {"generate": 4})
    path = tmp_path / "killed.jsonl"
    code = KILLED_RUN.format(tests=str(Path(__file__).parents[1]), path=str(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    finished = [json.loads(line)["unit"] for line in path.read_text().splitlines()[1:]]
    assert len(finished) == 3  # the eighth call samples for the fourth unit
    asked, ask = [], slick._ask
    monkeypatch.setattr(slick, "_ask", lambda *args: asked.append(args[-1]) or ask(*args))
    resumed = annotate(build_facts(), GENERATE, tokenizer, progress_file=path)
    assert asked and not {*asked} & {*finished}
    assert resumed.to_dict() == annotate(build_facts(), GENERATE, tokenizer).to_dict()


def test_progress_file_of_other_work_is_refused(tokenizer, tmp_path):
    path = tmp_path / "progress.jsonl"
    annotate(build_facts(), SCORE, tokenizer, progress_file=path)
    content = path.read_text()
    for what, change in {
        "settings": lambda: annotate(build_facts(), replace(SCORE, seed=1), tokenizer, progress_file=path),
        "facts": lambda: annotate(build_facts().select(range(20)), SCORE, tokenizer, progress_file=path),
        "batch_size": lambda: annotate(build_facts(), SCORE, tokenizer, progress_file=path, batch_size=3),
    }.items():
        with pytest.raises(ValueError, match=f"another {what} .there .*now .*delete it or name another"):
            change()
    trained = build_answering_model(tokenizer)
    trained.model.layers[1].mlp.up_proj.weight.data[0] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        annotate_facts(build_facts(), trained, tokenizer, SCORE, progress=False, progress_file=path)
    assert path.read_text() == content


def test_progress_file(tmp_path):
    path = tmp_path / "p.jsonl"
    identity = {"a": (1, 2)}
    ProgressFile(path, identity).append("é", [True, 0.1])
    assert ProgressFile(path, identity).results == {"é": [True, 0.1]}
    whole = path.read_bytes()
    for cut in range(len(whole)):  # wherever a crash cuts the file, it can be gone on with
        path.write_bytes(whole[:cut])
        again = ProgressFile(path, identity)
        assert again.results == {}
        again.append("é", [True, 0.1])
        assert path.read_bytes() == whole
    path.write_text("something else\n")
    with pytest.raises(ValueError, match="not a progress file"):
        ProgressFile(path, identity)
    assert path.read_text() == "something else\n"
