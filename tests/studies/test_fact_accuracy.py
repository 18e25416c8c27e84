# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from datasets import Dataset
from toy_study import ANSWERS, toy_facts
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.fact_accuracy import (
    AccuracyRecord,
    FactAccuracyCallback,
    accuracy_by_group,
    answered_correctly,
    predict_facts,
    read_records,
    write_records,
)
from trl_selfdistill.studies.models import load_model_and_tokenizer


@pytest.fixture(scope="module")
def trained(toy_study):
    """The arm that forgot the most: it answers some facts right and some wrong."""
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
    model, tokenizer = trained
    prompts = [question_prompt(question) for question in facts["question"]]
    answers = [answer for [answer] in predict_answers(model, tokenizer, prompts)]
    generated = {
        fact["fact_id"]: exact_match(answer, [fact["answer"], *fact["aliases"]])
        for fact, answer in zip(facts, answers, strict=True)
    }
    assert answered_correctly(model, tokenizer, facts, batch_size) == generated
    assert 10 < sum(generated.values()) < len(facts) - 10  # both outcomes were put to the test


@pytest.mark.parametrize("method", ["generate", "score"])
def test_predictions_of_both_methods(trained, facts, method):
    predictions = predict_facts(*trained, facts, method=method, batch_size=16)
    outcomes = answered_correctly(*trained, facts)
    assert {row["fact_id"]: row["correct"] for row in predictions} == outcomes
    assert [row["fact_id"] for row in predictions] == facts["fact_id"][:]
    for fact, row in zip(facts, predictions, strict=True):
        if method == "score":
            assert row["prediction"] is None
        else:
            assert row["correct"] == exact_match(row["prediction"], [fact["answer"], *fact["aliases"]])


def test_evaluation_leaves_the_model_as_it_was(trained, facts):
    model, tokenizer = trained
    model.train()
    state = torch.get_rng_state()
    answered_correctly(model, tokenizer, facts.select(range(4)))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_accuracy_by_group():
    facts = Dataset.from_dict({"relation": ["b", "a", "b", "b"], "slick_category": ["Unknown"] * 3 + ["HighlyKnown"]})
    predictions = [{"correct": correct} for correct in (True, False, False, True)]
    assert accuracy_by_group(facts, predictions) == {
        "overall": {"accuracy": 0.5, "num_facts": 4},
        "relation": {"a": {"accuracy": 0.0, "num_facts": 1}, "b": {"accuracy": 2 / 3, "num_facts": 3}},
        "slick_category": {
            "HighlyKnown": {"accuracy": 1.0, "num_facts": 1},
            "Unknown": {"accuracy": 1 / 3, "num_facts": 3},
        },
    }
    assert "slick_category" not in accuracy_by_group(facts.remove_columns("slick_category"), predictions)


def test_records_come_back_from_their_file(tmp_path):
    records = [AccuracyRecord(5 * i, 0.5 * i, {"heldout": {"P17/Łódź": True, "b": i == 1}}) for i in range(2)]
    write_records(tmp_path / "accuracy.jsonl", records)
    assert read_records(tmp_path / "accuracy.jsonl") == records
    assert [record.accuracy("heldout") for record in records] == [0.5, 1.0]
    assert len((tmp_path / "accuracy.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def make_trainer(toy_study, folder, path, each_epoch=True, **config) -> SFTTrainer:
    model, tokenizer = load_model_and_tokenizer(toy_study.model)
    facts = toy_facts().select(range(0, 80, 10))
    dataset = Dataset.from_dict({"prompt": ["Q: a\nA:"] * 8, "completion": [" b"] * 8})
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 1e-2}
    settings |= {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    config = SFTConfig(folder, **{**settings, **config})
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.add_callback(FactAccuracyCallback(trainer, {"heldout": facts}, path, each_epoch=each_epoch))
    return trainer


def test_callback_records_every_epoch_and_logs_it(toy_study, tmp_path):
    trainer = make_trainer(toy_study, tmp_path, tmp_path / "accuracy.jsonl")
    before = answered_correctly(trainer.model, trainer.processing_class, toy_facts().select(range(0, 80, 10)))
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [(record.step, record.epoch) for record in records] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert records[0].correct["heldout"] == before
    after = answered_correctly(trainer.model, trainer.processing_class, toy_facts().select(range(0, 80, 10)))
    assert records[-1].correct["heldout"] == after != before
    logged = [log["eval_heldout_accuracy"] for log in trainer.state.log_history if "eval_heldout_accuracy" in log]
    assert logged == [record.accuracy("heldout") for record in records]


class StopAtStepThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize(
    ("config", "stops", "last"), [({}, False, 4), ({"max_steps": 3}, False, 3), ({"max_steps": 8}, True, 3)]
)
def test_without_each_epoch_the_end_is_evaluated_wherever_it_is(toy_study, tmp_path, config, stops, last):
    trainer = make_trainer(toy_study, tmp_path, tmp_path / "accuracy.jsonl", each_epoch=False, **config)
    if stops:
        trainer.add_callback(StopAtStepThree())
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [record.step for record in records] == [0, last]
    after = answered_correctly(trainer.model, trainer.processing_class, toy_facts().select(range(0, 80, 10)))
    assert records[-1].correct["heldout"] == after


def test_callback_changes_nothing_in_the_training(toy_study, tmp_path):
    # Logging at step 3 has to find the metrics of steps 1 and 2, between which and it an epoch ends
    with_callback = make_trainer(toy_study, tmp_path, tmp_path / "accuracy.jsonl", logging_steps=3)
    without = make_trainer(toy_study, tmp_path, tmp_path / "accuracy.jsonl", logging_steps=3)
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
    make_trainer(toy_study, tmp_path, path, save_strategy="epoch").train()
    first = path.read_text()
    records = read_records(path)
    write_records(path, [*records, records[-1]._replace(step=6, epoch=3.0)])  # killed before step 6 was saved
    make_trainer(toy_study, tmp_path, path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert path.read_text() == first
    assert json.loads(first.splitlines()[1])["step"] == 2


@pytest.mark.parametrize(
    ("each_epoch", "killed_at", "steps"), [(True, 4, [0, 2, 4]), (False, 4, [0, 4]), (True, 2, [0, 2, 4])]
)
def test_what_was_killed_between_its_last_checkpoint_and_its_evaluation_is_evaluated(
    toy_study, tmp_path, monkeypatch, each_epoch, killed_at, steps
):
    path = tmp_path / "accuracy.jsonl"
    expected = make_trainer(toy_study, tmp_path, tmp_path / "whole.jsonl", each_epoch)
    expected.train()

    def evaluate(self, state):
        if state.global_step == killed_at:
            raise KeyboardInterrupt
        original(self, state)

    original = FactAccuracyCallback._evaluate
    # With steps, the checkpoint is written before the epoch ends and the facts are asked
    saving = {"save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(FactAccuracyCallback, "_evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(toy_study, tmp_path, path, each_epoch, **saving).train()
    assert [record.step for record in read_records(path)] == [step for step in steps if step < killed_at]
    resumed = make_trainer(toy_study, tmp_path, path, each_epoch, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{killed_at}"))
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [record.step for record in read_records(path)] == steps


def test_callback_takes_the_evaluation_that_is_there(toy_study, tmp_path):
    path = tmp_path / "accuracy.jsonl"
    earlier = AccuracyRecord(0, 0.0, {"heldout": {"asked": True, "before": False}})
    write_records(path, [earlier])
    make_trainer(toy_study, tmp_path, path, num_train_epochs=1).train()
    assert read_records(path)[0] == earlier and [record.step for record in read_records(path)] == [0, 2]
