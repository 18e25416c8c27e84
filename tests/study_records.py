# SPDX-License-Identifier: Apache-2.0
"""Evaluations of made-up runs, and the folders that they leave."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from conftest import build_model
from transformers import PreTrainedTokenizerBase

from trl_selfdistill.files import write_json
from trl_selfdistill.studies.card import write_model_card
from trl_selfdistill.studies.fact_accuracy import AccuracyRecord, FactAnswer, write_records
from trl_selfdistill.studies.results import read_result


def make_records(heldout: np.ndarray, new: np.ndarray | None = None) -> list[AccuracyRecord]:
    """
    Records of right and wrong answers `(num_evaluations, num_facts)`, one an epoch of ten steps; one known fact,
    always right. Every fourth wrong answer is an abstention.
    """
    sets = {"known": [[True]] * len(heldout), "new": heldout if new is None else new, "heldout": heldout}
    return [
        AccuracyRecord(10 * epoch, float(epoch), {name: answered(name, right[epoch]) for name, right in sets.items()})
        for epoch in range(len(heldout))
    ]


def answered(name: str, right: Iterable[bool]) -> dict[str, FactAnswer]:
    """A set of facts with these answers."""
    answers = {True: FactAnswer("correct", "Peru"), False: FactAnswer("hallucinated", "Chile")}
    rows = [answers[bool(value)] for value in right]
    for i in [i for i, row in enumerate(rows) if row.outcome != "correct"][::4]:
        rows[i] = FactAnswer("abstained", "I don't know")
    return {f"{name}/{i}": row for i, row in enumerate(rows)}


def fading_outcomes(num_facts: int, accuracies: list[float], seed: int = 0) -> np.ndarray:
    """Outcomes `(num_evaluations, num_facts)` in which the facts fade in a random order."""
    ranks = np.random.default_rng(seed).permutation(num_facts)
    return np.array([ranks < round(accuracy * num_facts) for accuracy in accuracies])


def write_result(folder: Path, records: list[AccuracyRecord], **training) -> Path:
    """A folder as a training stage leaves it, without the weights."""
    folder.mkdir(parents=True)
    write_records(folder / "accuracy.jsonl", records)
    content = dict(base_model="org/model", started_from="stage1", trainer="SFTTrainer")
    content |= dict(mix={"mix": {"new_facts": "invented"}, "seed": 0}, splits=["known", "new"], precision="float32")
    content |= dict(settings={"learning_rate": 1e-4, "seed": 0}, log_history=[], seconds_per_step=1.25, num_steps=20)
    content |= dict(trainable_parameters=5_000_000, parameters=20_000_000)
    write_json(folder / "training.json", content | training)
    run = {"command": "scripts/run_study.py --output_dir outputs/study", "date": "2026-01-02T03:04:05+00:00"}
    write_json(folder / "run.json", {**run, "machine": "x86_64, Linux", "versions": {"torch": "2.13.0"}})
    return folder


def write_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A finished variant with a tiny model, its tokenizer, a figure and its card."""
    write_result(folder, make_records(fading_outcomes(20, [1.0, 0.5])))
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "curves.png").write_bytes(b"a figure")
    result = read_result(folder)
    write_model_card(result, [result], folder)
    return folder
