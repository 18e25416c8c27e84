# SPDX-License-Identifier: Apache-2.0
"""Prompts or texts without labels on which the student stays near its start (pseudo-rehearsal, Robins 1995)."""

import glob
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..hallucination.exact_match import as_seen
from ..losses import IGNORE_INDEX
from ..slick.generation import eos_ids, evaluation_mode, forked, generate_tokens
from ..slick.process_sharding import map_in_parallel
from ..slick.prompt_tokens import text_tokenizer, tokenize_prompts
from .resume import describe_dataset
from .self_distill_sft_config import SelfDistillSFTConfig
from .sft_internals import prepare_rows, without_unused_columns


logger = logging.get_logger(__name__)

_COLUMNS = ("prompt", "messages", "text")
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_STEPS, _BATCH_SIZE = 32, 64  # for which the teacher writes texts, and how many of them at once


class Anchors:
    """
    An endless sequence of rows with labels where the KL is taken: those of a tokenized `dataset` again and again, or
    texts that the trainer's teacher samples. A step takes its rows by their positions, so that a run that is resumed,
    or split otherwise over micro-batches and processes, takes the same ones; fewer in an epoch's incomplete last step.
    """

    def __init__(self, trainer, dataset: Dataset | None = None):
        args = trainer.args
        self.dataset, self._trainer, self._written = dataset, trainer, None
        self._steps = _STEPS * args.gradient_accumulation_steps * args.world_size  # writing is a collective
        self._tokenizer = tokenizer = text_tokenizer(trainer.processing_class)
        self._begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if dataset is None and self._begin is None:
            raise ValueError("`anchors='self'`: the tokenizer has no token to begin a text with. Set its `bos_token`.")

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self.dataset is not None:
            return self.dataset[position % len(self.dataset)]
        size = self._steps * (self._trainer.state.train_batch_size or self._trainer.args.train_batch_size)
        part = position // size, size, self._trainer.teacher.sha256  # a snapshot writes other texts
        if part != self._written:
            self._written, self._texts = part, self._write(part[0], size)
        return self._texts[position % size]

    def _write(self, part: int, size: int) -> list[dict[str, list[int]]]:
        """Samples texts without a prompt at temperature 1 from all tokens (arXiv 2605.26097). A collective."""
        trainer, args, accelerator = self._trainer, self._trainer.args, self._trainer.accelerator
        most = min(args.anchor_max_new_tokens, (args.max_length or args.anchor_max_new_tokens + 1) - 1)

        def write(first: int) -> list[list[int]]:
            torch.manual_seed(random.Random(f"{args.seed}/{part}/{first}").getrandbits(32))
            prompts = [[self._begin]] * min(_BATCH_SIZE, size - first)
            return generate_tokens(model, prompts, config)

        teacher = trainer.teacher.as_model(trainer.model_wrapped)
        with teacher as model, evaluation_mode(model), accelerator.autocast(), forked(accelerator.device):
            model = accelerator.unwrap_model(model)
            ends = eos_ids(model, self._tokenizer)
            config = GenerationConfig(eos_token_id=ends, max_new_tokens=most, do_sample=True, top_k=0)
            written = chain.from_iterable(map_in_parallel(write, range(0, size, _BATCH_SIZE)))
        return [{"input_ids": [self._begin, *ids], "labels": [self._begin, *ids]} for ids in written]


def draw_anchors(trainer, batches: list[dict[str, Any]]) -> None:
    """
    Puts anchors beside the rows of each micro-batch of a step, as many as rows fit: `batch["anchors"]` holds the
    inputs of a forward and the number of tokens that the anchors of the step predict, over all processes.
    """
    args, accelerator, tp_size = trainer.args, trainer.accelerator, trainer.get_tp_size()
    process, num_processes = accelerator.process_index // tp_size, accelerator.num_processes // tp_size
    batch_size = trainer.state.train_batch_size  # `auto_find_batch_size` lowers it
    drawn, num_tokens = [], torch.tensor(0)
    for number, _ in enumerate(batches, start=trainer.state.global_step * args.gradient_accumulation_steps):
        first = (number * num_processes + process) * batch_size  # as rows go to processes: batch by batch
        drawn.append(trainer.data_collator([trainer.anchors[first + i] for i in range(batch_size)]))
        num_tokens += (drawn[-1]["labels"][:, 1:] != IGNORE_INDEX).sum()
    num_tokens = accelerator.gather(num_tokens.to(accelerator.device)).sum() // tp_size
    for batch, inputs in zip(batches, drawn, strict=True):
        batch["anchors"] = (inputs, num_tokens)


