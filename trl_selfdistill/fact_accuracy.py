# SPDX-License-Identifier: Apache-2.0
"""Which facts a model answers correctly, zero-shot and greedily, and how that changes while it trains.

Greedy decoding needs no generation: an answer is what it gives if every one of its tokens, and the token that ends
it, is the argmax (see `answer_scoring`).
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from .answer_scoring import score_answers
from .exact_match import exact_match
from .generation import evaluation_mode, predict_answers
from .prompts import question_prompt


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Dataset, batch_size: int = 64
) -> dict[str, bool]:
    """
    Asks `model` every fact's question without exemplars.

    Returns:
        `dict[str, bool]`: `fact_id` -> whether greedy decoding gives the answer or an alias of it, and ends there.
    """
    scores = score_answers(
        model,
        tokenizer,
        [question_prompt(question) for question in facts["question"]],
        [[answer, *aliases] for answer, aliases in zip(facts["answer"], facts["aliases"], strict=True)],
        greedy_only=True,
        batch_size=batch_size,
    )
    return {fact_id: score.is_greedy for fact_id, score in zip(facts["fact_id"], scores, strict=True)}


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
    Asks `model` every fact's question without exemplars, greedily.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        facts (`Dataset`): Table of facts.
        method (`str`, *optional*, defaults to `"generate"`):
            `"generate"` writes the answers and judges them by [`~trl_selfdistill.exact_match.exact_match`]; `"score"`
            is [`answered_correctly`]: several times as fast, without the text of wrong answers.
        batch_size (`int`, *optional*, defaults to `64`): Sequences in one forward pass.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer, in tokens.

    Returns:
        `list[dict]`: For each fact `fact_id`, `prediction` (`None` for `"score"`) and `correct`.
    """
    if method == "score":
        outcomes = answered_correctly(model, tokenizer, facts, batch_size).values()
        predictions = [None] * len(facts)
    else:
        prompts = [question_prompt(question) for question in facts["question"]]
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": True}
        predictions = [answer for [answer] in predict_answers(model, tokenizer, prompts, **settings)]
        accepted = ([answer, *aliases] for answer, aliases in zip(facts["answer"], facts["aliases"], strict=True))
        outcomes = [exact_match(*pair) for pair in zip(predictions, accepted, strict=True)]
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
    Evaluates sets of facts at the end of every epoch, logs `eval_<set>_accuracy` to the trainer's reporters and adds
    an [`AccuracyRecord`] to a JSONL file.

    Under a distributed launch every process evaluates (a sharded model's forward is a collective); the main one
    writes.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose model is evaluated. Add the callback to it with `trainer.add_callback`.
        fact_sets (`dict[str, Dataset]`):
            Sets of facts by name.
        path (`str` or `os.PathLike`):
            File of the records. A run that starts without any evaluates before its first step; a resumed one drops
            those of the steps that it does again.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompt-answer rows per forward pass.
    """

    def __init__(self, trainer: Trainer, fact_sets: dict[str, Dataset], path: str | os.PathLike, batch_size: int = 64):
        self.trainer = trainer
        self.fact_sets = fact_sets
        self.path = Path(path)
        self.batch_size = batch_size

    def on_train_begin(self, args, state, control, **kwargs):
        records = read_records(self.path) if self.path.is_file() else []
        records = [record for record in records if record.step <= state.global_step]
        if state.is_world_process_zero:
            write_records(self.path, records)
        # A resumed run has its first evaluation on file, and a checkpoint's step need not be the end of an epoch
        if state.global_step == 0 and not records:
            self._evaluate(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._evaluate(state)

    def _evaluate(self, state) -> None:
        tokenizer = self.trainer.processing_class
        # One autocast around all forward passes: each by itself would cast all of the weights anew
        with self.trainer.accelerator.autocast():
            correct = {
                name: answered_correctly(self.trainer.model, tokenizer, facts, self.batch_size)
                for name, facts in self.fact_sets.items()
            }
        record = AccuracyRecord(state.global_step, round(state.epoch or 0.0, 6), correct)
        if state.is_world_process_zero:
            write_records(self.path, [*read_records(self.path), record])
        # In evaluation mode the SFT trainers' `log` leaves the pending training metrics alone
        with evaluation_mode(self.trainer.model):
            self.trainer.log({f"eval_{name}_accuracy": record.accuracy(name) for name in correct})


def write_records(path: str | os.PathLike, records: list[AccuracyRecord]) -> None:
    """Writes a file of records, one JSON line each, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    lines = (json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records)
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def read_records(path: str | os.PathLike) -> list[AccuracyRecord]:
    """Reads a file of records."""
    return [AccuracyRecord(**json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
