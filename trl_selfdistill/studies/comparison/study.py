# SPDX-License-Identifier: Apache-2.0
"""Runs the variants of the comparison over seeds, and collects what each kept and learnt."""

import random
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...files import read_jsonl, write_jsonl
from ...slick.generation import answer_ends
from ...slick.prompts import question_prompt
from ...trainers.anchors import own_answers
from ..fact_accuracy import AccuracyRecord, ask_facts, read_records, write_records
from ..facts.table import fold_name, read_facts
from ..results import RECORDS_FILE
from ..runs import RunFacts, StudySetup, steps_of_epochs, train_variant, training_config
from ..stage import run_stage
from ..training_mix import load_mix
from .report import Outcome
from .rivals import ComparisonArguments, variants_of


EARLY_STOPPING = "SFT, stopped early"


def compare_variants(args: ComparisonArguments, setup: StudySetup, folder: Path) -> list[Outcome]:
    """
    Makes all runs, each in a folder of its own, and returns the model before them and what each variant did; plain SFT
    is the first.

    Of the held-out facts, one half chooses where to stop early; every variant is judged by the other half.

    Args:
        args ([`ComparisonArguments`]): What to compare.
        setup ([`~trl_selfdistill.studies.runs.StudySetup`]): What all runs share.
        folder (`Path`): Where their folders go.

    Raises:
        ValueError: If there are too few facts, or a setting that a trainer refuses; before the first run.
    """
    facts = _facts(setup.mix)
    answers = None
    if "rehearsal" in args.variants:
        answers = _own_answers(args.num_rehearsal, facts.asked, setup, folder.with_name("own_answers"))
    variants = variants_of(args, answers)
    num_steps = steps_of_epochs(len(facts.known) + len(facts.new), setup.config)
    for variant in variants:
        training_config(variant, setup.config, num_steps)  # refuses what cannot be
    outcomes = []
    for variant in variants:
        is_sft = variant.name == "sft"
        results = [
            train_variant(
                variant._replace(changes=variant.changes | {"seed": seed}),
                setup,
                folder / f"{variant.name}-seed{seed}",
                lambda _: facts,
                num_steps=num_steps,
                eval_epochs=int(is_sft),  # the best of its epochs is a variant by itself
                keep_model=is_sft,  # for WiSE-FT
            )
            for seed in args.seeds
        ]
        if is_sft:
            outcomes.append(_outcome("before", [result.records[0] for result in results]))
        outcomes.append(_outcome(variant.label, [result.records[-1] for result in results], variant.family))
        if is_sft:
            outcomes.append(_outcome(EARLY_STOPPING, [best_epoch(result.records) for result in results]))
            mixed = [_wise_ft(folder, seed, args.mixing_weights, setup, facts.asked) for seed in args.seeds]
            for weight, records in zip(args.mixing_weights, zip(*mixed, strict=True), strict=True):
                outcomes.append(_outcome(f"WiSE-FT, {weight:g} of SFT", records))
    return outcomes


def best_epoch(records: list[AccuracyRecord]) -> AccuracyRecord:
    """
    The record with the highest accuracy on the validation facts, of those after an epoch of training at least; the
    earliest of equals.
    """
    return max(records[1:], key=lambda record: record.accuracy("validation"))


def _facts(mix: Path) -> RunFacts:
    splits = load_mix(mix)
    heldout = splits["heldout"]
    if len(heldout) < 4:
        raise ValueError(f"`num_heldout`: {len(heldout)} held-out facts make no halves of two or more. Raise it.")
    judging, choosing = (heldout.select(range(first, len(heldout), 2)) for first in (0, 1))
    asked = {"heldout": judging, "validation": choosing, "known": splits["known"], "new": splits["new"]}
    return RunFacts(splits["known"], splits["new"], asked)


def _own_answers(number: int, asked: dict[str, Dataset], setup: StudySetup, folder: Path) -> Dataset:
    """
    What the start model answers to questions of further facts, rows of `prompt` and `completion`, kept in `folder`.

    The facts are of the asked ones' relations and about other subjects, drawn at random but always the same. Neither
    are their answers looked at, nor whether the model knows them.
    """
    used = {fold_name(subject) for facts in asked.values() for subject in facts["subject"]}
    relations = {relation for facts in asked.values() for relation in facts["relation"]}
    questions = [
        fact["question"]
        for fact in read_facts(setup.annotated)
        if fact["relation"] in relations and fold_name(fact["subject"]) not in used
    ]
    if len(questions) < number:
        raise ValueError(
            f"`num_rehearsal={number}`, but only {len(questions)} facts are in no split. Lower it, or take more facts."
        )
    prompts = [question_prompt(question) for question in random.Random(0).sample(questions, number)]

    def work(partial: Path) -> None:
        model, tokenizer = _load_start(setup)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=setup.config.bf16):
            # The start may not have learnt to stop after the line that an answer is
            model.generation_config.eos_token_id = [*answer_ends(model, tokenizer).stop_ids]
            answers = own_answers(model, tokenizer, prompts, batch_size=64)
        if PartialState().is_main_process:
            write_jsonl(partial / "answers.jsonl", answers.to_list())

    arguments = {"prompts": prompts, "bf16": setup.config.bf16}
    run_stage(folder, arguments, [setup.start], work, every_process=True)
    return Dataset.from_list(read_jsonl(folder / "answers.jsonl"))


def _wise_ft(
    folder: Path, seed: int, mixing_weights: list[float], setup: StudySetup, asked: dict[str, Dataset]
) -> list[AccuracyRecord]:
    """
    Asks the facts with weights between those of the start and of SFT (WiSE-FT, arXiv 2109.01903): a record for each
    share of SFT's weights, which is its `epoch`.
    """
    sft, target = folder / f"sft-seed{seed}", folder / f"wise_ft-seed{seed}"

    def work(partial: Path) -> None:
        model, tokenizer = _load_start(setup)
        # Only the model itself takes memory of the device
        start = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
        fine_tuned, _ = setup.load(sft)
        tuned = dict(fine_tuned.named_parameters())
        records = []
        for weight in mixing_weights:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(torch.lerp(start[name], tuned[name], weight))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=setup.config.bf16):
                answers = {name: ask_facts(model, tokenizer, facts) for name, facts in asked.items()}
            records.append(AccuracyRecord(0, weight, answers))
        if PartialState().is_main_process:
            write_records(partial / RECORDS_FILE, records)

    arguments = {"mixing_weights": mixing_weights, "bf16": setup.config.bf16}
    run_stage(target, arguments, [setup.start, sft, setup.mix], work, every_process=True)
    return read_records(target / RECORDS_FILE)


def _load_start(setup: StudySetup) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = setup.load()
    return model.to(PartialState().device), tokenizer


def _outcome(label: str, records: list[AccuracyRecord], family: str = "") -> Outcome:
    old, new = (np.stack([record.outcomes(name) for record in records]) for name in ("heldout", "new"))
    return Outcome(label, old, new, family)
