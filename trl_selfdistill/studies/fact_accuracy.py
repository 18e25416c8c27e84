# SPDX-License-Identifier: Apache-2.0
"""What a model answers to questions, zero-shot and greedily, how that changes in training, and what is forgotten."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..files import read_jsonl, write_jsonl
from ..hallucination.answer_outcome import Outcome
from ..hallucination.metric import RATES, score_hallucinations
from ..slick.generation import answer_prompts
from ..slick.process_sharding import on_main_process
from ..slick.prompts import question_prompt
from ..trainers.hallucination_callback import accepted_answers, answers_in_training, log_beside_training


class FactAnswer(NamedTuple):
    """What a model answered, and whether that is `"correct"`, `"abstained"` or `"hallucinated"`."""

    outcome: Outcome
    text: str


class AccuracyRecord(NamedTuple):
    """
    One evaluation during a run.

    Args:
        step (`int`): Optimizer steps done.
        epoch (`float`): Epochs done.
        answers (`dict[str, dict[str, FactAnswer]]`): For each set of facts, `fact_id` -> what was answered.
        prompts (`str`, *optional*, defaults to `"zero-shot"`): How they were asked.
    """

    step: int
    epoch: float
    answers: dict[str, dict[str, FactAnswer]]
    prompts: str = "zero-shot"

    def accuracy(self, name: str) -> float:
        """Share of the facts of set `name` that were answered correctly, in [0, 1]."""
        return float(self.outcomes(name).mean())

    def outcomes(self, name: str, outcome: Outcome = "correct") -> np.ndarray:
        """Whether (1 or 0) each fact of set `name` had the outcome: shape `(num_facts,)`, in the order of the ids."""
        answers = self.answers[name]
        return np.array([answers[fact_id].outcome == outcome for fact_id in sorted(answers)], dtype=np.float64)


def forgetting(records: list[AccuracyRecord]) -> np.ndarray:
    """
    What a run forgot of each held-out fact: right (1) or wrong (0) at the run's peak accuracy, minus the same at its
    end (arXiv 2604.15574), of shape `(num_facts,)`, in the order of the facts' ids.

    The mean is peak minus final accuracy, which the choice of the best evaluation inflates in every run alike. To
    compare two runs, subtract these numbers fact by fact.
    """
    peak = max(records, key=lambda record: record.accuracy("heldout"))
    return peak.outcomes("heldout") - records[-1].outcomes("heldout")


def ask_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Dataset, **settings
) -> dict[str, FactAnswer]:
    """`fact_id` -> the answer without exemplars; `settings` are those of `answer_prompts`. A collective."""
    return judge_answers(facts, answer_prompts(model, tokenizer, _prompts(facts), **settings))


def _prompts(facts: Dataset) -> list[str]:
    return [question_prompt(question) for question in facts["question"]]


def judge_answers(facts: Dataset, answers: list[str]) -> dict[str, FactAnswer]:
    """The answers with the verdicts of the metric."""
    examples = score_hallucinations(answers, accepted_answers(facts, "facts"), detailed=True)["examples"]
    judged = [FactAnswer(example["outcome"], example["prediction"]) for example in examples]
    return dict(zip(facts["fact_id"], judged, strict=True))


@dataclass(eq=False)
class FactAccuracyCallback(TrainerCallback):
    """
    Asks sets of facts during training. It logs `eval_<set>_accuracy`, `eval_<set>_hallucination_rate` and
    `eval_<set>_abstention_rate`, and adds an [`AccuracyRecord`] to a JSONL file.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose model is evaluated. Add the callback to it.
        fact_sets (`dict[str, Dataset]`): Sets of facts by name.
        path (`Path`): File of the records. A resumed run drops those of the steps that it repeats, and makes up for
            one that is missing.
        eval_epochs (`int`, *optional*, defaults to `1`): Epochs from one evaluation to the next; 0: the end only.
        before (`bool`, *optional*, defaults to `True`):
            Whether to evaluate before the first step, if there is no record yet.
    """

    trainer: Trainer
    fact_sets: dict[str, Dataset]
    path: Path
    eval_epochs: int = 1
    before: bool = True

    def on_train_begin(self, args, state, control, **kwargs):
        last = on_main_process(lambda: self._drop_records_after(state.global_step))
        if state.global_step == 0:
            due = self.before and last is None
        else:  # killed between a checkpoint and the evaluation that followed it
            is_end = state.global_step >= state.max_steps
            due = last != state.global_step and (is_end or self._is_due(state.epoch))
        if due:
            self._ask(state)

    def _drop_records_after(self, step: int) -> int | None:
        """Drops the records of steps that are done again, and returns the step of the last that is left."""
        records = read_records(self.path) if self.path.is_file() else []
        records = [record for record in records if record.step <= step]
        write_records(self.path, records)
        return records[-1].step if records else None

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not in `on_train_end`: the reporters close their logs there
        if self._is_due(state.epoch) or control.should_training_stop:
            self._ask(state)

    def _is_due(self, epoch: float) -> bool:
        return self.eval_epochs > 0 and round(epoch, 6) % self.eval_epochs == 0

    def _ask(self, state) -> None:
        answers = {
            name: judge_answers(facts, answers_in_training(self.trainer, _prompts(facts)))
            for name, facts in self.fact_sets.items()
        }
        record = AccuracyRecord(state.global_step, round(state.epoch or 0.0, 6), answers)
        if state.is_world_process_zero:
            write_records(self.path, [*read_records(self.path), record])
        rates = {
            f"eval_{name}_{rate}": float(record.outcomes(name, outcome).mean())
            for name in answers
            for rate, outcome in RATES.items()
        }
        log_beside_training(self.trainer, rates)


def write_records(path: Path, records: list[AccuracyRecord]) -> None:
    """Writes records as JSON lines."""
    write_jsonl(path, [record._asdict() for record in records])


def read_records(path: Path) -> list[AccuracyRecord]:
    """Reads what [`write_records`] wrote."""
    records = []
    for record in read_jsonl(path):
        sets = record.pop("answers").items()
        answers = {name: {fact_id: FactAnswer(*answer) for fact_id, answer in rows.items()} for name, rows in sets}
        records.append(AccuracyRecord(**record, answers=answers))
    return records
