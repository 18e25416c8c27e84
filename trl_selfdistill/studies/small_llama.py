# SPDX-License-Identifier: Apache-2.0
"""A Llama of a few million parameters that knows a table of facts, trained from scratch in minutes.

It carries the experiments that need more training facts than a CPU can show a pre-trained model. It knows nothing but
these facts, and answers zero-shot and few-shot prompts alike.
"""

import logging
import math
import os
import random
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..slick.prompts import answer_completion, few_shot_prompt, question_prompt
from .fact_accuracy import answered_correctly


logger = logging.getLogger(__name__)

_EOS, _PAD = "<|endoftext|>", "<|pad|>"
_NUM_HEADS = 4
_MIN_VOCAB_SIZE = 256 + 2
_MAX_SHOTS = 5  # SLiCK asks with four solved exemplars before the question


@dataclass
class ModelKindArguments:
    """Whether to take a model that there is, or to train a small one on the facts first."""

    _argument_group_name = "kind of model"

    model_kind: str = field(
        default="pretrained",
        metadata={
            "help": "`pretrained`: the model of `model_name_or_path`; `small_llama`: a Llama of a few million "
            "parameters, trained from scratch on the facts first, for studies that a CPU could not make otherwise.",
            "choices": ["pretrained", "small_llama"],
        },
    )


@dataclass(frozen=True)
class SmallLlamaSettings:
    """
    Size and training of the model.

    Args:
        hidden_size (`int`, *optional*, defaults to `192`): Width.
        num_layers (`int`, *optional*, defaults to `3`): Decoder layers.
        vocab_size (`int`, *optional*, defaults to `8000`): Tokens of its byte-level BPE.
        pretraining_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak of a cosine that ends at a tenth of it.
        pretraining_batch_size (`int`, *optional*, defaults to `8`): Documents of one to five questions in a step.
        max_pretraining_epochs (`int`, *optional*, defaults to `40`): Times that each fact is shown, at most.
        target_accuracy (`float`, *optional*, defaults to `0.97`):
            Share of the facts, in [0, 1], that ends the training when it is answered zero-shot.
        pretraining_seed (`int`, *optional*, defaults to `0`): Of the weights and of the documents.
    """

    _argument_group_name = "small Llama"  # the heading of these flags in a script's help

    hidden_size: int = field(default=192, metadata={"help": "Width of the small Llama."})
    num_layers: int = field(default=3, metadata={"help": "Its decoder layers."})
    vocab_size: int = field(default=8000, metadata={"help": "Tokens of its byte-level BPE."})
    pretraining_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of its training."})
    pretraining_batch_size: int = field(default=8, metadata={"help": "Documents of one to five questions in a step."})
    max_pretraining_epochs: int = field(default=40, metadata={"help": "Times that each fact is shown, at most."})
    target_accuracy: float = field(
        default=0.97, metadata={"help": "Share of the facts whose answering ends the training, in [0, 1]."}
    )
    pretraining_seed: int = field(default=0, metadata={"help": "Seed of its weights and documents."})

    def __post_init__(self):
        for name in ("num_layers", "pretraining_batch_size", "max_pretraining_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size < 1 or self.hidden_size % (2 * _NUM_HEADS):
            raise ValueError(f"`hidden_size` must be a multiple of {2 * _NUM_HEADS}, got {self.hidden_size}.")
        if self.vocab_size < _MIN_VOCAB_SIZE:
            raise ValueError(
                f"`vocab_size` must be at least {_MIN_VOCAB_SIZE}, the bytes and two marks, got {self.vocab_size}."
            )
        if not 0 < self.pretraining_learning_rate < math.inf:
            raise ValueError(
                f"`pretraining_learning_rate` must be finite and above 0, got {self.pretraining_learning_rate}."
            )
        if not 0 <= self.pretraining_seed < 2**32:
            raise ValueError(f"`pretraining_seed` must be from 0 to 2**32 - 1, got {self.pretraining_seed}.")
        if not 0 <= self.target_accuracy <= 1:
            raise ValueError(f"`target_accuracy` is a share in [0, 1], got {self.target_accuracy}.")


def pretrain_in_one_process(*arguments) -> float:
    """
    [`pretrain_small_llama`], in a process of its own where this one is one of several: it trains alone, and a trainer
    would take the others into its run, or take this one out of theirs.
    """
    if PartialState().num_processes == 1:
        return pretrain_small_llama(*arguments)
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_leave_the_others) as pool:
        return pool.submit(pretrain_small_llama, *arguments).result()


