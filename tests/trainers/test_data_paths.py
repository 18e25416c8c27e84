# SPDX-License-Identifier: Apache-2.0
"""However the data reach the models, the loss is that of each example by itself, on both models' full logits."""

import copy

import pytest
import torch
from conftest import CITIES, build_model
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig
from sft_runs import ARCHITECTURES, FACTS, TINY, TOKENIZER, architecture, assert_same_weights, logs, train, trainer
from transformers import AutoModelForCausalLM, MambaConfig, OPTConfig
from trl import SFTTrainer


KL_WEIGHT, TEMPERATURE = 0.7, 0.5
IGNORED = -100


def teacher():
    return build_model(TOKENIZER, seed=1, initializer_range=0.4)


def student():
    return build_model(TOKENIZER, initializer_range=0.4)


def to_ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def labelled_fact(row, completion_only: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels of a prompt-completion row, by the tokenizer alone."""
    prompt, whole = to_ids(row["prompt"]), to_ids(row["prompt"] + row["completion"] + TOKENIZER.eos_token)
    assert whole[: len(prompt)] == prompt
    return whole, ([IGNORED] * len(prompt) + whole[len(prompt) :] if completion_only else whole)


def labelled_chat(messages, mask: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation: `mask` is `"all"` or `"assistant"`."""
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    encoded = TOKENIZER.apply_chat_template(messages, **options)
    ids, mine = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if mask == "all" or on else IGNORED for token, on in zip(ids, mine, strict=True)]


