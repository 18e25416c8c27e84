# SPDX-License-Identifier: Apache-2.0
"""Runs the methods of `rival_methods` over seeds, and collects what each kept and learnt."""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig

from ...slick.prompts import question_prompt
from ...trainers import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer, SelfDistillSFTConfig, SelfDistillSFTTrainer
from ..experiment import Experiment, run_experiment
from ..fact_accuracy import AccuracyRecord
from ..facts.table import fold_name, load_facts
from ..training_mix import load_mix
from ..training_stage import copy_config
from .pareto import MethodOutcome
from .rival_methods import ComparisonArguments, Method, methods_of
from .weight_interpolation import interpolation_stage


_CONFIGS = {SelfDistillSFTTrainer: SelfDistillSFTConfig, FrozenGroupsSFTTrainer: FrozenGroupsSFTConfig}
EARLY_STOPPING = "SFT, stopped early"
SFT_MODEL = "model"  # in the folder of an SFT run: the model that it ends with, for WiSE-FT


class ComparisonInputs(NamedTuple):
    """
    What all runs share.

    Args:
        model (`str`): Folder of the model that has learnt the format, the start of every run.
        mix (`Path`): Folder of the splits `known`, `new` and `heldout`.
        annotated (`Path`): The facts that they were chosen from; the others lend their prompts to rehearsal.
        config ([`SelfDistillSFTConfig`]): The training of every run.
    """

    model: str
    mix: Path
    annotated: Path
    config: SelfDistillSFTConfig


def compare_methods(args: ComparisonArguments, inputs: ComparisonInputs, folder: Path) -> list[MethodOutcome]:
    """
    Makes all runs, each in a folder of its own, and returns what each method did; plain SFT is the first.

    Of the held-out facts, one half chooses where to stop early; every method is judged by the other half.
    """
    facts, methods = _fact_sets(inputs.mix), methods_of(args)
    rehearsal = None
    if any(method.rehearses for method in methods):
        rehearsal = rehearsal_prompts(load_facts(inputs.annotated), facts, args.num_rehearsal)
    # All before the first run, so that a setting that cannot be is an error at once
    experiments = [
        [_experiment(method, seed, args, inputs, folder, facts, rehearsal) for seed in args.seeds]
        for method in methods
    ]
    outcomes, start = [], None
    for method, runs in zip(methods, experiments, strict=True):
        results = [run_experiment(run) for run in runs]
        last = [result.records[-1] for result in results]
        outcomes.append(_outcome(method.label, last, method.family))
        if method.name == "sft":
            start = [result.records[0] for result in results]
            outcomes.append(_outcome(EARLY_STOPPING, [best_epoch(result.records) for result in results]))
            mixed = [_wise_ft(folder, seed, args, inputs, facts) for seed in args.seeds]
            for i, weight in enumerate(args.mixing_weights):
                outcomes.append(_outcome(f"WiSE-FT, {weight:g} of SFT", [records[i] for records in mixed]))
    return [_outcome("before", start), *outcomes]


def _wise_ft(
    folder: Path, seed: int, args: ComparisonArguments, inputs: ComparisonInputs, facts: dict[str, Dataset]
) -> list[AccuracyRecord]:
    run = folder / f"sft-seed{seed}"
    return interpolation_stage(
        inputs.model,
        run / SFT_MODEL,
        args.mixing_weights,
        facts,
        (run, inputs.mix),
        folder / f"wise_ft-seed{seed}",
        inputs.config.bf16,
    )


def best_epoch(records: list[AccuracyRecord]) -> AccuracyRecord:
    """
    The record with the highest accuracy on the validation facts, of those at which the new facts have been trained on
    for an epoch at least; the earliest of equals.
    """
    return max(records[1:], key=lambda record: record.accuracy("validation"))


def _fact_sets(mix: Path) -> dict[str, Dataset]:
    splits = load_mix(mix)
    heldout = splits["heldout"]
    if len(heldout) < 4:
        raise ValueError(f"`num_heldout`: {len(heldout)} held-out facts make no halves of two or more. Raise it.")
    if len(splits["new"]) < 2:
        raise ValueError("`num_new`: one new fact gives no interval. Raise it to 2 at least.")
    halves = [heldout.select(range(first, len(heldout), 2)) for first in (0, 1)]
    return {"heldout": halves[0], "validation": halves[1], "known": splits["known"], "new": splits["new"]}


def rehearsal_prompts(annotated: Dataset, splits: dict[str, Dataset], number: int) -> Dataset:
    """
    Prompts of facts that are in no split, of the splits' relations, drawn at random but always the same. Whether the
    model knows them is not looked at, nor are their answers.

    Args:
        annotated (`Dataset`): The facts to draw from.
        splits (`dict[str, Dataset]`): The splits, whose subjects are left out.
        number (`int`): How many.

    Raises:
        ValueError: If there are fewer.
    """
    used = {fold_name(subject) for split in splits.values() for subject in split["subject"]}
    relations = {relation for split in splits.values() for relation in split["relation"]}
    pairs = zip(annotated["subject"], annotated["relation"], strict=True)
    free = [i for i, (name, relation) in enumerate(pairs) if relation in relations and fold_name(name) not in used]
    if len(free) < number:
        raise ValueError(
            f"`num_rehearsal={number}`, but only {len(free)} facts are in no split. Lower it, or take more facts."
        )
    chosen = annotated.select(random.Random(0).sample(free, number))
    return Dataset.from_dict({"prompt": [question_prompt(question) for question in chosen["question"]]})


def _experiment(
    method: Method,
    seed: int,
    args: ComparisonArguments,
    inputs: ComparisonInputs,
    folder: Path,
    facts: dict[str, Dataset],
    rehearsal: Dataset | None,
) -> Experiment:
    known, new = (facts[name].select_columns(["prompt", "completion"]) for name in ("known", "new"))
    config = inputs.config
    rows_of_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = max(1, round(config.num_train_epochs * -(-(len(known) + len(new)) // rows_of_step)))
    groups = {"frozen_groups": None, "trainable_groups": None}
    changes = {"seed": seed, "max_steps": steps} | (groups if method.trainer_class in _CONFIGS else {}) | method.config

    def data(folder: Path) -> tuple[Dataset, dict[str, Dataset]]:
        return method.rows(known, new, steps * rows_of_step, random.Random(seed)), facts

    def prepare(trainer: Trainer, partial: Path) -> list:
        if method.prepare is not None:
            method.prepare(trainer)
        return []

    is_sft = method.name == "sft"
    return Experiment(
        folder=folder / f"{method.name}-seed{seed}",
        trainer_class=method.trainer_class,
        config=copy_config(_CONFIGS.get(method.trainer_class, SFTConfig), config, **changes),
        model=inputs.model,
        data=data,
        inputs=(inputs.mix, inputs.annotated) if method.rehearses else (inputs.mix,),
        about={"method": method.name, "label": method.label, "seed": seed, **method.about},
        trainer_arguments=method.trainer_arguments | ({"rehearsal_dataset": rehearsal} if method.rehearses else {}),
        callbacks=prepare,
        finish=(lambda trainer, partial: trainer.save_model(str(partial / SFT_MODEL))) if is_sft else None,
        each_epoch=is_sft,  # the best of its epochs is a method by itself
    )


def _outcome(label: str, records: list[AccuracyRecord], family: str = "") -> MethodOutcome:
    old, new = (
        np.array([[record.correct[name][fact] for fact in sorted(record.correct[name])] for record in records], float)
        for name in ("heldout", "new")
    )
    return MethodOutcome(label, old, new, family)
