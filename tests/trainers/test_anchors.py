# SPDX-License-Identifier: Apache-2.0
"""
`anchors`: own answers are further rows, the others have a KL of their own. Other laws of theirs stand in test_laws.py
and test_distributed.py.
"""

import logging
from itertools import chain

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from sft_runs import FACTS, TOKENIZER, assert_same_weights, config, logs, other_teacher, train, trainer, weights
from tokenizers import decoders
from transformers import TrainerCallback

from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.trainers import anchors
from trl_selfdistill.trainers.anchors import own_answers


PROMPTS = [question_prompt(question) for question in [*QUESTIONS][:4]]
CHATS = [[{"role": "user", "content": row["prompt"]}] for row in FACTS]
CHAT_ROWS = [
    {"prompt": chat, "completion": [{"role": "assistant", "content": row["completion"]}]}
    for chat, row in zip(CHATS, FACTS, strict=True)
]


def given(prompts=PROMPTS, column="prompt", **arguments) -> dict:
    return {"anchor_dataset": Dataset.from_dict({column: prompts}), **arguments}


def answering():
    """A model whose answers end with a line."""
    model = build_answering_model(TOKENIZER)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *TOKENIZER("\n")["input_ids"]]
    return model


def soon_silent():
    model = build_model(TOKENIZER, initializer_range=0.4)
    model.generation_config.eos_token_id = [*range(0, 300, 3)]
    return model


def greedy(model, prompt: str) -> str:
    ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
    return TOKENIZER.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.size(1) :])


def test_own_answers_are_what_the_model_writes_up_to_its_end(caplog):
    model = answering()
    model.config.attention_dropout = 0.9
    written = {prompt: greedy(model.eval(), prompt) for prompt in [*PROMPTS, "Q"]}
    model.train()
    with caplog.at_level(logging.WARNING, logger="trl_selfdistill"):
        rows = own_answers(model, TOKENIZER, [*written], max_new_tokens=12, batch_size=3).to_list()
    assert model.training
    ends = [text.partition("\n") for text in written.values()]
    expected = {p: line for p, (line, end, _) in zip(written, ends, strict=True) if end and line.strip()}
    assert {row["prompt"]: row["completion"] for row in rows} == expected and len(expected) > 3
    assert f"{len(written) - len(expected)} of the model's {len(written)} answers are empty or" in caplog.text
    with pytest.raises(ValueError, match="4 of the model's 4 answers .* within `max_new_tokens=2`"):
        own_answers(build_model(TOKENIZER), TOKENIZER, PROMPTS, max_new_tokens=2)


def test_own_answers_keep_their_first_blank():
    """Also where the tokenizer's decoder drops that of a text, as SentencePiece's do."""
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    expected = own_answers(answering(), TOKENIZER, PROMPTS, max_new_tokens=12).to_list()
    assert own_answers(answering(), tokenizer, PROMPTS, max_new_tokens=12).to_list() == expected
    assert any(row["completion"].startswith(" ") for row in expected)


OWN = {
    "completions": (answering, FACTS, PROMPTS, {}),
    "all tokens": (answering, FACTS, PROMPTS, dict(completion_only_loss=False, kl_weight=0)),
    "conversations": (soon_silent, CHAT_ROWS, [[{**turn, "name": "me"}] for [turn] in CHATS], {}),
    "packing": (answering, FACTS, PROMPTS, dict(packing=True, packing_strategy="wrapped", max_length=32)),
}


@pytest.mark.parametrize("name", OWN)
def test_own_answers_are_rows_like_the_others(tmp_path, name):
    model, facts, prompts, options = OWN[name]
    rows = own_answers(model(), TOKENIZER, prompts, max_new_tokens=12).to_list()
    by_hand = train(tmp_path, model(), dict(train_dataset=Dataset.from_list([*facts, *rows])), **options)
    options = options | dict(anchors="own_answers", anchor_max_new_tokens=12)
    ours = train(tmp_path, model(), given(prompts, train_dataset=Dataset.from_list(facts)), **options)
    assert len(rows) > 2
    for column in ("input_ids", "labels"):
        found, expected = (sorted(chain(*run.train_dataset[column])) for run in (ours, by_hand))
        assert found == expected
    if name != "packing":  # where each part is packed by itself
        assert logs(ours) == logs(by_hand)
        assert_same_weights(ours.model, by_hand.model)


