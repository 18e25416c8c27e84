# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from study_records import fading_outcomes, make_records
from toy_study import ANSWERS, toy_facts
from trl import SFTConfig, SFTTrainer
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill.files import read_json, write_json
from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies import fact_accuracy
from trl_selfdistill.studies.fact_accuracy import (
    FactAccuracyCallback,
    answered_correctly,
    forgetting,
    read_records,
    write_records,
)
from trl_selfdistill.studies.models import load_model_and_tokenizer


@pytest.fixture(scope="module")
def trained(toy_study):
    """The variant that forgot the most: it answers some facts right and some wrong."""
    return load_model_and_tokenizer(toy_study.output / "sft")


@pytest.fixture(scope="module")
def facts():
    """Some facts have an alias that another answer of the model may match."""
    rows = toy_facts().to_list()
    for i, row in enumerate(rows):
        row["aliases"] = [ANSWERS[row["relation"]][i % 3]] if i % 4 == 0 else []
    return Dataset.from_list(rows)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_scoring_agrees_with_greedy_generation(trained, facts, batch_size):
    answers = predict_answers(*trained, [question_prompt(question) for question in facts["question"]])
    outcomes = {
        fact["fact_id"]: exact_match(answer, [fact["answer"], *fact["aliases"]])
        for fact, [answer] in zip(facts, answers, strict=True)
    }
    assert answered_correctly(*trained, facts, batch_size) == outcomes
    assert 10 < sum(outcomes.values()) < len(facts) - 10  # both outcomes were put to the test


ASKED = toy_facts().select(range(0, 80, 10))


def make_trainer(model, folder, path, eval_epochs=1, **config) -> SFTTrainer:
    model, tokenizer = load_model_and_tokenizer(model)
    dataset = Dataset.from_dict({"prompt": ["Q: a\nA:"] * 8, "completion": [" b"] * 8})
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    config = SFTConfig(folder, **{**settings, **config})
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.add_callback(FactAccuracyCallback(trainer, {"heldout": ASKED}, path, eval_epochs=eval_epochs))
    return trainer


def test_callback_records_every_epoch_and_logs_it(toy_study, tmp_path):
    trainer = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl")
    before = answered_correctly(trainer.model, trainer.processing_class, ASKED)
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [(record.step, record.epoch) for record in records] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert records[0].correct["heldout"] == before
    assert (
        records[-1].correct["heldout"] == answered_correctly(trainer.model, trainer.processing_class, ASKED) != before
    )
    logged = [log["eval_heldout_accuracy"] for log in trainer.state.log_history if "eval_heldout_accuracy" in log]
    assert logged == [record.accuracy("heldout") for record in records]


def test_two_processes_share_the_facts(toy_study, tmp_path):
    run_in_two_processes(__file__, toy_study.output / "sft", tmp_path)
    model, tokenizer = load_model_and_tokenizer(toy_study.output / "sft")
    assert [*map(len, read_json(tmp_path / "asked.json"))] == [4, 4]
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [record.step for record in records] == [0, 1, 2]
    assert records[0].correct["heldout"] == answered_correctly(model, tokenizer, ASKED)
    assert records[-1].correct["heldout"] == answered_correctly(*load_model_and_tokenizer(tmp_path / "end"), ASKED)


def two_process_program(model: str, folder: Path) -> None:
    """Trains, and notes which facts each process asked in the first evaluation."""
    prompts, score = [], fact_accuracy.score_answers

    def noted(model, tokenizer, chunk, *args, **kwargs):
        prompts.append(chunk)
        return score(model, tokenizer, chunk, *args, **kwargs)

    fact_accuracy.score_answers, fact_accuracy._CHUNK_SIZE = noted, 2
    trainer = make_trainer(model, folder, folder / "accuracy.jsonl")
    trainer.train()
    trainer.save_model(folder / "end")
    asked = gather_object([sum(prompts[:2], [])])
    if trainer.is_world_process_zero():
        write_json(folder / "asked.json", asked)
    leave_processes()