def load_anchors(args: SelfDistillSFTConfig, anchor_dataset: Dataset | None) -> Dataset | None:
    """The `anchor_dataset`, given or named. A `ValueError` if `anchors` takes not as many, or it cannot be read."""
    name, is_needed = args.anchor_dataset_name, args.anchors in ("own_answers", "kl")
    num_given = (anchor_dataset is not None) + (name is not None)
    if num_given != is_needed:
        which = f"{'one' if is_needed else 'none'} of `anchor_dataset` and `anchor_dataset_name`"
        raise ValueError(f"`anchors={args.anchors!r}` takes {which}, got {num_given}.")
    if name is None:
        return anchor_dataset
    file_format = _FORMATS.get(Path(name).suffix.lower())
    options = {} if file_format is None else {"data_files": [glob.escape(name)]}
    options |= {"keep_default_na": False} if file_format == "csv" else {}  # "NA" is a text
    try:
        return load_dataset(file_format or name, split="train", **options)
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        kinds = f"no {', '.join(_FORMATS)} file or dataset with rows"
        raise ValueError(f"`anchor_dataset_name={name!r}` is {kinds}: {error.__cause__ or error!r}") from error


def prepare_anchors(trainer, dataset: Dataset | None, evaluated: Any) -> dict[str, Any] | None:
    """
    Sets `trainer.anchors`, or adds own answers to its data. Returns what a resumed run must have in common, as JSON
    values. A collective. A `ValueError` if prompts or training data do not fit, or a prompt is one of `evaluated`, the
    trainer's `eval_dataset` as it was given.
    """
    args, rows = trainer.args, None
    if args.anchors is None:
        return None
    if {"image", "images"} & {*(trainer.train_dataset.column_names or ())}:
        raise ValueError(f"`anchors={args.anchors!r}` are texts, and `train_dataset` has images. Leave it unset.")
    if args.anchors == "own_answers":
        rows = _add_own_answers(trainer, _checked_prompts(trainer, dataset, evaluated)[0])
    elif args.anchors == "kl":
        _, rows = _checked_prompts(trainer, dataset, evaluated)
        trainer.anchors = Anchors(trainer, prepare_rows(trainer, rows).shuffle(seed=args.seed))
    else:
        trainer.anchors = Anchors(trainer)
    settings = {name: getattr(args, name) for name in ("anchors", "anchor_weight", "anchor_max_new_tokens")}
    settings["anchor_seed"] = args.seed  # which texts, and in which order
    return settings | {f"anchor_{name}": value for name, value in (describe_dataset(rows) or {}).items()}


def _question(prompt: str | list[dict]) -> str | list[dict]:
    """A prompt; of a conversation what comes before its last answer."""
    last = prompt[-1] if isinstance(prompt, list) and prompt else None
    return prompt[:-1] if isinstance(last, dict) and last.get("role") == "assistant" else prompt


def _compared(prompt: str | list[dict]) -> str:
    """What a prompt asks, a text or a conversation alike, without case and kinds of blanks and signs."""
    turns = [{"content": prompt}] if isinstance(prompt, str) else _question(prompt) or []
    text = " ".join(str(turn.get("content") or "") for turn in turns if turn.get("role") != "system")
    return " ".join(as_seen(text).casefold().split())


