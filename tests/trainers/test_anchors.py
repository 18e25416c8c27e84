# SPDX-License-Identifier: Apache-2.0
"""`anchors`: own answers are further rows, the others a KL of their own. More laws of them stand in test_laws.py."""

import json
from itertools import chain

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model
from conftest import build_model
from datasets import Dataset
from sft_runs import FACTS, ROUNDING, TOKENIZER, assert_same_weights, config, logs, train, trainer
from torch.nn import functional as F

from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.trainers import anchors
from trl_selfdistill.trainers.own_answers import own_answers


PROMPTS = [question_prompt(question) for question in [*QUESTIONS][:4]]
CHAT = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in FACTS]


def dataset(prompts=PROMPTS, column="prompt") -> dict:
    return {"anchor_dataset": Dataset.from_dict({column: prompts})}


def answering():
    """A model whose answers end with a line."""
    model = build_answering_model(TOKENIZER)
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *TOKENIZER("\n")["input_ids"]]
    return model


def soon_silent():
    model = build_model(TOKENIZER, initializer_range=0.4)
    model.generation_config.eos_token_id = [*range(0, 300, 3)]
    return model


def messages(rows) -> list[dict]:
    return [
        {
            name: [{"role": role, "content": row[name]}]
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        }
        for row in rows
    ]


OWN = {
    "completions": {},
    "all tokens": dict(completion_only_loss=False, kl_weight=0),
    "conversations": {},
    "packing": dict(packing=True, packing_strategy="wrapped", max_length=32),
}


@pytest.mark.parametrize("name", OWN)
def test_own_answers_are_rows_like_the_others(tmp_path, name):
    facts, prompts, model = FACTS, PROMPTS, answering
    if name == "conversations":
        facts, prompts, model = messages(FACTS), [row["prompt"] for row in CHAT], soon_silent
    rows = own_answers(model(), TOKENIZER, prompts, max_new_tokens=12).to_list()
    by_hand = train(tmp_path, model(), dict(train_dataset=Dataset.from_list([*facts, *rows])), **OWN[name])
    own = dict(anchors="own_answers", anchor_max_new_tokens=12)
    given = dataset(prompts) | dict(train_dataset=Dataset.from_list(facts))
    ours = train(tmp_path, model(), given, **own, **OWN[name])
    assert len(rows) > 2
    for column in ("input_ids", "labels"):
        found, expected = (sorted(chain(*run.train_dataset[column])) for run in (ours, by_hand))
        assert found == expected
    if name != "packing":  # where each part is packed by itself
        assert logs(ours) == logs(by_hand)
        assert_same_weights(ours.model, by_hand.model)


def losses_by_hand(model, teacher, kl_weight: float, weight: float, temperature: float) -> list[torch.Tensor]:
    """CE and KL of the rows, KL of the anchors, each a mean over all tokens, from logits; and the loss."""

    def log_probs(model, text, temperature=1.0):
        return (model(input_ids=torch.tensor([text])).logits[0, :-1] / temperature).log_softmax(-1)

    ce, kl, anchor_kl = [], [], []
    texts = [TOKENIZER(row["prompt"])["input_ids"] for row in FACTS[:4]]
    for prompt, row in zip(texts, FACTS, strict=False):
        ids = [*prompt, *TOKENIZER(row["completion"])["input_ids"], TOKENIZER.eos_token_id]
        own = slice(len(prompt) - 1, None)
        ce.append(F.nll_loss(log_probs(model, ids)[own], torch.tensor(ids)[1:][own], reduction="none"))
        kl.append(kl_of(log_probs(model, ids, temperature), log_probs(teacher, ids, temperature))[own])
    for prompt in PROMPTS:
        ids = TOKENIZER(prompt)["input_ids"]
        anchor_kl.append(kl_of(log_probs(model, ids, temperature), log_probs(teacher, ids, temperature)))
    terms = [torch.cat(term).mean() for term in (ce, kl, anchor_kl)]
    return [*terms, terms[0] + temperature**2 * (kl_weight * terms[1] + weight * terms[2])]


