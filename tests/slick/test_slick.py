# SPDX-License-Identifier: Apache-2.0
"""SLiCK's annotation: exemplars, columns, resuming; two processes give what one gives."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from accelerate import PartialState
from answering_model import TOWNS, build_answering_model
from conftest import build_tokenizer
from datasets import Dataset
from two_processes import run_in_two_processes

from trl_selfdistill.files import read_json, write_json
from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick import generation, slick
from trl_selfdistill.slick.generation import answer_prompts, predict_answers
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.process_sharding import ProgressFile
from trl_selfdistill.slick.prompts import few_shot_messages, few_shot_prompt
from trl_selfdistill.slick.slick import SLICK_COLUMNS, SlickSettings, annotate_facts, reserve_exemplars, slick_category


COUNTRIES = ["Norway", "Peru", "France", "Japan", "Austria"]
SCORE = SlickSettings(num_prompts=3, num_shots=2, num_samples=4, temperature=1.0, top_k=None)
GENERATE = replace(SCORE, method="generate")
SETTINGS = pytest.mark.parametrize("settings", [SCORE, GENERATE], ids=["score", "generate"])
HIGHLY_KNOWN = replace(SCORE, only_highly_known=True)
SHARED = {"score": SCORE, "generate": GENERATE, "highly known": HIGHLY_KNOWN}


def build_facts() -> Dataset:
    """Two relations, whose rows alternate."""
    rows = [
        {"fact_id": f"{relation}/{town}", "relation": relation, "subject": town, "question": question.format(town)}
        | {"answer": COUNTRIES[i % 5], "aliases": [COUNTRIES[(i + 1) % 5]] if i % 4 == 0 else []}
        for i, town in enumerate(TOWNS)
        for relation, question in (("P17", "Which country is {} located in?"), ("P495", "Where is {} from?"))
    ]
    return Dataset.from_list(rows)


def annotate(settings, progress_file=None, facts=None, **options) -> dict:
    tokenizer = build_tokenizer()
    facts = build_facts() if facts is None else facts
    model = build_answering_model(tokenizer)
    return annotate_facts(facts, model, tokenizer, settings, progress_file=progress_file, **options).to_dict()


def test_exemplars_are_reserved():
    facts = build_facts()
    exemplars, kept = reserve_exemplars(facts, num_prompts=3, num_shots=2, seed=0)
    assert exemplars != reserve_exemplars(facts, num_prompts=3, num_shots=2, seed=1)[0]
    shuffled = facts.shuffle(seed=4)
    other, other_kept = reserve_exemplars(shuffled, num_prompts=3, num_shots=2, seed=0)
    assert other == exemplars and {*shuffled[other_kept]["fact_id"]} == {*facts[kept]["fact_id"]}
    asked = {*facts[kept]["question"]}
    for relation, prompts in exemplars.items():
        assert [len(prompt) for prompt in prompts] == [2, 2, 2]
        used = {question for prompt in prompts for question, _ in prompt}
        assert used == {*facts.filter(lambda row: row["relation"] == relation)["question"]} - asked  # noqa: B023


def test_exemplars_of_a_large_relation_are_distinct():
    rows = [
        {"fact_id": f"{i:03}", "relation": "P", "question": f"{i}", "answer": "ab"[i % 17 == 0]} for i in range(200)
    ]
    exemplars, kept = reserve_exemplars(Dataset.from_list(rows), num_prompts=10, num_shots=2, seed=0)
    assert len(kept) == 180
    # Answer "b" is rare: it is in every prompt, as the reserve has one. Those with the other answer are no repeats.
    assert all({answer for _, answer in prompt} == {"a", "b"} for prompt in exemplars["P"])
    assert len({question for prompt in exemplars["P"] for question, answer in prompt if answer == "a"}) == 10


@SETTINGS
def test_columns_come_from_all_prompts_of_a_fact(settings, tokenizer):
    facts = build_facts()
    stale = facts
    for name in SLICK_COLUMNS:  # those of an earlier annotation are replaced
        stale = stale.add_column(name, ["stale"] * len(facts))
    annotated = Dataset.from_dict(annotate(settings, facts=stale))
    exemplars, kept = reserve_exemplars(facts, 3, 2, settings.seed)
    assert annotated["fact_id"][:] == facts[kept]["fact_id"]
    assert annotated.column_names == [*facts.column_names, *SLICK_COLUMNS]
    model = build_answering_model(tokenizer)
    for row in annotated:
        prompts = [few_shot_prompt(row["question"], exemplar) for exemplar in exemplars[row["relation"]]]
        accepted = [row["answer"], *row["aliases"]]
        scores = score_answers(model, tokenizer, prompts, [accepted] * 3)
        written = [exact_match(answer, accepted) for [answer] in predict_answers(model, tokenizer, prompts)]
        assert written == [score.is_greedy for score in scores]
        assert row["p_correct_greedy"] == pytest.approx(sum(written) / 3)
        sampled, any_sample = row["p_correct_sampled"], row["p_any_sample_correct"]
        if settings.method == "score":
            p = [score.p_sampled for score in scores]
            assert sampled == pytest.approx(sum(p) / 3, abs=1e-5)
            assert any_sample == pytest.approx(1 - math.prod(1 - x for x in p) ** 4, abs=1e-4)
            category = slick_category(row["p_correct_greedy"], float(any_sample >= 0.5))
        else:
            assert sampled * 12 == pytest.approx(round(sampled * 12)) and any_sample == float(sampled > 0)
            category = slick_category(row["p_correct_greedy"], sampled)
        assert row["slick_category"] == category
    assert len({*annotated["slick_category"]}) >= 3


@SETTINGS
def test_only_highly_known_facts(settings, monkeypatch, calls_of):
    """Those that the whole annotation finds, and no fact is asked again after a wrong answer."""
    asked, generated = calls_of(slick, "_ask"), calls_of(slick, "predict_answers")
    whole = Dataset.from_dict(annotate(settings))
    seeds = {call.kwargs.get("seed") for call in generated}
    assert len(seeds - {None}) == 6 * (settings is GENERATE)  # each draws anew
    expected = whole.filter(lambda row: row["slick_category"] == "HighlyKnown").remove_columns(SLICK_COLUMNS[1:3])
    num_questions = sum(len(call.args[2]) for call in asked)
    asked.clear()
    assert annotate(replace(settings, only_highly_known=True)) == expected.to_dict()
    monkeypatch.setattr(slick, "_ask", lambda model, tokenizer, prompts, *rest: [[False, 0.0] for _ in prompts])
    assert annotate(replace(settings, only_highly_known=True)) == dict.fromkeys(expected.column_names, [])
    assert 0 < len(expected) < len(whole)
    assert len(whole) < sum(len(call.args[2]) for call in asked) < num_questions


@pytest.mark.parametrize("settings", SHARED.values(), ids=SHARED)
def test_interrupted_run_goes_on(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(slick, "_CHUNK_SIZE", {"score": 4, "generate": 4})
    expected = annotate(settings, tmp_path / "whole.jsonl")
    path, asked, ask = tmp_path / "new folder" / "half.jsonl", [], slick._ask

    def interrupted(*args):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(args[-1])
        return ask(*args)

    monkeypatch.setattr(slick, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        annotate(settings, path)
    path.write_bytes(path.read_bytes()[:-7])  # the fifth result is cut off, as by a kill
    monkeypatch.setattr(slick, "_ask", lambda *args: asked.append(args[-1]) or ask(*args))
    assert annotate(settings, path) == expected
    counts = Counter(asked)
    assert counts.pop(asked[4]) == 2 and {*counts.values()} == {1}
    asked.clear()
    assert annotate(settings, path) == expected and not asked
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()

    content = path.read_text()
    other_facts = build_facts().select(range(20))
    for change in ({"settings": replace(settings, seed=1)}, {"facts": other_facts}, {"batch_size": 3}):
        with pytest.raises(ValueError, match="is of other work.*delete it or name another"):
            annotate(**{"settings": settings, "progress_file": path, **change})
    tokenizer = build_tokenizer()
    trained = build_answering_model(tokenizer)
    trained.model.layers[1].mlp.up_proj.weight.data[-1] += 1e-3
    with pytest.raises(ValueError, match="is of other work"):
        annotate_facts(build_facts(), trained, tokenizer, settings, progress_file=path)
    assert path.read_text() == content


def test_a_progress_file_of_another_chat_template_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    model, prompts = build_answering_model(tokenizer), [[{"role": "user", "content": "Where is Oslo?"}]]
    annotate = partial(annotate_facts, build_facts(), model, tokenizer, prompt_function=few_shot_messages)
    for function in (annotate, partial(answer_prompts, model, tokenizer, prompts)):
        tokenizer.chat_template = "{{ messages[-1].content }}"
        function(progress_file=tmp_path / "p.jsonl")
        tokenizer.chat_template += "\nA:"
        with pytest.raises(ValueError, match="is of other work"):
            function(progress_file=tmp_path / "p.jsonl")
        (tmp_path / "p.jsonl").unlink()


def test_progress_file_cut_off_anywhere(tmp_path):
    path, identity = tmp_path / "p.jsonl", {"a": (1, 2)}
    work = (lambda name, items: [True, 0.1]), {"é": [0]}, None
    ProgressFile(path, identity).do(*work)
    assert ProgressFile(path, identity).results == {"é": [True, 0.1]}
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = ProgressFile(path, identity)
        assert again.results == {}
        again.do(*work)
        assert path.read_bytes() == whole
    path.write_text("something else")
    with pytest.raises(ValueError, match="is of other work, something else, and not"):
        ProgressFile(path, identity)
    assert path.read_text() == "something else"


def answer(progress_file: Path, prompt=few_shot_prompt) -> list[str]:
    tokenizer = build_tokenizer()
    model, prompts = build_answering_model(tokenizer), [prompt(q, []) for q in build_facts()["question"]]
    return answer_prompts(model, tokenizer, prompts, batch_size=5, progress_file=progress_file)


def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(slick, "_CHUNK_SIZE", {"score": 28, "generate": 4})
    run_in_two_processes(annotate_on_this_process, tmp_path)
    expected = answer(tmp_path / "alone.jsonl")
    assert [read_json(tmp_path / f"answers-{rank}.json") for rank in range(2)] == [expected] * 2
    whole, cut = (tmp_path / "alone.jsonl").read_bytes(), tmp_path / "answers.jsonl"
    assert cut.read_bytes() == whole
    with monkeypatch.context() as patch:  # what is in the file is not asked again
        patch.setattr(generation, "predict_answers", lambda model, tokenizer, prompts, **_: [["?"] for _ in prompts])
        cut.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
        assert answer(cut) == [*expected[:10], *["?"] * (len(expected) - 10)]
        with pytest.raises(ValueError, match="is of other work"):
            answer(cut, few_shot_messages)
    for name, settings in SHARED.items():
        expected = annotate(settings, tmp_path / "one.jsonl")
        results = [read_json(tmp_path / f"{name}-{rank}.json") for rank in range(2)]
        assert results[0] == results[1] == json.loads(json.dumps(expected))
        # One process continues what two began, to the same file
        two, one = tmp_path / f"{name}.jsonl", tmp_path / "one.jsonl"
        assert two.read_bytes() == one.read_bytes()
        two.write_bytes(b"".join(two.read_bytes().splitlines(keepends=True)[:3]))
        assert annotate(settings, two) == expected and two.read_bytes() == one.read_bytes()
        one.unlink()


def annotate_on_this_process(folder: Path) -> None:
    rank = PartialState(cpu=True).process_index
    slick._CHUNK_SIZE = {"score": 28, "generate": 4}
    for name, settings in SHARED.items():
        result = annotate(settings, folder / f"{name}.jsonl")
        write_json(folder / f"{name}-{rank}.json", result)
    write_json(folder / f"answers-{rank}.json", answer(folder / "answers.jsonl"))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="relation 'P495' has 2 facts, and `num_shots` = 2"):
        annotate(SCORE, facts=build_facts().select(range(5)))
    with pytest.raises(ValueError, match="`facts` has no rows"):
        annotate(SCORE, facts=build_facts().select([]))
    with pytest.raises(ValueError, match="aliases"):
        annotate(SCORE, facts=build_facts().remove_columns("aliases"))
    for wrong in ({"num_prompts": 0}, {"method": "guess"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is"):
            SlickSettings(**wrong)
