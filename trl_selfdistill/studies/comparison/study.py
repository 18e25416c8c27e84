# SPDX-License-Identifier: Apache-2.0
"""Runs the variants of the comparison over seeds, and collects what each kept and learnt."""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset

from ...files import read_jsonl, write_jsonl
from ...slick.generation import answer_ends
from ...slick.prompts import question_prompt
from ...trainers.anchors import own_answers
from ..fact_accuracy import AccuracyRecord, ask_facts, read_records, write_records
from ..facts.table import fold_name, load_facts, read_facts
from ..results import RECORDS_FILE, VariantResult, mean_seconds
from ..runs import RunFacts, StudySetup, Variant, steps_of_epochs, train_variant, training_config
from ..stage import run_stage
from ..training_mix import load_mix
from .arguments import ADAPTERS, ComparisonArguments
from .report import Outcome
from .rivals import variants_of


def compare_variants(
    args: ComparisonArguments, setup: StudySetup, folder: Path
) -> tuple[Outcome, list[Outcome], list[Outcome]]:
    """
    Makes all runs, each in a folder of its own below `folder`. Returns the model before them, what each variant did,
    plain SFT first, and what each did in the same processor time, if that is asked for.

    Of the held-out facts, one half chooses where to stop early; every variant is judged by the other half.

    Raises:
        ValueError: If there are too few facts, or a setting that a trainer refuses; before the first run.
    """
    facts, prompts = _facts(setup.mix), []
    if {"own_answers", "kl_anchors"} & {*args.variants}:
        prompts = _prompts(args, facts.asked, setup)
    variants = variants_of(args, prompts)
    num_steps = steps_of_epochs(len(facts.known) + len(facts.new), setup.config)
    for variant in variants:
        training_config(variant, setup.config, num_steps)  # refuses what cannot be
    full = {variant.name for variant in variants if variant.group != ADAPTERS}
    if not {*args.mixed} <= full:
        raise ValueError(f"`mixed` may hold {', '.join(sorted(full))}, got {args.mixed}.")
    if "own_answers" in args.variants:
        own = prompts[: args.num_own_answers]
        variants = variants_of(args, prompts, _own_answers(own, setup, folder.with_name("own_answers")))
    runs = _Runs(args, setup, folder, facts, num_steps)
    sft, *others = variants
    results = runs.of(sft)
    before = _outcome("before", [result.records[0] for result in results])
    early = _outcome("SFT, stopped early", [best_epoch(result.records) for result in results], sft.group, results)
    outcomes = runs.outcomes([sft])
    outcomes = [outcomes[0], early, *outcomes[1:], *runs.outcomes(others)]
    in_equal_time = runs.outcomes(runs.in_equal_time(variants)) if args.equal_time else []
    return before, outcomes, in_equal_time


class _Runs(NamedTuple):
    """The runs of the variants, made when they are asked for."""

    args: ComparisonArguments
    setup: StudySetup
    folder: Path
    facts: RunFacts
    num_steps: int

    def of(self, variant: Variant) -> list[VariantResult]:
        """Those of a variant, one for each seed."""
        every_epoch = variant.name == "sft" and variant.steps == 1  # the best of its epochs is a variant by itself
        return [
            train_variant(
                variant._replace(changes=variant.changes | {"seed": seed}),
                self.setup,
                self._folder(variant, seed),
                lambda _: self.facts,
                num_steps=self.num_steps,
                eval_epochs=int(every_epoch),
                keep_model=variant.name in self.args.mixed,
            )
            for seed in self.args.seeds
        ]

    def _folder(self, variant: Variant, seed: int, prefix: str = "") -> Path:
        steps = f"-steps{variant.steps:g}" if variant.steps != 1 else ""
        return self.folder / f"{prefix}{variant.name}{steps}-seed{seed}"

    def outcomes(self, variants: list[Variant]) -> list[Outcome]:
        """What the variants did, and weights between the start and those that `mixed` names."""
        found = []
        for variant in variants:
            results = self.of(variant)
            found.append(_outcome(variant.title, [result.records[-1] for result in results], variant.group, results))
            if variant.name in self.args.mixed:
                mixed = [self._wise_ft(variant, seed) for seed in self.args.seeds]
                for weight, records in zip(self.args.mixing_weights, zip(*mixed, strict=True), strict=True):
                    group = "WiSE-FT" if variant.name == "sft" else variant.group
                    found.append(_outcome(f"WiSE-FT, {weight:g} of {variant.title}", records, group, results))
        return found

    def in_equal_time(self, variants: list[Variant]) -> list[Variant]:
        """The variants with as many steps, to a tenth of SFT's, as take `equal_time` times the time that SFT took."""
        found = {}
        for variant in variants:
            seconds = [mean_seconds(self.of(of), "training_seconds") for of in (variants[0], variant)]
            if None in seconds:
                raise ValueError(f"`equal_time`: no step of SFT or {variant.label} was timed. Delete their folders.")
            share = seconds[0] / seconds[1]
            steps = max(0.1, round(self.args.equal_time * share * variant.steps, 1))
            found.setdefault(variant.label, variant._replace(steps=steps))
        return [*found.values()]

    def _wise_ft(self, variant: Variant, seed: int) -> list[AccuracyRecord]:
        """
        Asks the facts with weights between those of the start and of a run (WiSE-FT, arXiv 2109.01903): a record for
        each share of the run's weights, which is its `epoch`.
        """
        setup, mixing_weights = self.setup, self.args.mixing_weights
        trained, target = self._folder(variant, seed), self._folder(variant, seed, "wise_ft-")

        def work(partial: Path) -> None:
            tuned = dict(setup.load(trained)[0].named_parameters())

            def ask(weight: float) -> AccuracyRecord:
                # A model for each weight: autocast would keep the casts of the weights before
                with setup.to_ask() as (model, tokenizer), torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.lerp_(tuned[name].to(parameter.device), weight)
                    answers = {name: ask_facts(model, tokenizer, facts) for name, facts in self.facts.asked.items()}
                return AccuracyRecord(0, weight, answers)

            records = [ask(weight) for weight in mixing_weights]
            if PartialState().is_main_process:
                write_records(partial / RECORDS_FILE, records)

        arguments = {"mixing_weights": mixing_weights, "bf16": setup.config.bf16}
        run_stage(target, arguments, [setup.start, trained, setup.mix], work, every_process=True)
        return read_records(target / RECORDS_FILE)