@pytest.mark.parametrize("column, kl_weight", [("text", 0.0), ("prompt", 1.5)])
def test_the_kl_of_anchors_is_that_of_rows_with_labels(tmp_path, column, kl_weight):
    """
    A step of SGD is that on the rows and what the KL adds to one on the anchors, at each token of a text and at the
    first token of an answer; its micro-batches are uneven.
    """
    settings = dict(max_steps=1, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.5, max_grad_norm=0.0)

    def step(rows: list[dict], **options) -> tuple[dict[str, torch.Tensor], dict]:
        model = build_model(TOKENIZER, initializer_range=0.4)
        model.accepts_loss_kwargs = rows is texts or kl_weight == 0  # without, Trainer divides by the micro-batches
        before, arguments = weights(model), dict(train_dataset=Dataset.from_list(rows), **other_teacher())
        arguments |= given(PROMPTS, column) if "anchors" in options else {}
        run = train(tmp_path, model, arguments, temperature=2.0, **settings, **options)
        assert "anchor" not in str(run.evaluate(Dataset.from_list(rows)))
        return {name: value - before[name] for name, value in weights(model).items()}, logs(run)[0]

    # transformers 4 counts the label of a first token, which nothing predicts
    texts = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in TOKENIZER(PROMPTS)["input_ids"]]
    if column == "prompt":
        prompts = TOKENIZER(PROMPTS)["input_ids"]
        texts = [{"input_ids": ids + [7], "labels": [-100] * len(ids) + [7]} for ids in prompts]
    (with_kl, of_texts), (without, _) = (step(texts, kl_weight=weight) for weight in (1.0, 0.0))
    moved, row = step(FACTS[:4], kl_weight=kl_weight, anchors="kl", anchor_weight=3.0)
    for name, value in step(FACTS[:4], kl_weight=kl_weight)[0].items():
        expected = value + 3 * (with_kl[name] - without[name])
        torch.testing.assert_close(moved[name], expected, rtol=1e-3, atol=2e-6, msg=name)
    assert row["anchor_kl_loss"] == pytest.approx(of_texts["kl_loss"], rel=1e-5) and of_texts["kl_loss"] > 0.01
    assert ("kl_loss" in row) == (kl_weight > 0)


@pytest.mark.parametrize("column, kl_weight", [("prompt", 1.0), ("text", 0.0), ("messages", 1.0)])
def test_a_cached_teacher_is_one_in_memory(tmp_path, column, kl_weight):
    prompts = CHATS if column == "messages" else PROMPTS
    options = dict(anchors="kl", anchor_weight=2.0, kl_weight=kl_weight, max_steps=4)
    cache = dict(precompute_teacher=True, teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_dtype="float32")
    runs = [train(tmp_path, None, given(prompts, column), **options, **extra) for extra in ({}, cache)]
    expected, found = ([row["anchor_kl_loss"] for row in logs(run)[:-1]] for run in runs)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6) and expected[-1] > 1e-4
    texts = prompts if column != "messages" else TOKENIZER.apply_chat_template(prompts, tokenize=False)
    texts = [text + "<|im_start|>assistant\n" * (column == "messages") for text in texts]
    tokens = [runs[0].anchors[i]["input_ids"][: None if column == "text" else -1] for i in range(len(texts))]
    assert sorted(tokens) == sorted(TOKENIZER(texts)["input_ids"])


def test_a_conversation_is_asked_for_its_last_answer(tmp_path):
    asked, answered = (trainer(tmp_path, None, given(rows, "messages"), anchors="kl") for rows in (CHATS, ANSWERED))
    assert asked.anchors.dataset["input_ids"][:] == answered.anchors.dataset["input_ids"][:]


@pytest.mark.parametrize("labels", [{"labels": [-100, 6, 7]}, {}])
def test_own_answers_carry_the_labels_and_not_their_prompts(tmp_path, labels):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], **labels}] * 2)
    options = dict(anchors="own_answers", anchor_max_new_tokens=12, dataset_kwargs=dict(skip_prepare_dataset=True))
    run = trainer(tmp_path, answering(), given(train_dataset=rows), **options)
    first, _, *added = run.train_dataset.to_list()
    assert first["labels"] == labels.get("labels", [5, 6, 7])
    assert added and all(row["labels"][0] == -100 != row["labels"][-1] for row in added)