TEXTS = [{"text": row["prompt"] + row["completion"]} for row in FACTS]
LABELLED_TEXTS = [(ids, ids) for ids in (to_ids(row["text"] + TOKENIZER.eos_token) for row in TEXTS)]
CHATS = [
    [
        {"role": "user", "content": city},
        {"role": "assistant", "content": country},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes." * (1 + len(city) % 3)},
    ]
    for city, country in CITIES.items()
]
MESSAGES = [{"messages": chat} for chat in CHATS]
SPLIT_CHATS = [{"prompt": chat[:3], "completion": chat[3:]} for chat in CHATS]
SHAREGPT = [{"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in chat]} for chat in CHATS]


def last_turn_only(chat):
    """The labels of a conversational prompt-completion row: what follows the generation prompt."""
    whole = TOKENIZER.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    prompt = TOKENIZER.apply_chat_template(chat[:3], tokenize=True, add_generation_prompt=True, return_dict=True)
    length = len(prompt["input_ids"])
    return whole, [IGNORED] * length + whole[length:]


def pieces(examples, length):
    """Each example cut into pieces of at most `length` tokens, which are sequences of their own."""
    return [
        (ids[i : i + length], labels[i : i + length]) for ids, labels in examples for i in range(0, len(ids), length)
    ]


def wrapped(examples, length):
    """The examples end to end, cut every `length` tokens."""
    return pieces([tuple(sum((example[side] for example in examples), []) for side in (0, 1))], length)


ONLY = [labelled_fact(row, True) for row in FACTS]
ALL = [labelled_fact(row, False) for row in FACTS]
LONGEST = max(len(ids) for ids, _ in ALL)
# How the data are given, the settings, and the sequences that the models should see
PATHS = {
    "prompt-completion": (FACTS, {}, ONLY),
    "completion_only_loss=False": (FACTS, dict(completion_only_loss=False), ALL),
    "completion_only_loss=True": (FACTS, dict(completion_only_loss=True), ONLY),
    "text": (TEXTS, {}, LABELLED_TEXTS),
    "truncated": (FACTS, dict(max_length=LONGEST - 3), [tuple(x[: LONGEST - 3] for x in row) for row in ONLY]),
    "truncated from the start": (
        FACTS,
        dict(max_length=LONGEST - 3, truncation_mode="keep_end"),
        [tuple(x[-LONGEST + 3 :] for x in row) for row in ONLY],
    ),
    "conversations": (MESSAGES, {}, [labelled_chat(chat, "all") for chat in CHATS]),
    "conversations, as ShareGPT has them": (SHAREGPT, {}, [labelled_chat(chat, "all") for chat in CHATS]),
    "assistant_only_loss": (
        MESSAGES,
        dict(assistant_only_loss=True),
        [labelled_chat(chat, "assistant") for chat in CHATS],
    ),
    "conversational prompt-completion": (SPLIT_CHATS, {}, [last_turn_only(chat) for chat in CHATS]),
    "pre-tokenised with labels": ([dict(input_ids=ids, labels=labels) for ids, labels in ONLY], {}, ONLY),
    "padded to a multiple": (FACTS, dict(pad_to_multiple_of=16), ONLY),
    "packing, bfd": (FACTS, dict(packing=True, max_length=64), ONLY),
    "packing, bfd, in batches": (FACTS, dict(packing=True, max_length=40, per_device_train_batch_size=3), ONLY),
    "packing, bfd, with cut sequences": (
        FACTS,
        dict(packing=True, max_length=LONGEST - 2),
        [tuple(x[: LONGEST - 2] for x in row) for row in ONLY],
    ),
    "packing, bfd_split": (
        TEXTS,
        dict(packing=True, packing_strategy="bfd_split", max_length=12),
        pieces(LABELLED_TEXTS, 12),
    ),
    "packing, wrapped": (
        TEXTS,
        dict(packing=True, packing_strategy="wrapped", max_length=24),
        wrapped(LABELLED_TEXTS, 24),
    ),
    "packing, assistant_only_loss": (
        MESSAGES,
        dict(packing=True, max_length=128, assistant_only_loss=True),
        [labelled_chat(chat, "assistant") for chat in CHATS],
    ),
    "padding_free": (FACTS, dict(padding_free=True, max_length=None, per_device_train_batch_size=3), ONLY),
    "padding_free, padded to a multiple": (
        FACTS,
        dict(padding_free=True, max_length=None, pad_to_multiple_of=16),
        ONLY,
    ),
}


def terms(examples, models) -> dict[str, torch.Tensor]:
    """The log-probabilities of the labels and the KL, of every label token of every example by itself."""
    log_probs, kl, smooth = [], [], []
    for ids, labels in examples:
        labels = torch.tensor(labels)[1:]
        with torch.no_grad():
            logits = [model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].double() for model in models]
        counted = labels != IGNORED
        mine = logits[0][counted].log_softmax(-1)
        q, p = ((side[counted] / TEMPERATURE).log_softmax(-1) for side in logits)
        log_probs.append(mine.gather(1, labels[counted, None])[:, 0])
        smooth.append(-mine.mean(-1))
        kl.append((p.exp() * (p - q)).sum(-1))
    return {"log_probs": torch.cat(log_probs), "kl": torch.cat(kl), "smooth": torch.cat(smooth)}


def losses_of(run, examples_of=None) -> tuple[float, float, float]:
    """Loss, CE and KL of the whole dataset as the trainer computes them, each a mean over the label tokens."""
    batches = list(examples_of or run.get_train_dataloader())
    counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    loss = sum(float(run.compute_loss(run.model, dict(b), num_items_in_batch=sum(counts))) for b in batches)
    metrics = run._metrics["train" if run.model.training else "eval"]
    mean = [
        sum(a * b for a, b in zip(metrics[name][-len(counts) :], counts, strict=True))
        for name in ("ce_loss", "kl_loss")
    ]
    return loss, mean[0] / sum(counts), mean[1] / sum(counts)


def positions_seen(model) -> list[dict]:
    """What the backbone of a model is called with, from now on."""
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


OPTIONS = dict(kl_weight=KL_WEIGHT, temperature=TEMPERATURE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_kl_are_those_of_each_example_by_itself(tmp_path, path, attention):
    rows, options, examples = PATHS[path]
    if attention == "eager" and not ("pack" in path or "free" in path):
        pytest.skip("the attention makes a difference where sequences are joined")
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
    for mine, theirs in zip(*seen, strict=True):
        assert mine.keys() == theirs.keys() and torch.equal(mine["input_ids"], theirs["input_ids"])
        for name in ("attention_mask", "position_ids", "cu_seq_lens_q", "seq_idx"):
            assert (name in mine) == (name in theirs) and torch.equal(mine.get(name, IDS), theirs.get(name, IDS))


IDS = torch.tensor(0)


def test_packing_joins_the_sequences(tmp_path):
    """Otherwise the law above would hold of rows of one sequence."""
    extra = dict(teacher_model=teacher(), train_dataset=Dataset.from_list(FACTS))
    run = trainer(tmp_path, student(), extra, packing=True, max_length=64)
    assert len(run.train_dataset) < len(FACTS)
    batch = next(iter(run.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() > 1 and "attention_mask" not in batch


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_is_trained_as_the_dataset(tmp_path, packing):
    options = dict(packing=packing, max_length=64, per_device_train_batch_size=1, max_steps=2, **OPTIONS)

    def run(rows):
        extra = dict(teacher_model=teacher(), train_dataset=rows)
        return train(tmp_path, student(), extra, shuffle_dataset=False, **options)

    stream = run(Dataset.from_list(FACTS).to_iterable_dataset())
    assert stream.state.global_step == 2
    examples = ONLY[:1] if not packing else None
    if examples:
        expected = terms(examples, [student(), teacher()])
        assert logs(stream)[0]["kl_loss"] == pytest.approx(expected["kl"].mean().item(), rel=1e-4)
    assert logs(stream)[0]["kl_loss"] > 0.1 and logs(stream)[1]["kl_loss"] > 0.1


def test_a_stream_without_an_end_needs_max_steps(tmp_path):
    stream = dict(train_dataset=Dataset.from_list(FACTS).to_iterable_dataset())
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, student(), stream, max_steps=-1)


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_sets_of_a_dictionary_are_each_their_own(tmp_path, packing):
    sets = {"first": FACTS[:2], "rest": FACTS[2:]}
    extra = dict(teacher_model=teacher(), eval_dataset={name: Dataset.from_list(rows) for name, rows in sets.items()})
    options = dict(eval_packing=packing, max_length=64, per_device_eval_batch_size=6)
    run = trainer(tmp_path, student(), extra, **OPTIONS, **options)
    metrics = run.evaluate()
    extra.pop("teacher_model")
    plain = trainer(tmp_path, student(), extra, SFTTrainer, **options).evaluate()
    for name, examples in {"first": ONLY[:2], "rest": ONLY[2:]}.items():
        expected = terms(examples, [student(), teacher()])
        value = -expected["log_probs"].mean() + KL_WEIGHT * TEMPERATURE**2 * expected["kl"].mean()
        if not packing:  # TRL's collator is made for the training set, so that packed evaluation joins its rows
            assert metrics[f"eval_{name}_loss"] == pytest.approx(value.item(), rel=1e-4)
        [row] = [row for row in run.state.log_history if f"eval_{name}_loss" in row]
        assert row["eval_ce_loss"] == pytest.approx(plain[f"eval_{name}_loss"], rel=1e-4)
        pull = KL_WEIGHT * TEMPERATURE**2 * row["eval_kl_loss"]
        assert pull > 0 and metrics[f"eval_{name}_loss"] == pytest.approx(plain[f"eval_{name}_loss"] + pull, rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "options, token_loss",
    [
        (dict(loss_type="dft"), lambda t: -t["log_probs"] * t["log_probs"].exp()),
        (dict(label_smoothing_factor=0.2), lambda t: -0.8 * t["log_probs"] + 0.2 * t["smooth"]),
    ],
    ids=["dft", "label smoothing"],
)
def test_other_losses_have_the_same_kl(tmp_path, options, token_loss, packing):
    extra = dict(teacher_model=teacher(), train_dataset=Dataset.from_list(FACTS))
    run = trainer(tmp_path, student(), extra, packing=packing, max_length=64, **OPTIONS, **options)
    loss, ce, kl = losses_of(run)
    expected = terms(ONLY, [student(), teacher()])
    assert kl == pytest.approx(expected["kl"].mean().item(), rel=1e-4)
    assert loss == pytest.approx((token_loss(expected).mean() + KL_WEIGHT * TEMPERATURE**2 * kl).item(), rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_the_router_loss_is_added_to_ce_and_kl(tmp_path, packing):
    extra = dict(teacher_model=architecture("qwen3"), train_dataset=Dataset.from_list(FACTS))
    options = dict(packing=packing, max_length=64, router_aux_loss_coef=0.5, per_device_train_batch_size=6)
    run = trainer(tmp_path, architecture("mixtral"), extra, **OPTIONS, **options)
    run.current_gradient_accumulation_steps = 1  # as in training
    [batch] = run.get_train_dataloader()
    loss, ce, kl = losses_of(run, [batch])
    expected = terms(ONLY, [architecture("mixtral"), architecture("qwen3")])
    assert kl == pytest.approx(expected["kl"].mean().item(), rel=1e-4)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
    whole = architecture("mixtral").eval()(**inputs, use_cache=False, output_router_logits=True).aux_loss.item()
    assert loss == pytest.approx(ce + KL_WEIGHT * TEMPERATURE**2 * kl + 0.5 * whole, rel=1e-4)


MEMORY = {
    "checkpointing": dict(gradient_checkpointing=True),
    "re-entrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "torch_compile": dict(torch_compile=True, torch_compile_backend="eager"),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("packing", [False, True])
def test_what_saves_memory_or_time_changes_nothing(tmp_path, memory, packing):
    def run(**options):
        extra = dict(teacher_model=teacher(), train_dataset=Dataset.from_list(FACTS))
        settings = dict(packing=packing, max_length=64, max_steps=2, optim="sgd", **OPTIONS)
        return train(tmp_path, student(), extra, **settings, **options)

    plain, other = run(), run(**MEMORY[memory])
    assert_same_weights(other.accelerator.unwrap_model(other.model), plain.model, atol=1e-6)
    for row, expected in zip(logs(other)[:2], logs(plain)[:2], strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert logs(other)[0]["kl_loss"] > 0.1


JOINED = [dict(packing=True, max_length=64), dict(padding_free=True, max_length=None)]


LEAKING = {
    "mamba": MambaConfig(**TINY),  # carries a state over the border
    "opt": OPTConfig(**TINY, word_embed_proj_dim=16, ffn_dim=32, max_position_embeddings=64),  # masks padding only
    "falcon_h1": ARCHITECTURES["falcon_h1"],  # transformers refuses it itself, without a kernel
}


def leaking(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(LEAKING[name]), dtype=torch.float32)


@pytest.mark.parametrize("options", JOINED, ids=["packing", "padding_free"])
@pytest.mark.parametrize("side", ["model", "teacher_model"])
@pytest.mark.parametrize("name", LEAKING)
def test_a_model_in_which_joined_sequences_meet_is_refused(tmp_path, name, options, side):
    models = {"model": student(), "teacher_model": teacher()} | {side: leaking(name)}
    extra = dict(teacher_model=models["teacher_model"])
    with pytest.raises(ValueError, match=f"in the `{side}` .* (sees|told apart).*Set `packing=False`"):
        trainer(tmp_path, models["model"], extra, **options)
    assert logs(train(tmp_path, models["model"], extra, max_steps=1))[0]["kl_loss"] > 0


@pytest.mark.parametrize("name", ["mamba", "opt"])
def test_the_sequences_do_meet_in_what_is_refused(name):
    first, second = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[7, 8, 9]])
    model, positions = leaking(name).eval(), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with torch.no_grad():
        joined = model(input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        assert not torch.allclose(joined[:, 4:], model(input_ids=second).logits, atol=1e-3)


@pytest.mark.parametrize("options", JOINED, ids=["packing", "padding_free"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_before_joined_sequences_are_refused(tmp_path, options, kind):
    extra = dict(peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="join sequences in one row.*does not get the `position_ids`.*another kind"):
        trainer(tmp_path, student(), extra, **options)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one to offload from")
def test_offloading_without_an_accelerator_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`activation_offloading=True` .* no accelerator here.*gradient_checkpointing"
    ):
        trainer(tmp_path, student(), activation_offloading=True)