def kl_of(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(student, teacher.detach(), reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("kl_weight", [0.0, 1.5])
def test_the_kl_of_anchors_is_a_mean_over_all_their_tokens(tmp_path, kl_weight):
    """Two micro-batches with unequal numbers of tokens, of rows and of anchors: one step takes each once."""
    teacher, start = (
        build_model(TOKENIZER, seed=1, initializer_range=0.4),
        build_model(TOKENIZER, initializer_range=0.4),
    )
    *terms, loss = losses_by_hand(start, teacher, kl_weight, weight=3.0, temperature=2.0)
    loss.backward()
    arguments = dataset() | dict(train_dataset=Dataset.from_list(FACTS[:4]), teacher_model=teacher)
    weights = dict(kl_weight=kl_weight, temperature=2.0, anchors="kl", anchor_weight=3.0)
    steps = dict(max_steps=1, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.5, max_grad_norm=0.0)
    run = train(tmp_path, build_model(TOKENIZER, initializer_range=0.4), arguments, **weights, **steps)
    [row, *_] = logs(run)
    found = {name: row.get(name, 0.0) for name in ("loss", "anchor_kl_loss", "ce_loss", "kl_loss")}
    expected = dict(zip(("ce_loss", "kl_loss", "anchor_kl_loss"), terms, strict=True)) | {"loss": loss}
    for name in ("loss", "anchor_kl_loss", *(("ce_loss", "kl_loss") if kl_weight else ())):
        assert found[name] == pytest.approx(expected[name].item(), rel=1e-5, abs=ROUNDING), name
    moved = dict(run.model.named_parameters())
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(moved[name], parameter - 0.5 * parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert "anchor" not in str(run.evaluate(Dataset.from_list(FACTS)))


@pytest.mark.parametrize("column", ["prompt", "text", "messages"])
def test_a_cached_teacher_is_one_in_memory(tmp_path, column):
    prompts = [row["prompt"] for row in CHAT] if column == "messages" else PROMPTS
    options = dict(anchors="kl", anchor_weight=2.0, max_steps=4)
    cache = dict(precompute_teacher=True, teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_dtype="float32")
    runs = [train(tmp_path, None, dataset(prompts, column), **options, **extra) for extra in ({}, cache)]
    expected, found = ([row["anchor_kl_loss"] for row in logs(run)[:-1]] for run in runs)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6) and expected[-1] > 1e-4
    tokens = {tuple(runs[0].anchors[i]["input_ids"]) for i in range(4)}
    if column != "messages":
        assert tokens == {tuple(TOKENIZER(prompt)["input_ids"]) for prompt in PROMPTS}
    else:
        text = TOKENIZER.apply_chat_template(prompts[0], add_generation_prompt=True, tokenize=False)
        assert tuple(TOKENIZER(text)["input_ids"]) in {tuple(runs[0].anchors[i]["input_ids"]) for i in range(6)}


def test_rows_come_in_a_new_order_when_all_have_come(tmp_path):
    rows = trainer(tmp_path, None, dataset(), anchors="kl").anchors
    turns = [[tuple(rows[4 * turn + i]["input_ids"]) for i in range(4)] for turn in range(6)]
    assert len({frozenset(turn) for turn in turns}) == 1 and len({tuple(turn) for turn in turns}) > 1
    assert tuple(rows[5]["input_ids"]) == turns[1][1]
    other = trainer(tmp_path, None, dataset(), anchors="kl", seed=4).anchors
    assert [tuple(other[i]["input_ids"]) for i in range(24)] != [*chain(*turns)]


@pytest.mark.parametrize("adapter", [False, True])
def test_texts_are_the_teachers_however_far_the_student_is(tmp_path, monkeypatch, adapter):
    from peft import LoraConfig

    monkeypatch.setattr(anchors, "_BUFFER_SIZE", 5)  # 6, three steps
    options = dict(anchors="self", anchor_max_new_tokens=7, max_steps=4, learning_rate=0.5)

    def run():
        peft = dict(peft_config=LoraConfig(r=4, target_modules="all-linear")) if adapter else {}
        return trainer(tmp_path, build_model(TOKENIZER, initializer_range=0.4), peft, **options)

    fresh, trained = run(), run()
    expected = [fresh.anchors[position]["input_ids"] for position in range(12)]
    trained.train()
    assert trained.state.global_step == 4
    assert [trained.anchors[position]["input_ids"] for position in range(6, 12)] == expected[6:]
    assert len({*map(tuple, expected)}) == 12 and max(map(len, expected)) == 8
    assert {ids[0] for ids in expected} == {TOKENIZER.eos_token_id}
    student, trained.teacher = trained.model, fresh.teacher
    if not adapter:
        fresh.teacher.model.load_state_dict(student.state_dict())
        trained.anchors[0]  # another part, so that the texts are written anew
        assert [trained.anchors[position]["input_ids"] for position in range(6, 12)] != expected[6:]


REFUSED = [
    (dict(anchors="replay"), {}, "`anchors` must be one of own_answers, kl, self, or unset, got 'replay'"),
    (dict(anchors="self", anchor_weight=-1.0), {}, "`anchor_weight` must be > 0, got -1.0"),
    (dict(anchors="self", anchor_max_new_tokens=0), {}, "`anchor_max_new_tokens` must be > 0, got 0"),
    (dict(anchors="self", precompute_teacher=True), {}, "`precompute_teacher=True` .* take `anchors='kl'`"),
    (dict(anchors="kl"), {}, "`anchors='kl'` takes one of `anchor_dataset` and `anchor_dataset_name`, got NoneType"),
    (dict(anchors="kl", anchor_dataset_name="a/b"), dataset(), "`anchors='kl'` takes one of .* and 'a/b'"),
    (dict(anchors="self"), dataset(), "`anchors='self'` takes none of `anchor_dataset`"),
    ({}, dataset(), "`anchors=None` takes none of `anchor_dataset`"),
    (dict(anchors="kl"), dataset([]), "`anchor_dataset` must be a `Dataset` with rows and a column"),
    (dict(anchors="kl"), dataset(["a"], "question"), r"a column \('prompt', .* got Dataset\({"),
    (dict(anchors="kl"), dict(anchor_dataset=["a"]), r"must be a `Dataset` .* got \['a'\]"),
    (dict(anchors="kl"), dataset(["a b", " "]), "row 2: `prompt` must be a text or a conversation, got ' '"),
    (dict(anchors="own_answers"), dataset(["a b", None]), "row 2: `prompt` must be a text .* got None"),
    (dict(anchors="kl"), dataset([1, 2], "text"), "row 1: `text` must be a text or a conversation, got 1"),
    (dict(anchors="kl"), dataset(["What?", "a"]), "row 2: `prompt` has 1 tokens, not 2 at least"),
    (dict(anchors="kl", max_length=8), dataset(["ab", "What " * 20]), "row 2: .* and `max_length=8` at most"),
    (
        dict(anchors="own_answers"),
        dataset() | dict(eval_dataset={"one": Dataset.from_list([{"prompt": PROMPTS[2], "completion": " x"}])}),
        "row 3: `prompt` is one of 1 that are in `eval_dataset`, too: 'Q: ",
    ),
    (
        dict(anchors="own_answers"),
        dataset() | dict(train_dataset=Dataset.from_list(FACTS).to_iterable_dataset()),
        "adds rows to a `train_dataset` of texts. With streams",
    ),
]


@pytest.mark.parametrize("options, arguments, message", REFUSED)
def test_what_cannot_be_is_refused_before_training(tmp_path, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, None, arguments, **options)


def test_a_run_resumes_with_the_anchors_it_had(tmp_path):
    options = dict(anchors="kl", max_steps=2, save_strategy="steps", save_steps=1)
    run = train(tmp_path, None, dataset(), **options)
    card = (tmp_path / "run/README.md").read_text()
    assert "| anchors | kl |" in card and "| anchor_num_rows | 4 |" in card and "| anchor_weight | 1.0 |" in card
    checkpoint = str(tmp_path / "run/checkpoint-1")
    for arguments, changes in (
        (dataset(PROMPTS[:3]), {}),
        (dataset(), dict(anchor_weight=2.0)),
        ({}, dict(anchors=None)),
    ):
        other = trainer(tmp_path, None, arguments, **options | changes)
        with pytest.raises(ValueError, match="was trained with the anchors {'anchors': 'kl', .*Resume with the same"):
            other.train(resume_from_checkpoint=checkpoint)
    own = trainer(tmp_path, answering(), dataset(), **options | dict(anchors="own_answers"))
    assert own.anchor_settings["anchor_num_rows"] == 4 and own.anchors is None
    assert run.anchors is not None


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ""])
def test_anchors_are_loaded_by_name(tmp_path, suffix):
    prompts, file = ["NA", "What, then?"], tmp_path / f"anchors{suffix}"
    if suffix == ".csv":
        file.write_text('prompt\nNA\n"What, then?"\n')
    elif suffix == ".parquet":
        Dataset.from_dict({"prompt": prompts}).to_parquet(file)
    else:
        folder = file if not suffix else None
        if folder is not None:
            folder.mkdir()
            file = folder / "train.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    name = str(tmp_path / f"anchors{suffix}")
    rows = anchors.choose_anchors(config(tmp_path, anchors="kl", anchor_dataset_name=name), None)
    assert rows["prompt"][:] == prompts
