# SPDX-License-Identifier: Apache-2.0
"""`rehearsal_dataset`: the model's own answers to prompts, among the training rows."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from sft_runs import FACTS, TOKENIZER, StopAt, assert_same_weights, config, logs, train, trainer
from trl import SFTTrainer
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill.trainers.rehearsal import REHEARSAL_FILE


# Of uneven lengths, so that batches are padded
PROMPTS = [{"prompt": f"Q: {'Ja' * i}pan{i % 3}\nA:", "completion": "not looked at"} for i in range(9)]
LONGEST = 6


def greedy(model, prompt: list[int]) -> list[int]:
    """What the model writes, token by token, without a cache or padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(LONGEST):
            ids.append(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def answering_model(seed: int = 0):
    """A random model that is told that some of what it writes is the end of an answer."""
    model = build_model(TOKENIZER, seed=seed, initializer_range=0.4)
    written = [greedy(model, TOKENIZER(row["prompt"])["input_ids"]) for row in PROMPTS]
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, written[0][2], written[4][1], written[5][0]]
    return model


def expected_rows(model, prompts=PROMPTS) -> list[dict]:
    stops, rows = set(model.generation_config.eos_token_id), []
    for row in prompts:
        ids = TOKENIZER(row["prompt"])["input_ids"]
        answer = greedy(model, ids)
        end = next((t for t, token in enumerate(answer) if token in stops), None)
        if end:  # neither endless nor empty
            rows.append({"input_ids": ids + answer[: end + 1], "labels": [-100] * len(ids) + answer[: end + 1]})
    assert 1 < len(rows) < len(prompts)
    return rows


def rehearsed(**arguments) -> dict:
    return {"rehearsal_dataset": Dataset.from_list(PROMPTS), **arguments}


def rows_of(run) -> list[dict]:
    return run.train_dataset.select_columns(["input_ids", "labels"]).to_list()


SHORT = dict(rehearsal_max_new_tokens=LONGEST, per_device_eval_batch_size=4)


