# SPDX-License-Identifier: Apache-2.0
"""The runs of the mechanism study, and what was measured in them (see `conditions`)."""

import itertools
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from ...slick.prompts import answer_completion, question_prompt
from ...trainers import SelfDistillSFTConfig, SelfDistillSFTTrainer
from ..drift.probe import DriftProbeCallback
from ..drift.prompt_states import check_layers
from ..experiment import DRIFT_FILE, Experiment, ExperimentResult, run_experiment
from ..facts.geonames import known_place_names
from ..facts.table import load_facts
from ..models import load_model_and_tokenizer
from ..synthetic.facts import synthetic_facts
from ..training_stage import copy_config
from .conditions import Condition, MechanismArguments, condition_of_overlap, conditions_of
from .verdict import Finding, LossTable, judge_behaviour_cloning, judge_capacity, judge_interference


class MechanismInputs(NamedTuple):
    """
    What all runs share.

    Args:
        model (`str`): Folder of the model that has learnt the format, the start of every run and the teacher.
        annotated (`Path`): File of the annotated facts; those of the synthetic relation lend tokens and answers.
        mix (`Path`): Folder of the splits `known` and `heldout`.
        config ([`SelfDistillSFTConfig`]): The training of every run.
    """

    model: str
    annotated: Path
    mix: Path
    config: SelfDistillSFTConfig


class MechanismResults(NamedTuple):
    """
    What the study measured.

    Args:
        runs (`dict[Condition, list[ExperimentResult]]`): Of each condition, a result a seed.
        table ([`LossTable`]): What each condition lost, by its name.
        findings (`list[Finding]`): The three hypotheses.
    """

    runs: dict[Condition, list[ExperimentResult]]
    table: LossTable
    findings: list[Finding]


def run_mechanism_study(
    study: MechanismArguments,
    inputs: MechanismInputs,
    folder: Path,
) -> MechanismResults:
    """
    Makes all runs, each in a folder of its own, and judges the hypotheses.

    Args:
        study ([`MechanismArguments`]): What to compare.
        inputs ([`MechanismInputs`]): What all runs share.
        folder (`Path`): Where their folders go.

    Raises:
        ValueError: If the model knows no held-out fact of the synthetic relation, or too few tokens are at hand for so
            many keys.
    """
    if inputs.config.kl_weight == 0:
        raise ValueError("`kl_weight=0` leaves nothing of the self-distillation that is compared. Set it above 0.")
    heldout, known = (load_facts(inputs.mix / f"{name}.jsonl") for name in ("heldout", "known"))
    if len(heldout) < 2:
        raise ValueError("`num_heldout`: one held-out fact gives no interval. Raise it to 2 at least.")
    if study.synthetic_relation not in heldout["relation"]:
        raise ValueError(
            f"`synthetic_relation={study.synthetic_relation!r}`: no HighlyKnown fact of it is held out, so that "
            f"nothing could be seen to be forgotten; there are {sorted(set(heldout['relation']))}. Choose one of "
            "these, annotate more facts, or take a model that knows more."
        )
    _check_keys_and_layers(study, inputs)
    runs: dict[Condition, list[ExperimentResult]] = defaultdict(list)
    for seed in study.seeds:
        for condition in conditions_of(study):
            experiment = _experiment(condition, seed, study, inputs, folder, heldout, known)
            runs[condition].append(run_experiment(experiment))
    table = LossTable({condition.name: losses_of(results) for condition, results in runs.items()})
    return MechanismResults(dict(runs), table, judge(study, table, runs))


def losses_of(results: list[ExperimentResult], set_name: str = "heldout") -> np.ndarray:
    """Of each seed's run and each fact, right before minus right after it; shape `(num_seeds, num_facts)`."""
    losses = []
    for result in results:
        before, after = (record.correct[set_name] for record in (result.records[0], result.records[-1]))
        losses.append([float(before[fact]) - float(after[fact]) for fact in sorted(before)])
    return np.array(losses)


def new_learnt(results: list[ExperimentResult]) -> float | None:
    """Share of the synthetic facts asked that were answered at the end, a mean over seeds; `None` without any."""
    last = [result.records[-1] for result in results]
    return fmean(record.accuracy("new") for record in last) if "new" in last[0].correct else None


def judge(study: MechanismArguments, table: LossTable, runs: dict[Condition, list[ExperimentResult]]) -> list[Finding]:
    """Holds the three hypotheses to the losses of all runs."""
    sizes, middle = sorted(study.num_synthetic_facts), study.num_facts_of_overlap
    by_keys = {keys: [Condition(size, keys).name for size in sizes] for keys in ("recombined", "uuid")}
    foreign = [Condition(middle, keys) for keys in ("pseudo", "uuid")]
    without_overlap = {condition.label: condition.name for condition in foreign}
    overlaps = sorted(study.overlaps)
    shares = [condition_of_overlap(middle, overlap).name for overlap in overlaps]
    known_only, learnt = Condition(0).name, {run.name: new_learnt(results) for run, results in runs.items()}
    return [
        judge_capacity(table, sizes, by_keys["recombined"], by_keys["uuid"], learnt),
        judge_behaviour_cloning(table, known_only, Condition(middle).name, without_overlap, learnt),
        judge_interference(table, known_only, overlaps, shares, learnt),
    ]


