# SPDX-License-Identifier: Apache-2.0
"""The runs of the mechanism study, and what was measured in them (see `variants`)."""

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import Trainer
from trl import SFTTrainer

from ...hallucination.intervals import Interval, mean_interval
from ...slick.prompts import answer_completion, question_prompt
from ...trainers import SelfDistillSFTTrainer
from ..drift.probe import DriftProbeCallback
from ..drift.prompt_states import check_layers
from ..facts.geonames import known_place_names
from ..facts.table import read_facts
from ..results import DRIFT_FILE, VariantResult
from ..runs import RunFacts, StudySetup, Variant, steps_of_epochs, train_variant
from ..synthetic.facts import synthetic_facts
from ..training_mix import load_mix
from .variants import MechanismArguments, MechanismVariant, mechanism_variants
from .verdict import Finding, Losses, judge_behaviour_cloning, judge_capacity, judge_interference


MAX_ASKED = 500  # of the synthetic facts of a run


class MechanismResults(NamedTuple):
    """The result of each run, a list over seeds for each variant; what each variant lost; and the three findings."""

    runs: dict[MechanismVariant, list[VariantResult]]
    losses: Losses
    findings: list[Finding]

    def lost(self, variant: MechanismVariant) -> Interval:
        """Held-out accuracy before minus after the runs of a variant."""
        return mean_interval(self.losses[variant.name])


def run_mechanism_study(study: MechanismArguments, setup: StudySetup, folder: Path) -> MechanismResults:
    """
    Makes all runs, each in a folder of its own below `folder`, and judges the hypotheses.

    Raises:
        ValueError: If the model knows no held-out fact of the synthetic relation, or too few tokens are at hand for so
            many keys; before the first run.
    """
    heldout = load_mix(setup.mix)["heldout"]
    if study.synthetic_relation not in heldout["relation"]:
        raise ValueError(
            f"`synthetic_relation={study.synthetic_relation!r}`: no HighlyKnown fact of it is held out. Choose one of "
            f"{sorted(set(heldout['relation']))}, annotate more facts, or take a model that knows more."
        )
    variants = mechanism_variants(study)
    model, tokenizer = setup.load()
    check_layers(model, study.probe_layers)
    for variant in variants:
        if variant.num_facts:
            _facts_of(variant, study.seeds[0], study, setup, tokenizer)  # nothing is drawn yet
    runs: dict[MechanismVariant, list[VariantResult]] = defaultdict(list)
    for seed in study.seeds:
        for variant in variants:
            runs[variant].append(_run(variant, seed, study, setup, folder))
    return results_of(study, dict(runs))


def results_of(study: MechanismArguments, runs: dict[MechanismVariant, list[VariantResult]]) -> MechanismResults:
    """What all runs lost, and the three hypotheses held to it."""
    losses = {}
    for variant, results in runs.items():
        seeds = [(result.records[0].outcomes("heldout"), result.records[-1].outcomes("heldout")) for result in results]
        losses[variant.name] = np.stack([before - after for before, after in seeds])
    findings = [
        judge_capacity(losses, study, {variant.name: new_learnt(results) for variant, results in runs.items()}),
        judge_behaviour_cloning(losses, study),
        judge_interference(losses, study),
    ]
    return MechanismResults(runs, losses, findings)


def new_learnt(results: list[VariantResult]) -> float | None:
    """Share of the synthetic facts asked that were answered at the end, a mean over seeds; `None` without any."""
    last = [result.records[-1] for result in results]
    return fmean(record.accuracy("new") for record in last) if "new" in last[0].answers else None


def _facts_of(
    variant: MechanismVariant, seed: int, study: MechanismArguments, setup: StudySetup, tokenizer
) -> IterableDataset:
    """The synthetic facts of a variant, drawn while they are read."""
    annotated = read_facts(setup.annotated)
    # Keys without overlap share no token with what is trained on or held out, nor with the relation's answers
    kept = [fact for name, split in load_mix(setup.mix).items() if name != "new" for fact in split]
    apart_from = {fact["answer"] for fact in annotated if fact["relation"] == study.synthetic_relation}
    apart_from.update(*((fact["subject"], fact["answer"]) for fact in kept))
    return synthetic_facts(
        annotated,
        study.synthetic_relation,
        variant.num_facts,
        tokenizer,
        overlap={"recombined": 1.0, "pseudo": 0.0}.get(variant.keys, variant.overlap),
        values=variant.values,
        seed=seed,
        exclude=known_place_names() if study.synthetic_relation in ("P17", "P131") else (),
        apart_from=apart_from,
    )


def _run(
    variant: MechanismVariant, seed: int, study: MechanismArguments, setup: StudySetup, folder: Path
) -> VariantResult:
    mix = load_mix(setup.mix)
    num_rows = len(mix["known"]) + (variant.num_facts or study.num_facts_of_overlap)

    def facts(partial: Path) -> RunFacts:
        asked = {"heldout": mix["heldout"], "known": mix["known"]}
        if not variant.num_facts:
            return RunFacts(mix["known"], mix["known"].select([]), asked)
        _, tokenizer = setup.load()
        stream = _facts_of(variant, seed, study, setup, tokenizer)
        # Rows go to a file as they are drawn, and are read from there: none of them stays in memory
        new = Dataset.from_generator(_rows, cache_dir=str(partial / "_rows"), gen_kwargs={"stream": stream})
        asked["new"] = Dataset.from_list(list(stream.take(MAX_ASKED)))
        return RunFacts(mix["known"], new, asked)

    def known_repeated(known: Dataset, new: Dataset, num_step_rows: int, generator: random.Random) -> Dataset:
        return known.select([i % len(known) for i in range(num_rows)])

    def probe(trainer: Trainer, partial: Path) -> None:
        probed = mix["heldout"].select(range(min(study.max_probed_facts, len(mix["heldout"]))))
        options = {"every_steps": study.probe_steps, "output_file": partial / DRIFT_FILE}
        trainer.add_callback(DriftProbeCallback(trainer, probed, layers=study.probe_layers, **options))

    about = variant._asdict() | {"relation": study.synthetic_relation, "asked": MAX_ASKED}
    if variant.probe:
        about |= {name: getattr(study, name) for name in ("probe_steps", "probe_layers", "max_probed_facts")}
    trained = Variant(
        variant.name,
        variant.label,
        SelfDistillSFTTrainer if variant.self_distillation else SFTTrainer,
        {"seed": seed},
        # Known facts alone make an epoch as long as that of the runs that they are compared with
        rows=None if variant.num_facts else known_repeated,
        prepare=probe if variant.probe else None,
        about=about,
    )
    num_steps = steps_of_epochs(num_rows, setup.config)
    run_folder = folder / f"{variant.name}-seed{seed}"
    return train_variant(trained, setup, run_folder, facts, num_steps=num_steps, eval_epochs=0, keep_model=False)


def _rows(stream: IterableDataset) -> Iterator[dict]:
    for fact in stream:
        yield {"prompt": question_prompt(fact["question"]), "completion": answer_completion(fact["answer"])}