def test_each_row_comes_once_a_pass_in_an_order_of_the_seed(tmp_path):
    rows, other = (trainer(tmp_path, None, given(), anchors="kl", seed=seed).anchors for seed in (3, 4))
    passes, others = ([[x[4 * n + i]["input_ids"] for i in range(4)] for n in range(2)] for x in (rows, other))
    assert passes[0] == passes[1] != others[0] and sorted(passes[0]) == sorted(others[0]) != passes[0]


class SmallMemory(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.train_batch_size > 1:
            raise RuntimeError("CUDA out of memory.")


def test_each_step_takes_the_next_ones(tmp_path, calls_of):
    taken = calls_of(anchors.Anchors, "__getitem__")
    train(tmp_path, None, given(), anchors="kl", gradient_accumulation_steps=2, max_steps=3)
    # An epoch ends in the middle of the second step
    assert [call.args[1] for call in taken] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    taken.clear()
    train(tmp_path, None, given() | dict(callbacks=[SmallMemory()]), anchors="kl", auto_find_batch_size=True)
    assert [call.args[1] for call in taken] == [0, 1] + [0, 1, 2]


@pytest.mark.parametrize("adapter", [False, True])
def test_texts_are_the_teachers_however_far_the_student_is(tmp_path, monkeypatch, adapter):
    monkeypatch.setattr(anchors, "_STEPS", 3)  # of two rows
    monkeypatch.setattr(anchors, "_BATCH_SIZE", 3)
    options = dict(anchors="self", anchor_max_new_tokens=7, max_steps=4, learning_rate=0.5)
    options |= dict(anchor_max_new_tokens=9, max_length=8) if adapter else {}

    def run(**changes):
        peft = dict(peft_config=LoraConfig(r=4, target_modules="all-linear")) if adapter else {}
        return trainer(tmp_path, build_model(TOKENIZER, initializer_range=0.4), peft, **options | changes)

    fresh, trained = run(), run()
    expected = [fresh.anchors[position]["input_ids"] for position in range(12)]
    trained.train()
    assert [trained.anchors[position]["input_ids"] for position in range(6, 12)] == expected[6:]
    assert trained.anchors[3]["input_ids"] == expected[3] != run(seed=4).anchors[3]["input_ids"]
    assert len({*map(tuple, expected)}) == 12 and max(map(len, expected)) == 8
    assert {ids[0] for ids in expected} == {TOKENIZER.eos_token_id}
    ids = torch.tensor([row for row in expected if len(row) == 8])
    logits = build_model(TOKENIZER, initializer_range=0.4)(ids).logits[:, :-1]
    ranks = (logits > logits.gather(-1, ids[:, 1:, None])).sum(-1)
    assert ranks.max() >= 50  # of all tokens, not of transformers' 50
    if not adapter:
        fresh.teacher = trained.freeze_student()
        assert [fresh.anchors[position]["input_ids"] for position in range(6, 12)] != expected[6:]


EVALUATED = Dataset.from_list([{"prompt": f"{PROMPTS[2].upper()} ", "completion": " x"}])
CHAT_DATA, TEXT_DATA = Dataset.from_list(CHAT_ROWS), Dataset.from_list(FACTS)
TEXTS = Dataset.from_dict({"text": ["c d", "e f"]})
ANSWERED = [[*row["prompt"], *row["completion"]] for row in CHAT_ROWS]
STREAM = Dataset.from_list(FACTS).to_iterable_dataset()
SILENT = build_tokenizer()
SILENT.eos_token = SILENT.bos_token = None
TOKENS = Dataset.from_list([{"input_ids": [5, 6, 7]}] * 2)
REFUSED = [
    (dict(anchors="self"), dict(processing_class=SILENT, train_dataset=TOKENS), "'self'`: the tokenizer has no token"),
    (dict(anchors="replay"), {}, "`anchors` is one of own_answers, kl, self, None, got 'replay'"),
    (dict(anchors="self", anchor_weight=-1.0), {}, "`anchor_weight` must be > 0, got -1.0"),
    (dict(anchors="self", precompute_teacher=True), {}, "`precompute_teacher` .*`anchors`"),
    (dict(anchors="kl"), {}, "`anchors='kl'` takes one of `anchor_dataset` and `anchor_dataset_name`, got 0"),
    (dict(anchors="kl", anchor_dataset_name="a/b"), given(), "`anchors='kl'` takes one of .* got 2"),
    ({}, given(), "`anchors=None` takes none of `anchor_dataset` and .* got 1"),
    (dict(anchors="kl"), given([]), "`anchor_dataset` must be a `Dataset` with rows and a column"),
    (dict(anchors="kl"), dict(anchor_dataset=["a"]), r"must be a `Dataset` .* got \['a'\]"),
    (dict(anchors="kl"), given(["a b", " \u200b"]), "row 2: `prompt` must be a text or a conversation that asks some"),
    (dict(anchors="kl"), given([[{"role": "system", "content": "Hi"}]]), "row 1: .* asks something, got .*'Hi'"),
    (dict(anchors="own_answers"), given(["a b", None]), "row 2: `prompt` must be a text .* got None"),
    (dict(anchors="kl"), given(["What?", "a"], "text"), "row 2: `text` has 1 tokens, not 2 to"),
    (dict(anchors="kl", max_length=8), given(["ab", "What " * 20]), "row 2: .* of an answer, .*`max_length=8`"),
    (dict(anchors="kl"), given(eval_dataset={"one": EVALUATED}), "row 3: .* is one of 1 .* `eval_dataset`, too: 'Q"),
    (dict(anchors="kl", packing=True), given(eval_dataset=EVALUATED), "row 3: `prompt` is one of 1 .* 'Q"),
    (dict(anchors="kl"), given(["a b", "c d"], "text", eval_dataset=TEXTS), "row 2: `text` is one of 1 .* 'c d'"),
    (dict(anchors="kl"), given(ANSWERED, "messages", eval_dataset=CHAT_DATA), "row 1: `messages` is"),
    (dict(anchors="kl"), given(ANSWERED, "messages", eval_dataset=TEXT_DATA), "row 1: `messages` is"),
    (dict(anchors="own_answers"), given(train_dataset=STREAM), "adds rows to a tokenized .* With streams"),
]


@pytest.mark.parametrize("options, arguments, message", REFUSED)
def test_what_cannot_be_is_refused_before_training(tmp_path, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, None, arguments, **options)


def test_a_run_resumes_with_the_anchors_it_had(tmp_path):
    options = dict(anchors="kl", kl_weight=0, max_steps=2, save_strategy="steps", save_steps=1)
    train(tmp_path, None, given(), **options)
    card = (tmp_path / "run/README.md").read_text()
    assert "the mean KL over texts without labels" in card
    assert "| anchors | kl |" in card and "| anchor_num_rows | 4 |" in card and "| anchor_weight | 1.0 |" in card
    for arguments, changes in (
        (given(PROMPTS[:3]), {}),
        (given(), dict(anchor_weight=2.0)),
        (given(), dict(seed=7)),
        ({}, dict(anchors=None)),
    ):
        other = trainer(tmp_path, None, arguments, **options | changes)
        with pytest.raises(ValueError, match="was trained with the anchors {'anchors': 'kl', .*Resume with the same"):
            other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))


@pytest.mark.parametrize("name", ["anchors.csv", "anchors.jsonl", "anchors.parquet", "folder"])
def test_anchors_are_loaded_by_name(tmp_path, name, monkeypatch):
    rows, file = Dataset.from_dict({"prompt": ["What, then?", "NA"]}), tmp_path / name
    write = {".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(file.suffix, rows.to_json)
    if name == "folder":
        file.mkdir()
    write(str(file / "train.jsonl" if name == "folder" else file))
    monkeypatch.chdir(tmp_path)
    loaded = anchors.load_anchors(config(tmp_path, anchors="kl", anchor_dataset_name=name), None)
    assert loaded["prompt"][:] == rows["prompt"][:]


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    for name, text in {"no.jsonl": "", "blank.json": "\n\n", "cut.jsonl": "{", "a.txt": "a", "lost.csv": None}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"`anchor_dataset_name='.*{name}'` is no .jsonl, "):
            anchors.load_anchors(config(tmp_path, anchors="kl", anchor_dataset_name=str(tmp_path / name)), None)
