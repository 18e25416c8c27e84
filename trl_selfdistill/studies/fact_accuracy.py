# SPDX-License-Identifier: Apache-2.0
"""Which facts a model answers correctly, zero-shot and greedily, and how that changes while it trains.

Greedy decoding needs no generation: an answer is what it gives if every one of its tokens, and the token that ends
it, is the argmax (see `answer_scoring`).
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..hallucination.exact_match import exact_match
from ..slick.generation import predict_answers
from ..slick.likelihood import score_answers
from ..slick.process_sharding import map_in_parallel, on_main_process
from ..slick.prompts import question_prompt
from ..trainers.callback_logging import log_beside_training


# Facts, in batches, that are asked together, by one of the processes where there are several
_CHUNK_BATCHES = 4


class AccuracyRecord(NamedTuple):
    """
    One evaluation during a run.

    Args:
        step (`int`): Optimizer steps done.
        epoch (`float`): Epochs done.
        correct (`dict[str, dict[str, bool]]`): For each set of facts, `fact_id` -> whether it was answered correctly.
    """

    step: int
    epoch: float
    correct: dict[str, dict[str, bool]]

    def accuracy(self, name: str) -> float:
        """Share of the facts of set `name` that were answered correctly, in [0, 1]."""
        outcomes = self.correct[name].values()
        return sum(outcomes) / len(outcomes)


def answered_correctly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Dataset,
    batch_size: int = 64,
    in_parallel: bool = False,
    progress: bool = False,
) -> dict[str, bool]:
    """
    Asks `model` every fact's question without exemplars.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to ask.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        facts (`Dataset`): The facts.
        batch_size (`int`, *optional*, defaults to `64`): Sequences in one forward pass.
        in_parallel (`bool`, *optional*, defaults to `False`):
            Whether each process of a distributed launch asks a share; all get the same result. Then it is a
            collective, and each process needs the whole model.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict[str, bool]`: `fact_id` -> whether greedy decoding gives the answer or an alias of it, and ends there.
    """

    def ask(chunk: Dataset) -> list[bool]:
        prompts = [question_prompt(question) for question in chunk["question"]]
        scores = score_answers(model, tokenizer, prompts, _accepted(chunk), greedy_only=True, batch_size=batch_size)
        return [score.is_greedy for score in scores]

    outcomes = _ask_in_chunks(ask, facts, batch_size, in_parallel, progress)
    return dict(zip(facts["fact_id"], outcomes, strict=True))


def _accepted(facts: Dataset) -> list[list[str]]:
    return [[answer, *aliases] for answer, aliases in zip(facts["answer"], facts["aliases"], strict=True)]


def _ask_in_chunks(ask: Callable, facts: Dataset, batch_size: int, in_parallel: bool, progress: bool) -> list:
    """What `ask` makes of the facts. The chunks, and so the batches, do not depend on the number of processes."""
    size = _CHUNK_BATCHES * batch_size
    chunks = [facts.select(range(begin, min(begin + size, len(facts)))) for begin in range(0, len(facts), size)]
    num_processes = PartialState().num_processes if in_parallel else 1
    hidden = not (progress and PartialState().is_main_process)
    results = []
    with tqdm(total=len(facts), desc="predict", unit="question", disable=hidden) as bar:
        for begin in range(0, len(chunks), num_processes):
            together = chunks[begin : begin + num_processes]
            for outcomes in map_in_parallel(ask, together) if in_parallel else map(ask, together):
                results.extend(outcomes)
                bar.update(len(outcomes))
    return results


def predict_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Dataset,
    *,
    method: Literal["generate", "score"] = "generate",
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> list[dict]:
    """
    Asks `model` every fact's question without exemplars, greedily. A collective: in a distributed launch each process,
    with the whole model, asks a share of the facts.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        facts (`Dataset`): Table of facts.
        method (`str`, *optional*, defaults to `"generate"`):
            `"generate"` writes the answers and judges them by
            [`~trl_selfdistill.hallucination.exact_match.exact_match`]; `"score"` is [`answered_correctly`]: several
            times as fast, without the text of wrong answers.
        batch_size (`int`, *optional*, defaults to `64`): Sequences in one forward pass.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer, in tokens.

    Returns:
        `list[dict]`: For each fact `fact_id`, `prediction` (`None` for `"score"`) and `correct`.
    """
    if method == "score":
        predictions = [None] * len(facts)
        outcomes = answered_correctly(model, tokenizer, facts, batch_size, in_parallel=True, progress=True).values()
    else:
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}

        def ask(chunk: Dataset) -> list[str]:
            prompts = [question_prompt(question) for question in chunk["question"]]
            return [answer for [answer] in predict_answers(model, tokenizer, prompts, **settings)]

        predictions = _ask_in_chunks(ask, facts, batch_size, in_parallel=True, progress=True)
        outcomes = [exact_match(*pair) for pair in zip(predictions, _accepted(facts), strict=True)]
    return [
        {"fact_id": fact_id, "prediction": prediction, "correct": correct}
        for fact_id, prediction, correct in zip(facts["fact_id"], predictions, outcomes, strict=True)
    ]


def accuracy_by_group(facts: Dataset, predictions: list[dict]) -> dict:
    """
    The share of right predictions overall, of each relation and, where the facts are annotated, of each SLiCK
    category: each as `{"accuracy": fraction in [0, 1], "num_facts": count}`.
    """
    outcomes = [prediction["correct"] for prediction in predictions]
    result = {"overall": _share(outcomes)}
    for column in ("relation", "slick_category"):
        if column in facts.column_names:
            groups = defaultdict(list)
            for group, correct in zip(facts[column], outcomes, strict=True):
                groups[group].append(correct)
            result[column] = {group: _share(correct) for group, correct in sorted(groups.items())}
    return result


def _share(outcomes: list[bool]) -> dict:
    return {"accuracy": sum(outcomes) / len(outcomes), "num_facts": len(outcomes)}


class FactAccuracyCallback(TrainerCallback):
    """
    Evaluates sets of facts before the first step and at the end of every epoch, logs `eval_<set>_accuracy` to the
    trainer's reporters and adds an [`AccuracyRecord`] to a JSONL file.

    Under DDP each process asks a share of the facts; where the weights are sharded (FSDP, DeepSpeed), every process
    asks all, as a forward pass is a collective there. The main process writes.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose model is evaluated. Add the callback to it with `trainer.add_callback`.
        fact_sets (`dict[str, Dataset]`):
            Sets of facts by name.
        path (`str` or `os.PathLike`):
            File of the records. A run that starts without any evaluates before its first step; a resumed one drops
            those of the steps that it does again, and makes up for the one that its checkpoint's step lacks.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompt-answer rows per forward pass.
        each_epoch (`bool`, *optional*, defaults to `True`):
            Whether to evaluate at the end of every epoch, or of the last one only.
    """

    def __init__(
        self,
        trainer: Trainer,
        fact_sets: dict[str, Dataset],
        path: str | os.PathLike,
        batch_size: int = 64,
        each_epoch: bool = True,
    ):
        self.trainer = trainer
        self.fact_sets = fact_sets
        self.path = Path(path)
        self.batch_size = batch_size
        self.each_epoch = each_epoch

    def on_train_begin(self, args, state, control, **kwargs):
        last = on_main_process(lambda: self._drop_records_after(state.global_step))
        if state.global_step == 0:
            due = last is None
        else:  # killed between a checkpoint and the evaluation that followed it
            is_end = state.global_step >= state.max_steps
            at_epoch_end = abs(state.epoch - round(state.epoch)) < 1e-6
            due = last != state.global_step and (is_end or (self.each_epoch and at_epoch_end))
        if due:
            self._evaluate(state)

    def _drop_records_after(self, step: int) -> int | None:
        """Drops the records of steps that are done again, and returns the step of the last that is left."""
        records = read_records(self.path) if self.path.is_file() else []
        records = [record for record in records if record.step <= step]
        write_records(self.path, records)
        return records[-1].step if records else None

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not in `on_train_end`: the reporters close their logs there
        if self.each_epoch or control.should_training_stop:
            self._evaluate(state)

    def _evaluate(self, state) -> None:
        tokenizer = self.trainer.processing_class
        sharded = self.trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        # One autocast around all forward passes: each by itself would cast all of the weights anew
        with self.trainer.accelerator.autocast():
            correct = {
                name: answered_correctly(
                    self.trainer.model, tokenizer, facts, self.batch_size, in_parallel=not sharded
                )
                for name, facts in self.fact_sets.items()
            }
        record = AccuracyRecord(state.global_step, round(state.epoch or 0.0, 6), correct)
        if state.is_world_process_zero:
            write_records(self.path, [*read_records(self.path), record])
        log_beside_training(self.trainer, {f"eval_{name}_accuracy": record.accuracy(name) for name in correct})


def write_records(path: str | os.PathLike, records: list[AccuracyRecord]) -> None:
    """Writes a file of records, one JSON line each, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    lines = (json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def read_records(path: str | os.PathLike) -> list[AccuracyRecord]:
    """Reads a file of records."""
    return [AccuracyRecord(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