def names_kept_apart(relation: str, inputs: MechanismInputs) -> set[str]:
    """
    Names that keys without overlap share no token with: subjects and answers of the facts that are trained on or held
    out, of all relations, and answers of the synthetic relation.
    """
    kept = [fact for name in ("heldout", "known") for fact in load_facts(inputs.mix / f"{name}.jsonl")]
    answers = {fact["answer"] for fact in load_facts(inputs.annotated) if fact["relation"] == relation}
    return answers.union(*((fact["subject"], fact["answer"]) for fact in kept))


def facts_of(condition: Condition, seed: int, study: MechanismArguments, inputs: MechanismInputs, tokenizer):
    """The synthetic facts of a condition, drawn while they are read."""
    return synthetic_facts(
        load_facts(inputs.annotated),
        study.synthetic_relation,
        condition.num_facts,
        tokenizer,
        keys=condition.keys,
        values=condition.values,
        overlap=condition.overlap,
        seed=seed,
        exclude=known_place_names() if study.synthetic_relation in ("P17", "P131") else (),
        apart_from=names_kept_apart(study.synthetic_relation, inputs),
    )


def _check_keys_and_layers(study: MechanismArguments, inputs: MechanismInputs) -> None:
    """Too few tokens for the number of keys, or a layer that is not there, is an error now, not after other runs."""
    model, tokenizer = load_model_and_tokenizer(inputs.model)
    try:
        check_layers(model, study.probe_layers)
    except ValueError as error:
        raise ValueError(f"`probe_layers={study.probe_layers}`: {error}") from error
    most: dict[tuple, Condition] = {}
    for condition in sorted(conditions_of(study), key=lambda condition: condition.num_facts):
        if condition.num_facts:
            most[condition.keys, condition.overlap] = condition
    for condition, seed in itertools.product(most.values(), study.seeds):
        try:
            facts_of(condition, seed, study, inputs, tokenizer)
        except ValueError as error:
            raise ValueError(
                f"{condition.num_facts:,} facts with {condition.label} (`num_synthetic_facts`, "
                f"`num_facts_of_overlap`), seed {seed}: {error}"
            ) from error


def _experiment(condition, seed, study, inputs, folder, heldout, known) -> Experiment:
    middle = study.num_facts_of_overlap
    steps = _num_steps(len(known) + (condition.num_facts or middle), inputs.config)
    changes = {"seed": seed, "max_steps": steps}
    config_class, trainer_class = SFTConfig, SFTTrainer
    if condition.self_distillation:
        config_class, trainer_class = SelfDistillSFTConfig, SelfDistillSFTTrainer

    def data(folder: Path) -> tuple[Dataset, dict[str, Dataset]]:
        rows, fact_sets = [_with_prompts(known)], {"heldout": heldout, "known": known}
        if condition.num_facts:
            _, tokenizer = load_model_and_tokenizer(inputs.model)
            stream = facts_of(condition, seed, study, inputs, tokenizer)
            # Rows go to a file as they are drawn, and are read from there: none of them stays in memory
            drawn = Dataset.from_generator(_rows, cache_dir=str(folder / "_rows"), gen_kwargs={"stream": stream})
            rows.append(_with_prompts(drawn))
            fact_sets["new"] = Dataset.from_list(list(stream.take(study.max_asked_new_facts)))
        else:  # an epoch as long as that of the runs that it is compared with
            rows = [rows[0].select([i % len(known) for i in range(len(known) + middle)])]
        return concatenate_datasets(rows), fact_sets

    def callbacks(trainer, partial: Path) -> list:
        if not condition.probe:
            return []
        probed = heldout.select(range(min(study.max_probed_facts, len(heldout))))
        options = {"every_steps": study.probe_steps, "output_file": partial / DRIFT_FILE, "attention": True}
        return [DriftProbeCallback(trainer, probed, layers=study.probe_layers, **options)]

    about = {"condition": condition._asdict(), "relation": study.synthetic_relation, "seed": seed}
    about |= {"probe_steps": study.probe_steps, "max_probed_facts": study.max_probed_facts} if condition.probe else {}
    about |= {"probe_layers": study.probe_layers} if condition.probe and study.probe_layers else {}
    if not condition.num_facts:
        about["num_rows"] = len(known) + middle
    about["max_asked_new_facts"] = study.max_asked_new_facts
    if condition.num_facts and condition.keys in ("pseudo", "overlap"):
        about["keys_apart_from"] = "heldout, known, answers"  # which keys they are depends on it
    return Experiment(
        folder=folder / f"{condition.name}-seed{seed}",
        trainer_class=trainer_class,
        config=copy_config(config_class, inputs.config, **changes),
        model=inputs.model,
        data=data,
        inputs=(inputs.mix, inputs.annotated),
        about=about,
        callbacks=callbacks,
        each_epoch=study.ask_each_epoch,
    )


def _num_steps(num_rows: int, config) -> int:
    """The steps of the configured epochs over `num_rows`; the run on Known facts alone makes as many as its rivals."""
    rows_of_step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    return max(1, round(config.num_train_epochs * -(-num_rows // rows_of_step)))


def _rows(stream):
    yield from stream


def _with_prompts(facts: Dataset) -> Dataset:
    """Columns `prompt` and `completion` of facts."""
    return facts.map(
        lambda fact: {"prompt": question_prompt(fact["question"]), "completion": answer_completion(fact["answer"])},
        remove_columns=facts.column_names,
    )
