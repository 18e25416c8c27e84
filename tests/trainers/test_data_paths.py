# SPDX-License-Identifier: Apache-2.0
"""However the data reach the models, the loss is that of each example by itself, on both models' full logits."""

import pytest
import torch
from conftest import build_model
from sft_runs import ROUNDING, TOKENIZER, assert_same_weights, logs, train, trainer


KL_WEIGHT, TEMPERATURE = 0.7, 0.5
IGNORED = -100


def teacher():
    return build_model(TOKENIZER, seed=1, initializer_range=0.4)


def student(**config):
    return build_model(TOKENIZER, initializer_range=0.4, **config)


def wrapped(examples):
    """The examples end to end, cut every 24 tokens."""
    ids, labels = (sum((example[side] for example in examples), []) for side in (0, 1))
    return [(ids[i : i + 24], labels[i : i + 24]) for i in range(0, len(ids), 24)]


# Settings, and the sequences that the models should see, made of the tokenised rows
PATHS = {
    "padded": ({}, list),
    "packing, bfd": (dict(packing=True, max_length=64), list),
    "packing, wrapped": (dict(packing=True, packing_strategy="wrapped", max_length=24), wrapped),
    "padding_free": (dict(padding_free=True, max_length=None, per_device_train_batch_size=3), list),
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
    options, sequences = PATHS[path]
    models = [build_model(TOKENIZER, seed, initializer_range=0.4, attn_implementation=attention) for seed in (0, 1)]
    rows = trainer(tmp_path).train_dataset
    run = trainer(tmp_path, models[0], dict(teacher_model=models[1]), **OPTIONS, **options)
    seen = [positions_seen(model) for model in (run.model, run.teacher_model)]
    loss, ce, kl = losses_of(run)
    examples = sequences([(row["input_ids"], row["labels"]) for row in rows])
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


def test_torch_compile_changes_nothing(tmp_path):
    def run(**options):
        settings = dict(max_steps=2, optim="sgd", pad_to_multiple_of=32, **OPTIONS)
        settings |= dict(save_strategy="steps", save_steps=1)
        return train(tmp_path, student(num_hidden_layers=1), dict(teacher_model=teacher()), **settings, **options)

    plain, other = run(), run(torch_compile=True, torch_compile_backend="eager")
    assert_same_weights(other.accelerator.unwrap_model(other.model), plain.model, atol=1e-6)
    for row, expected in zip(logs(other)[:2], logs(plain)[:2], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=ROUNDING)
    assert logs(other)[0]["kl_loss"] > 0.1
