# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama that learns a table of facts in minutes, where a pre-trained model would take a CPU too long."""

import logging
import os
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler

from ..slick.likelihood import score_answers
from ..slick.prompts import answer_completion, few_shot_prompt, question_prompt
from .arguments import setting


logger = logging.getLogger(__name__)

_EOS, _PAD = "<|endoftext|>", "<|pad|>"
_MAX_SHOTS = 5  # SLiCK asks with four solved exemplars before the question


@dataclass(frozen=True)
class SmallLlamaSettings:
    """Size and training of the model, for `--model_name_or_path small_llama`."""

    _argument_group_name = "small Llama"  # the heading of these flags in a script's help

    hidden_size: int = setting(192, "Width of the small Llama, a multiple of 8.")
    num_layers: int = setting(3, "Its decoder layers.")
    vocab_size: int = setting(8000, "Tokens of its byte-level BPE, at least 258.")
    pretraining_learning_rate: float = setting(1e-3, "Peak learning rate of its training.")
    pretraining_batch_size: int = setting(8, "Documents of one to five questions in a step.")
    max_pretraining_epochs: int = setting(40, "Times that each fact is shown, at most.")
    target_accuracy: float = setting(0.97, "Share of the facts that must be answered; reaching it ends the training.")
    pretraining_seed: int = setting(0, "Seed of its weights and documents.")


def pretrain_small_llama(
    facts: Dataset, folder: str | os.PathLike, settings: SmallLlamaSettings, other_names: Iterable[str] = ()
) -> None:
    """
    Trains a tokenizer and a model on facts in this process alone, and writes both to `folder`. The tokenizer learns
    `other_names`, too: it would hardly have a token that the facts' names do not use, to make other keys of.

    Raises:
        ValueError: If the share of the facts that it answers zero-shot is below `target_accuracy` in the end.
    """
    pairs = zip(facts["question"], facts["answer"], strict=True)
    texts = [f"{question_prompt(question)}{answer_completion(answer)}\n" for question, answer in pairs]
    tokenizer = train_tokenizer([*texts, *sorted(f" {name}" for name in other_names)], settings.vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(settings.pretraining_seed)
        model = _make_model(tokenizer, settings).to(PartialState().device)
        accuracy = _train(model, tokenizer, facts, settings)
    if accuracy < settings.target_accuracy:
        raise ValueError(
            f"`max_pretraining_epochs={settings.max_pretraining_epochs}`: the small Llama answers {accuracy:.1%} of "
            f"{len(facts)} facts, `target_accuracy` is {settings.target_accuracy:.1%}. Raise the first."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that marks where words begin, as those of GPT-2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_EOS, _PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_PAD)


def _make_model(tokenizer: PreTrainedTokenizerFast, settings: SmallLlamaSettings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _train(model: LlamaForCausalLM, tokenizer, facts: Dataset, settings: SmallLlamaSettings) -> float:
    """Shows the facts until enough are known, or as often as the settings allow; the share that is known then."""
    generator = random.Random(settings.pretraining_seed)
    collate = DataCollatorForSeq2Seq(tokenizer, model=None)
    epochs = [_documents(facts, generator) for _ in range(settings.max_pretraining_epochs)]
    size = settings.pretraining_batch_size
    num_steps = sum(-(-len(documents) // size) for documents in epochs)
    optimizer = torch.optim.AdamW(model.parameters(), settings.pretraining_learning_rate, weight_decay=0.0)
    schedule = get_scheduler(
        "cosine_with_min_lr", optimizer, num_steps // 50, num_steps, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    prompts = [question_prompt(question) for question in facts["question"]]
    accepted = [[answer, *aliases] for answer, aliases in zip(facts["answer"], facts["aliases"], strict=True)]
    accuracy = 0.0
    for epoch, documents in enumerate(epochs, start=1):
        model.train()
        for begin in range(0, len(documents), size):
            batch = collate([_tokenized(pairs, tokenizer) for pairs in documents[begin : begin + size]])
            model(**batch.to(model.device)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        scores = score_answers(model, tokenizer, prompts, accepted, greedy_only=True, batch_size=256)
        accuracy = fmean(score.is_greedy for score in scores)
        logger.info(f"small Llama: {accuracy:.1%} of the facts after {epoch} epochs")
        if accuracy >= settings.target_accuracy:
            break
    return accuracy


def _documents(facts: Dataset, generator: random.Random) -> list[list[tuple[str, str]]]:
    """Questions and answers of each fact once, in documents of one to five of a relation, as few-shot prompts are."""
    by_relation = defaultdict(list)
    for fact in facts:
        by_relation[fact["relation"]].append((fact["question"], fact["answer"]))
    groups = []
    for pairs in by_relation.values():
        generator.shuffle(pairs)
        while pairs:
            size = generator.randint(1, _MAX_SHOTS)
            groups.append(pairs[:size])
            pairs = pairs[size:]
    generator.shuffle(groups)
    return groups


def _tokenized(pairs: list[tuple[str, str]], tokenizer) -> dict:
    """A document as a training row, in which answers and what ends them carry the labels."""
    input_ids, labels, text = [], [], ""
    for i, (question, answer) in enumerate(pairs):
        prompt = few_shot_prompt(question, pairs[:i])
        before, after = (tokenizer(part)["input_ids"] for part in (prompt[len(text) :], answer_completion(answer)))
        # The line break before a further question is what ends the answer above it
        labels += before[: i > 0] + [-100] * (len(before) - (i > 0)) + after
        input_ids += before + after
        text = prompt + answer_completion(answer)
    input_ids.append(tokenizer.eos_token_id)
    labels.append(tokenizer.eos_token_id)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": [1] * len(input_ids)}
