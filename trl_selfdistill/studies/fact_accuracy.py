# SPDX-License-Identifier: Apache-2.0
"""Which facts a model answers correctly, zero-shot and greedily, how that changes in training, and what is forgotten.

Greedy decoding needs no generation: an answer is what it gives if every one of its tokens, and the token that ends
it, is the argmax (see [`~trl_selfdistill.slick.likelihood.score_answers`]).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..files import read_jsonl, write_jsonl
from ..slick.likelihood import score_answers
from ..slick.process_sharding import map_in_parallel, on_main_process
from ..slick.prompts import question_prompt
from ..trainers.hallucination_callback import log_beside_training


_CHUNK_SIZE = 256  # facts that one process asks together, where there are several


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
        return float(self.outcomes(name).mean())

    def outcomes(self, name: str) -> np.ndarray:
        """Right (1) or wrong (0) for each fact of set `name`, of shape `(num_facts,)`, in the order of the ids."""
        correct = self.correct[name]
        return np.array([correct[fact_id] for fact_id in sorted(correct)], dtype=np.float64)


def forgetting(records: list[AccuracyRecord]) -> np.ndarray:
    """
    What a run forgot of each held-out fact: right (1) or wrong (0) at the run's peak accuracy, minus the same at its
    end (arXiv 2604.15574), of shape `(num_facts,)`, in the order of the facts' ids.

    The mean is peak minus final accuracy. Choosing the best of several noisy evaluations inflates it, in every run
    alike. To compare two runs, subtract these numbers fact by fact.
    """
    peak = max(records, key=lambda record: record.accuracy("heldout"))
    return peak.outcomes("heldout") - records[-1].outcomes("heldout")


def answered_correctly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Dataset,
    batch_size: int = 64,
    in_parallel: bool = False,
) -> dict[str, bool]:
    """
    Asks `model` every fact's question without exemplars.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to ask.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        facts (`Dataset`): The facts.
        batch_size (`int`, *optional*, defaults to `64`): Sequences in one forward pass.
        in_parallel (`bool`, *optional*, defaults to `False`): Whether each process of a distributed launch, with the
            whole model, asks a share. Then it is a collective, and all get the same result.

    Returns:
        `dict[str, bool]`: `fact_id` -> whether greedy decoding gives the answer or an alias of it, and ends there.
    """

    def ask(chunk: list[dict]) -> dict[str, bool]:
        prompts = [question_prompt(fact["question"]) for fact in chunk]
        accepted = [[fact["answer"], *fact["aliases"]] for fact in chunk]
        scores = score_answers(model, tokenizer, prompts, accepted, greedy_only=True, batch_size=batch_size)
        return {fact["fact_id"]: score.is_greedy for fact, score in zip(chunk, scores, strict=True)}

    # The chunks, and so the batches, do not depend on the number of processes
    rows = facts.to_list()
    chunks = [rows[begin : begin + _CHUNK_SIZE] for begin in range(0, len(rows), _CHUNK_SIZE)]
    correct = {}
    for outcomes in map_in_parallel(ask, chunks) if in_parallel else map(ask, chunks):
        correct |= outcomes
    return correct


class FactAccuracyCallback(TrainerCallback):
    """
    Asks sets of facts before the first step, at the ends of epochs and at the end, logs `eval_<set>_accuracy` to the
    trainer's reporters and adds an [`AccuracyRecord`] to a JSONL file.

    Under DDP each process asks a share of the facts. Where the weights are sharded (FSDP, DeepSpeed), every process
    asks all, as a forward pass is a collective there.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose model is evaluated. Add the callback to it.
        fact_sets (`dict[str, Dataset]`): Sets of facts by name.
        path (`Path`): File of the records. A run that starts without any evaluates before its first step. A resumed
            one drops those of the steps that it repeats, and makes up for one that is missing.
        eval_epochs (`int`, *optional*, defaults to `1`): Epochs from one evaluation to the next; 0: the end only.
    """

    def __init__(self, trainer: Trainer, fact_sets: dict[str, Dataset], path: Path, eval_epochs: int = 1):
        self.trainer = trainer
        self.fact_sets = fact_sets
        self.path = path
        self.eval_epochs = eval_epochs

    def on_train_begin(self, args, state, control, **kwargs):
        last = on_main_process(lambda: self._drop_records_after(state.global_step))
        if state.global_step == 0:
            due = last is None
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
        tokenizer = self.trainer.processing_class
        sharded = self.trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        # One autocast around all forward passes: each by itself would cast all of the weights anew
        with self.trainer.accelerator.autocast():
            correct = {
                name: answered_correctly(self.trainer.model, tokenizer, facts, in_parallel=not sharded)
                for name, facts in self.fact_sets.items()
            }
        record = AccuracyRecord(state.global_step, round(state.epoch or 0.0, 6), correct)
        if state.is_world_process_zero:
            write_records(self.path, [*read_records(self.path), record])
        log_beside_training(self.trainer, {f"eval_{name}_accuracy": record.accuracy(name) for name in correct})


def write_records(path: Path, records: list[AccuracyRecord]) -> None:
    """Writes a file of records, one JSON line each."""
    write_jsonl(path, [record._asdict() for record in records])


def read_records(path: Path) -> list[AccuracyRecord]:
    """Reads a file of records."""
    return [AccuracyRecord(**record) for record in read_jsonl(path)]
