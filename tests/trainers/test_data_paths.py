# SPDX-License-Identifier: Apache-2.0
"""However the data reach the models, the loss is that of each example by itself, on both models' full logits."""

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from sft_runs import FACTS, ROUNDING, TOKENIZER, assert_same_weights, logs, train, trainer


KL_WEIGHT, TEMPERATURE = 0.7, 0.5
IGNORED = -100


def teacher():
    return build_model(TOKENIZER, seed=1, initializer_range=0.4)


def student(**config):
    return build_model(TOKENIZER, initializer_range=0.4, **config)


def to_ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def labelled_fact(row) -> tuple[list[int], list[int]]:
    """Tokens and labels of a prompt-completion row, by the tokenizer alone."""
    prompt, whole = to_ids(row["prompt"]), to_ids(row["prompt"] + row["completion"] + TOKENIZER.eos_token)
    assert whole[: len(prompt)] == prompt
    return whole, [IGNORED] * len(prompt) + whole[len(prompt) :]


TEXTS = [{"text": row["prompt"] + row["completion"]} for row in FACTS]
LABELLED_TEXTS = [(ids, ids) for ids in (to_ids(row["text"] + TOKENIZER.eos_token) for row in TEXTS)]


def wrapped(examples, length):
    """The examples end to end, cut every `length` tokens."""
    ids, labels = (sum((example[side] for example in examples), []) for side in (0, 1))
    return [(ids[i : i + length], labels[i : i + length]) for i in range(0, len(ids), length)]


ONLY = [labelled_fact(row) for row in FACTS]
# How the data are given, the settings, and the sequences that the models should see
PATHS = {
    "prompt-completion": (FACTS, {}, ONLY),
    "text": (TEXTS, {}, LABELLED_TEXTS),
    "packing, bfd": (FACTS, dict(packing=True, max_length=64), ONLY),
    "packing, wrapped": (
        TEXTS,
        dict(packing=True, packing_strategy="wrapped", max_length=24),
        wrapped(LABELLED_TEXTS, 24),
    ),
    "padding_free": (FACTS, dict(padding_free=True, max_length=None, per_device_train_batch_size=3), ONLY),
}


def terms(examples, models) -> dict[str, torch.Tensor]:
    """The log-probabilities of the labels and the KL, of every label token of every example by itself."""
    log_probs, kl = [], []
    for ids, labels in examples:
        labels = torch.tensor(labels)[1:]
        with torch.no_grad():
            logits = [model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].double() for model in models]
        counted = labels != IGNORED
        log_probs.append(logits[0][counted].log_softmax(-1).gather(1, labels[counted, None])[:, 0])
        q, p = ((side[counted] / TEMPERATURE).log_softmax(-1) for side in logits)
        kl.append((p.exp() * (p - q)).sum(-1))
    return {"log_probs": torch.cat(log_probs), "kl": torch.cat(kl)}


def losses_of(run) -> tuple[float, float, float]:
    """Loss, CE and KL of the whole dataset as the trainer computes them, each a mean over the label tokens."""
    batches = list(run.get_train_dataloader())
    counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    loss = sum(float(run.compute_loss(run.model, dict(b), num_items_in_batch=sum(counts))) for b in batches)
    return loss, *(run._metrics["train"][name][-1] for name in ("ce_loss", "kl_loss"))


def positions_seen(model) -> list[dict]:
    """What the backbone of a model is called with, from now on."""
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


OPTIONS = dict(kl_weight=KL_WEIGHT, temperature=TEMPERATURE)


@pytest.mark.parametrize("path, attention", [*((path, "sdpa") for path in PATHS), ("packing, bfd", "eager")])
def test_loss_and_kl_are_those_of_each_example_by_itself(tmp_path, path, attention):
    rows, options, examples = PATHS[path]
    models = [build_model(TOKENIZER, seed, initializer_range=0.4, attn_implementation=attention) for seed in (0, 1)]
    extra = dict(teacher_model=models[1], train_dataset=Dataset.from_list(rows))
    run = trainer(tmp_path, models[0], extra, **OPTIONS, **options)
    seen = [positions_seen(model) for model in (run.model, run.teacher_model)]
    loss, ce, kl = losses_of(run)
    expected = terms(examples, [student(), teacher()])
    assert kl == pytest.approx(expected["kl"].mean().item(), rel=1e-4) and kl > 0.1
    assert ce == pytest.approx(-expected["log_probs"].mean().item(), rel=1e-4)
    assert loss == pytest.approx(ce + KL_WEIGHT * TEMPERATURE**2 * kl, rel=1e-5)
    assert len(seen[0]) == len(seen[1]) > 0
    if "bfd" in path:  # rows of several sequences
        assert len(run.train_dataset) < len(rows) and (seen[0][0]["position_ids"] == 0).sum() > 1
    for mine, theirs in zip(*seen, strict=True):
        assert mine.keys() == theirs.keys() and torch.equal(mine["input_ids"], theirs["input_ids"])
        for name in {"attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx"} & mine.keys():
            assert torch.equal(mine[name], theirs[name])


MEMORY = [
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    dict(torch_compile=True, torch_compile_backend="eager"),
]


@pytest.mark.parametrize("memory", MEMORY, ids=str)
def test_what_saves_memory_or_time_changes_nothing(tmp_path, memory):
    def run(**options):
        settings = dict(max_steps=2, optim="sgd", pad_to_multiple_of=32, **OPTIONS)
        settings |= dict(save_strategy="steps", save_steps=1)
        return train(tmp_path, student(num_hidden_layers=1), dict(teacher_model=teacher()), **settings, **options)

    plain, other = run(), run(**memory)
    assert_same_weights(other.accelerator.unwrap_model(other.model), plain.model, atol=1e-6)
    for row, expected in zip(logs(other)[:2], logs(plain)[:2], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=ROUNDING)
    assert logs(other)[0]["kl_loss"] > 0.1