def _checked_prompts(trainer, dataset: Dataset, evaluated: Any) -> tuple[list, Dataset]:
    """The prompts of an anchor dataset, and rows with labels at each token of a `text`, or where an answer begins."""
    names = dataset.column_names if isinstance(dataset, Dataset) and len(dataset) else ()
    column = next((name for name in _COLUMNS if name in names), None)
    if column is None:
        raise ValueError(f"`anchor_dataset` must be a `Dataset` with rows and a column {_COLUMNS}, got {dataset}.")
    prompts, most, is_text = dataset[column][:], trainer.args.max_length, column == "text"

    def refuse(row: int, reason: str) -> None:
        raise ValueError(f"`anchor_dataset`, row {row}: `{column}` {reason}. Change it or leave the row out.")

    prompts = [*map(_question, prompts)]
    for row, prompt in enumerate(prompts, start=1):
        is_chat = isinstance(prompt, list) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)
        if not (is_chat or isinstance(prompt, str)) or not _compared(prompt):
            refuse(row, f"must be a text or a conversation that asks something, got {prompt!r}")
    token_ids = tokenize_prompts(trainer.processing_class, prompts)
    labels = token_ids
    if not is_text:  # whichever token is the answer's: the KL is between distributions of it
        labels = [[IGNORE_INDEX] * len(ids) + ids[-1:] for ids in token_ids]
        token_ids = [ids + ids[-1:] for ids in token_ids]
    which = "" if is_text else " with that of an answer"
    for row, ids in enumerate(token_ids, start=1):
        if not 2 <= len(ids) <= (most or len(ids)):
            refuse(row, f"has {len(ids)} tokens{which}, not 2 to `max_length={most}`")
    splits = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    known = [(split, name) for split in splits if isinstance(split, Dataset) for name in _COLUMNS]
    asked = {_compared(row) for split, name in known if name in split.column_names for row in split[name]}
    if shared := [row for row, prompt in enumerate(prompts, start=1) if _compared(prompt) in asked]:
        refuse(shared[0], f"is one of {len(shared)} that are in `eval_dataset`, too: {prompts[shared[0] - 1]!r}")
    return prompts, Dataset.from_dict({"input_ids": token_ids, "labels": labels})


def _add_own_answers(trainer, prompts: list) -> Dataset:
    """Adds the answers of the model to the prepared training data, and returns these rows."""
    features = trainer.train_dataset.features or {}
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        is_partitioned = True  # all processes but one hold empty weights
    if not isinstance(trainer.train_dataset, Dataset) or "input_ids" not in features or is_partitioned:
        raise ValueError(
            "`anchors='own_answers'` lets a whole model answer, and adds rows to a tokenized `train_dataset`. With "
            "streams, ZeRO-3 or FSDP's `cpu_ram_efficient_loading`, add what `own_answers` returns to your data."
        )
    most = trainer.args.anchor_max_new_tokens
    with trainer.accelerator.autocast():
        rows = own_answers(trainer.model, trainer.processing_class, prompts, max_new_tokens=most)
    rows = without_unused_columns(trainer, prepare_rows(trainer, rows))
    if "labels" not in features:  # as the collator would, which asks the first row whether there are some
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["input_ids"]})
        features = trainer.train_dataset.features
    rows = rows.select_columns([name for name in rows.column_names if name in features])
    rows = rows.cast(Features({name: features[name] for name in rows.column_names}))
    trainer.train_dataset = concatenate_datasets([trainer.train_dataset, rows])
    return rows


def own_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[dict]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> Dataset:
    """
    What a model answers to prompts, greedily, as rows to concatenate with a prompt-completion dataset: texts, or
    messages for conversations, which [`~trl.SFTTrainer`] tokenizes and ends like the other rows.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, whose generation config says what ends an answer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, or its processor.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts or conversations, in the form of the training data.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer, in tokens. Longer ones are left out.
        batch_size (`int`, *optional*, defaults to `8`): Prompts that are answered at once.

    Returns:
        `Dataset` with the columns `prompt` and `completion`, in the order of `prompts`, without answers that are empty
        or have no end. A `ValueError` if none is left.
    """
    token_ids = tokenize_prompts(tokenizer, prompts)
    tokenizer = text_tokenizer(tokenizer)
    config = GenerationConfig(eos_token_id=eos_ids(model, tokenizer), max_new_tokens=max_new_tokens, do_sample=False)

    def answer(start: int) -> list[str]:
        asked, answers = token_ids[start : start + batch_size], []
        for prompt, ids in zip(asked, generate_tokens(model, asked, config), strict=True):
            last = prompt[-1:]  # before an answer, as some decoders drop the first blank of a text
            pair = [last, last + (ids[:-1] if ids[-1] in config.eos_token_id else [])]
            before, text = tokenizer.batch_decode(pair, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            answers.append(text[len(before) :])
        return answers

    with evaluation_mode(model):
        answers = chain.from_iterable(map_in_parallel(answer, range(0, len(prompts), batch_size)))
    rows = [
        {"prompt": prompt, "completion": text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]}
        for prompt, text in zip(prompts, answers, strict=True)
        if text.strip()
    ]
    if len(rows) < len(prompts):
        left_out = f"{len(prompts) - len(rows)} of the model's {len(prompts)} answers are empty or have no end within "
        left_out += f"`max_new_tokens={max_new_tokens}` and left out. Raise it or use a format that the model can end."
        if not rows:
            raise ValueError(left_out)
        logger.warning(left_out)
    return Dataset.from_list(rows)