@pytest.mark.parametrize(("config", "last"), [({}, 4), ({"max_steps": 3}, 3)])
def test_without_eval_epochs_the_end_is_evaluated_wherever_it_is(toy_study, tmp_path, config, last):
    trainer = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl", eval_epochs=0, **config)
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [record.step for record in records] == [0, last]
    assert records[-1].correct["heldout"] == answered_correctly(trainer.model, trainer.processing_class, ASKED)


def test_callback_changes_nothing_in_the_training(toy_study, tmp_path):
    # Logging at step 3 has to find the metrics of steps 1 and 2, between which and it an epoch ends
    with_callback = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl", logging_steps=3)
    without = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl", logging_steps=3)
    without.callback_handler.callbacks = without.callback_handler.callbacks[:-1]
    logs = []
    for trainer in (with_callback, without):
        trainer.train()
        logs.append(
            [
                {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
                for log in trainer.state.log_history
                if "loss" in log
            ]
        )
    assert logs[0] == logs[1] and "mean_token_accuracy" in logs[0][0]
    for one, other in zip(with_callback.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_callback_drops_the_records_of_steps_that_are_done_again(toy_study, tmp_path):
    path = tmp_path / "accuracy.jsonl"
    make_trainer(toy_study.model, tmp_path, path, save_strategy="epoch").train()
    first = path.read_text()
    records = read_records(path)
    write_records(path, [*records, records[-1]._replace(step=6, epoch=3.0)])  # killed before step 6 was saved
    make_trainer(toy_study.model, tmp_path, path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert path.read_text() == first
    assert json.loads(first.splitlines()[1])["step"] == 2


@pytest.mark.parametrize(
    ("eval_epochs", "killed_at", "steps"), [(1, 4, [0, 2, 4]), (0, 4, [0, 4]), (2, 4, [0, 4]), (1, 2, [0, 2, 4])]
)
def test_what_was_killed_between_its_last_checkpoint_and_its_evaluation_is_evaluated(
    toy_study, tmp_path, monkeypatch, eval_epochs, killed_at, steps
):
    path = tmp_path / "accuracy.jsonl"
    expected = make_trainer(toy_study.model, tmp_path, tmp_path / "whole.jsonl", eval_epochs)
    expected.train()

    def evaluate(self, state):
        if state.global_step == killed_at:
            raise KeyboardInterrupt
        original(self, state)

    original = FactAccuracyCallback._ask
    # With steps, the checkpoint is written before the epoch ends and the facts are asked
    saving = {"save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(FactAccuracyCallback, "_ask", evaluate)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(toy_study.model, tmp_path, path, eval_epochs, **saving).train()
    assert [record.step for record in read_records(path)] == [step for step in steps if step < killed_at]
    resumed = make_trainer(toy_study.model, tmp_path, path, eval_epochs, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{killed_at}"))
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [record.step for record in read_records(path)] == steps


def test_forgetting_is_the_peak_minus_the_end_of_each_fact():
    """Facts are paired by their ids, whatever their order; of equal peaks the first counts."""
    outcomes = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]])
    records = make_records(outcomes)
    assert forgetting(records).tolist() == [0, 1, 0]
    turned = [
        record._replace(correct={name: dict(reversed(correct.items())) for name, correct in record.correct.items()})
        for record in records
    ]
    assert forgetting(turned).tolist() == [0, 1, 0]
    assert forgetting(make_records(fading_outcomes(90, [0.1, 0.5, 0.9]))).tolist() == [0] * 90
    faded = forgetting(make_records(fading_outcomes(90, [0.9, 0.95, 0.8, 0.7])))
    assert faded.mean() == pytest.approx((86 - 63) / 90)


if __name__ == "__main__":
    two_process_program(sys.argv[1], Path(sys.argv[2]))