def best_epoch(records: list[AccuracyRecord]) -> AccuracyRecord:
    """The record after the epoch with the highest accuracy on the validation facts, the earliest of equals."""
    return max(records[1:], key=lambda record: record.accuracy("validation"))


def _facts(mix: Path) -> RunFacts:
    splits = load_mix(mix)
    heldout = splits["heldout"]
    if len(heldout) < 4:
        raise ValueError(f"`num_heldout`: {len(heldout)} held-out facts make no halves of two or more. Raise it.")
    judging, choosing = (heldout.select(range(first, len(heldout), 2)) for first in (0, 1))
    asked = {"heldout": judging, "validation": choosing, "known": splits["known"], "new": splits["new"]}
    return RunFacts(splits["known"], splits["new"], asked)


def _prompts(args: ComparisonArguments, asked: dict[str, Dataset], setup: StudySetup) -> list[str]:
    """
    Questions about other subjects than the asked ones: those of their relations, or of `anchor_facts`, drawn at random
    but always the same. Neither are their answers looked at, nor whether the model knows them.
    """
    used = {fold_name(subject) for facts in asked.values() for subject in facts["subject"]}
    if args.anchor_facts is None:
        relations = {relation for facts in asked.values() for relation in facts["relation"]}
        facts = [fact for fact in read_facts(setup.annotated) if fact["relation"] in relations]
    else:
        facts = load_facts(args.anchor_facts)
    left = [fact["question"] for fact in facts if fold_name(fact["subject"]) not in used]
    questions = random.Random(0).sample(left, len(left))
    needed = {"num_own_answers": args.num_own_answers} if "own_answers" in args.variants else {}
    needed |= {"num_anchors": max(args.num_anchors)} if "kl_anchors" in args.variants else {}
    for name, number in needed.items():
        if len(questions) < number:
            found = f"only {len(questions)} facts are in no split"
            raise ValueError(f"`{name}={number}`, but {found}. Lower it, or take more facts or `anchor_facts`.")
    return [question_prompt(question) for question in questions]


def _own_answers(prompts: list[str], setup: StudySetup, folder: Path) -> Dataset:
    """What the start model answers, rows of `prompt` and `completion`, kept in `folder`."""

    def work(partial: Path) -> None:
        with setup.to_ask() as (model, tokenizer):
            # The start may not have learnt to stop after the line that an answer is
            model.generation_config.eos_token_id = answer_ends(model, tokenizer)[0]
            answers = own_answers(model, tokenizer, prompts, batch_size=64)
        if PartialState().is_main_process:
            write_jsonl(partial / "answers.jsonl", answers.to_list())

    arguments = {"prompts": prompts, "bf16": setup.config.bf16}
    run_stage(folder, arguments, [setup.start], work, every_process=True)
    return Dataset.from_list(read_jsonl(folder / "answers.jsonl"))


def _outcome(
    label: str, records: list[AccuracyRecord], group: str = "", results: list[VariantResult] | None = None
) -> Outcome:
    old, new = (np.stack([record.outcomes(name) for record in records]) for name in ("heldout", "new"))
    return Outcome(label, old, new, group, mean_seconds(results or [], "training_seconds"))