def _leave_the_others() -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def pretrain_small_llama(
    facts: Dataset,
    folder: str | os.PathLike,
    settings: SmallLlamaSettings | None = None,
    other_names: Iterable[str] = (),
) -> float:
    """
    Trains a tokenizer and a model on facts, and writes both to `folder`.

    Args:
        facts (`Dataset`): The facts, with [`~trl_selfdistill.studies.facts.table.FACT_COLUMNS`].
        folder (`str` or `os.PathLike`): Where the model goes.
        settings ([`SmallLlamaSettings`], *optional*): Size and training.
        other_names (`Iterable[str]`, *optional*): Names that the tokenizer learns beside those of the facts. Without
            any, it would have hardly a token that the facts' names do not use, of which other keys could be made.

    Returns:
        `float`: The share of the facts that it answers zero-shot, in [0, 1].

    Raises:
        ValueError: If that share is below `target_accuracy` in the end.
    """
    settings = settings or SmallLlamaSettings()
    pairs = zip(facts["question"], facts["answer"], strict=True)
    texts = [f"{question_prompt(question)}{answer_completion(answer)}\n" for question, answer in pairs]
    tokenizer = train_tokenizer([*texts, *sorted(f" {name}" for name in other_names)], settings.vocab_size)
    model = _random_model(tokenizer, settings)
    accuracy = _train(model, tokenizer, facts, settings)
    if accuracy < settings.target_accuracy:
        raise ValueError(
            f"`max_pretraining_epochs={settings.max_pretraining_epochs}`: the small Llama answers {accuracy:.1%} of "
            f"{len(facts)} facts, `target_accuracy` is {settings.target_accuracy:.1%}. Raise "
            "`max_pretraining_epochs` or `hidden_size`, or give fewer facts."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy


def _train(model: LlamaForCausalLM, tokenizer, facts: Dataset, settings: SmallLlamaSettings) -> float:
    """Shows the facts until enough are known, or as often as the settings allow; the share that is known then."""
    stop = _StopWhenKnown(facts, tokenizer, settings)
    # For the documents, and what a trainer may write: without a model that knows enough, no folder of the user changes
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,  # the documents of all epochs are one dataset
            per_device_train_batch_size=settings.pretraining_batch_size,
            learning_rate=settings.pretraining_learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=0.02,
            weight_decay=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=settings.pretraining_seed,
        )
        documents = Dataset.from_generator(
            _documents,
            cache_dir=folder,  # that of the user keeps them for good, and does not see a change of `_documents`
            gen_kwargs={
                "facts": facts,
                "tokenizer": tokenizer,
                "num_epochs": settings.max_pretraining_epochs,
                "seed": settings.pretraining_seed,
            },
        )
        collator = DataCollatorForSeq2Seq(tokenizer, model=None)
        Trainer(model, arguments, train_dataset=documents, data_collator=collator, callbacks=[stop]).train()
    return stop.accuracy(model)


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


def _random_model(tokenizer: PreTrainedTokenizerFast, settings: SmallLlamaSettings) -> LlamaForCausalLM:
    set_seed(settings.pretraining_seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=_NUM_HEADS,
        num_key_value_heads=_NUM_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _documents(facts: Dataset, tokenizer, num_epochs: int, seed: int) -> Iterator[dict]:
    """
    Each fact `num_epochs` times, in documents of one to five questions of a relation, as few-shot prompts are. Answers
    and what ends them carry the labels. (The trainer draws from the documents of all epochs at once.)
    """
    generator = random.Random(seed)
    by_relation: dict[str, list[tuple[str, str]]] = {}
    for relation, question, answer in zip(facts["relation"], facts["question"], facts["answer"], strict=True):
        by_relation.setdefault(relation, []).append((question, answer))
    for _ in range(num_epochs):
        groups = []
        for pairs in by_relation.values():
            generator.shuffle(pairs)
            rest = [*pairs]
            while rest:
                size = generator.randint(1, _MAX_SHOTS)
                groups.append(rest[:size])
                rest = rest[size:]
        generator.shuffle(groups)
        yield from (_tokenized(group, tokenizer) for group in groups)


def _tokenized(pairs: list[tuple[str, str]], tokenizer) -> dict:
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


class _StopWhenKnown(TrainerCallback):
    """Asks the facts after each time that all have been shown, and ends the training once enough are known."""

    def __init__(self, facts: Dataset, tokenizer, settings: SmallLlamaSettings):
        self.facts, self.tokenizer, self.settings = facts, tokenizer, settings

    def accuracy(self, model) -> float:
        outcomes = answered_correctly(model, self.tokenizer, self.facts, batch_size=256).values()
        return sum(outcomes) / len(outcomes)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // self.settings.max_pretraining_epochs)
        if state.global_step % every == 0:
            accuracy = self.accuracy(model)
            logger.info(f"small Llama: {accuracy:.1%} of the facts after {state.global_step // every} epochs")
            control.should_training_stop = accuracy >= self.settings.target_accuracy
        return control