def test_the_rows_are_what_the_model_writes(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_selfdistill"):
        run = trainer(tmp_path, answering_model(), rehearsed(), **SHORT)
    new = rows_of(trainer(tmp_path, answering_model()))
    rows = expected_rows(answering_model())
    assert rows_of(run) == new + rows
    assert f"{len(PROMPTS) - len(rows)} of the model's {len(PROMPTS)} answers are left out" in caplog.text


def test_without_a_kl_it_is_sft_on_these_rows(tmp_path):
    ours = train(tmp_path, answering_model(), rehearsed(), kl_weight=0.0, max_steps=8, **SHORT)
    rows = rows_of(trainer(tmp_path, answering_model())) + expected_rows(answering_model())
    data = {"train_dataset": Dataset.from_list(rows)}
    sft = train(tmp_path, answering_model(), data, SFTTrainer, max_steps=8)
    assert_same_weights(ours.model, sft.model)


@pytest.mark.parametrize("options", [{}, dict(precompute_teacher=True, teacher_cache_dtype="float32")])
def test_the_kl_is_taken_on_them_too(tmp_path, options):
    if options:
        options = options | {"teacher_cache_dir": str(tmp_path / "cache")}
    run = train(tmp_path / "ours", answering_model(), rehearsed(), max_steps=8, **SHORT, **options)
    rows = rows_of(trainer(tmp_path, answering_model())) + expected_rows(answering_model())
    other = train(tmp_path / "other", answering_model(), {"train_dataset": Dataset.from_list(rows)}, max_steps=8)
    tolerance = dict(rtol=1e-4, atol=1e-6) if options else {}  # the cache's batches are padded otherwise
    assert_same_weights(run.model, other.model, **tolerance)
    assert [row["kl_loss"] for row in logs(run) if "kl_loss" in row][-1] > 0


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_they_are_packed_as_the_others_are(tmp_path, strategy):
    run = trainer(
        tmp_path, answering_model(), rehearsed(), packing=True, packing_strategy=strategy, max_length=48, **SHORT
    )
    packed = rows_of(run)
    assert max(len(row["input_ids"]) for row in packed) <= 48
    whole = rows_of(trainer(tmp_path, answering_model())) + expected_rows(answering_model())
    for name in ("input_ids", "labels"):
        tokens = sorted(token for row in packed for token in row[name])
        if strategy == "bfd":  # the other drops or cuts ends
            assert tokens == sorted(token for row in whole for token in row[name])
    assert len(packed) > len(rows_of(trainer(tmp_path, packing=True, packing_strategy=strategy, max_length=48)))


def test_a_stop_string_ends_an_answer(tmp_path):
    """Without an end-of-sequence token ever; what the model writes after it does not matter."""
    model = build_model(TOKENIZER, initializer_range=0.4)
    ids = [TOKENIZER(row["prompt"])["input_ids"] for row in PROMPTS]
    written = [greedy(model, prompt) for prompt in ids]
    string = TOKENIZER.decode([written[0][2]])
    run = trainer(tmp_path, model, rehearsed(), rehearsal_stop_strings=[string], **SHORT)
    rows = []
    for prompt, answer in zip(ids, written, strict=True):
        ends = [end for end in range(1, LONGEST + 1) if string in TOKENIZER.decode(answer[:end])]
        if (
            ends
            and ends[0] > 1
            and TOKENIZER.decode(answer[: ends[0]]).split(string)[0] == TOKENIZER.decode(answer[: ends[0] - 1])
        ):
            kept = [*answer[: ends[0] - 1], TOKENIZER.eos_token_id]
            rows.append({"input_ids": prompt + kept, "labels": [-100] * len(prompt) + kept})
    assert rows and rows_of(run)[len(FACTS) :] == rows


def test_conversations(tmp_path):
    model = answering_model()
    conversations = [[{"role": "user", "content": row["prompt"]}] for row in PROMPTS]
    texts = [TOKENIZER.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    model.generation_config.eos_token_id += [greedy(model, TOKENIZER(texts[0])["input_ids"])[3]]
    prompts = Dataset.from_dict({"prompt": conversations})
    run = trainer(tmp_path, model, {"rehearsal_dataset": prompts}, **SHORT)
    assert rows_of(run)[len(FACTS) :] == expected_rows(model, [{"prompt": text} for text in texts])


def test_the_prompts_by_name_are_those(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    by_name = trainer(tmp_path / "name", answering_model(), rehearsal_dataset_name=str(file), **SHORT)
    given = trainer(tmp_path / "given", answering_model(), rehearsed(), **SHORT)
    assert rows_of(by_name) == rows_of(given)


def test_an_adapter_answers_too(tmp_path):
    torch.manual_seed(3)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    start = trainer(tmp_path / "a", answering_model(), {"peft_config": adapter}).model
    torch.manual_seed(3)
    run = trainer(tmp_path / "b", answering_model(), rehearsed(peft_config=adapter), **SHORT)
    assert rows_of(run)[len(FACTS) :] == expected_rows(start) != expected_rows(answering_model())


def test_the_card_counts_them_and_the_categories_of_the_facts(tmp_path):
    facts = Dataset.from_list([{**fact, "slick_category": "HighlyKnown"} for fact in FACTS])
    run = train(tmp_path, answering_model(), rehearsed(train_dataset=facts), max_steps=1, **SHORT)
    run.save_model()
    record = json.loads((tmp_path / "run/model_card.json").read_text())["training"]
    assert record["settings"]["rehearsal_rows"] == len(expected_rows(answering_model()))
    assert record["composition"] == {"train": {"HighlyKnown": len(FACTS)}}
    assert "the model's own answers" in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_takes_the_answers_that_are_there(tmp_path, stop, monkeypatch):
    options = dict(max_steps=8, save_strategy="steps", save_steps=1, **SHORT)
    whole = train(tmp_path / "whole", answering_model(), rehearsed(), **options)
    train(tmp_path / "cut", answering_model(), rehearsed(callbacks=[StopAt(stop)]), **options)
    monkeypatch.setattr("trl_selfdistill.trainers.rehearsal.generate_tokens", None)  # not called
    resumed = train(tmp_path / "cut", answering_model(), rehearsed(), resume=True, **options)
    assert_same_weights(resumed.model, whole.model)


def test_answers_of_another_model_or_to_other_prompts_are_not_taken(tmp_path):
    trainer(tmp_path, answering_model(), rehearsed(), **SHORT)
    kept = (tmp_path / "run" / REHEARSAL_FILE).read_text()
    other = trainer(tmp_path, answering_model(seed=1), rehearsed(), **SHORT)
    assert rows_of(other)[len(FACTS) :] == expected_rows(answering_model(seed=1))
    assert (tmp_path / "run" / REHEARSAL_FILE).read_text() != kept
    fewer = {"rehearsal_dataset": Dataset.from_list(PROMPTS[:5])}
    run = trainer(tmp_path, answering_model(), fewer, **SHORT)
    assert rows_of(run)[len(FACTS) :] == expected_rows(answering_model(), PROMPTS[:5])


def test_the_answers_are_the_same_with_dropout_and_leave_the_model(tmp_path):
    model = answering_model()
    model.config.attention_dropout = 0.9
    model.train()
    run = trainer(tmp_path, model, rehearsed(), **SHORT)
    assert rows_of(run)[len(FACTS) :] == expected_rows(answering_model()) and run.model.training


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {},
            {"rehearsal_dataset": Dataset.from_dict({"text": ["a"]})},
            r"column `prompt`, got the columns \['text'\]",
        ),
        ({}, {"rehearsal_dataset": ["a"]}, "column `prompt`, got a list"),
        ({}, {"rehearsal_dataset": Dataset.from_dict({"prompt": []})}, "`rehearsal_dataset` has no rows"),
        (dict(rehearsal_max_new_tokens=1), rehearsed(), "none of the model's 9 answers has an end"),
        (dict(rehearsal_dataset_name="a"), rehearsed(), "The prompts are given twice"),
        (dict(teacher_snapshot_steps=1), rehearsed(), "`rehearsal_dataset` is answered before training"),
        (
            dict(max_steps=2),
            rehearsed(train_dataset=Dataset.from_list(FACTS).to_iterable_dataset()),
            "which is a IterableDataset",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, answering_model(), arguments, **options)


def test_a_name_without_a_split_to_train_on_is_refused(tmp_path):
    DatasetDict(test=Dataset.from_list(PROMPTS)).save_to_disk(tmp_path / "prompts")
    with pytest.raises(ValueError, match="no split `train`; it has test"):
        trainer(tmp_path, answering_model(), rehearsal_dataset_name=str(tmp_path / "prompts"))


def test_less_than_one_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`rehearsal_max_new_tokens` must be at least 1, got 0"):
        config(tmp_path, rehearsal_max_new_tokens=0)


@pytest.mark.parametrize("stops", ["end", ["\n", ""]])
def test_stop_strings_are_a_list_of_texts(tmp_path, stops):
    with pytest.raises(ValueError, match="`rehearsal_stop_strings` must be a list of texts, none empty, got"):
        config(tmp_path, rehearsal_stop_strings=stops)


def run_together(folder: Path) -> None:
    run = trainer(folder, answering_model(), rehearsed(), **SHORT)
    assert run.accelerator.num_processes == 2
    (folder / f"rows{run.accelerator.process_index}.json").write_text(json.dumps(rows_of(run)))


def test_processes_share_the_prompts(tmp_path):
    run_in_two_processes(__file__, tmp_path)
    alone = rows_of(trainer(tmp_path / "alone", answering_model(), rehearsed(), **SHORT))
    assert [json.loads((tmp_path / f"rows{rank}.json").read_text()) for rank in range(2)] == [alone, alone]


if __name__ == "__main__":
    run_together(Path(sys.argv[1]))
    leave_processes()
