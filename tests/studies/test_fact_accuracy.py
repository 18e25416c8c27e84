# SPDX-License-Identifier: Apache-2.0
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from huggingface_hub import ModelCard
from study_records import fading_outcomes, make_records
from toy_study import ANSWERS, toy_facts
from trl import SFTConfig, SFTTrainer
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill.files import read_json, write_json
from trl_selfdistill.hallucination import RATES, score_hallucinations
from trl_selfdistill.hallucination.intervals import Interval
from trl_selfdistill.slick import generation
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.fact_accuracy import (
    FactAccuracyCallback,
    ask_facts,
    forgetting,
    read_records,
    write_records,
)
from trl_selfdistill.studies.markdown import format_interval
from trl_selfdistill.studies.models import load_model_and_tokenizer
from trl_selfdistill.studies.results import read_result
from trl_selfdistill.studies.training_mix import load_mix


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
def test_generation_agrees_with_scoring(trained, facts, batch_size):
    accepted = [[fact["answer"], *fact["aliases"]] for fact in facts]
    scores = score_answers(*trained, [question_prompt(question) for question in facts["question"]], accepted)
    answers = ask_facts(*trained, facts, batch_size=batch_size)
    right = [answers[fact_id].outcome == "correct" for fact_id in facts["fact_id"]]
    assert right == [score.is_greedy for score in scores]
    assert 10 < sum(right) < len(facts) - 10  # both outcomes were put to the test


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
    before = ask_facts(trainer.model, trainer.processing_class, ASKED)
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [(record.step, record.epoch) for record in records] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert records[0].answers["heldout"] == before
    assert records[-1].answers["heldout"] == ask_facts(trainer.model, trainer.processing_class, ASKED) != before
    for rate, outcome in RATES.items():
        logged = [log[f"eval_heldout_{rate}"] for log in trainer.state.log_history if f"eval_heldout_{rate}" in log]
        assert logged == [record.outcomes("heldout", outcome).mean() for record in records]


def test_the_rates_of_a_run_are_the_metrics(toy_study):
    """Of the answers in its records, on the card and in its metadata, with their intervals."""
    facts = load_mix(toy_study.output / "mix")["heldout"]
    references = [[fact["answer"], *fact["aliases"]] for fact in facts]
    answers = read_result(toy_study.output / "sft").records[-1].answers["heldout"]
    scores = score_hallucinations([answers[fact_id].text for fact_id in facts["fact_id"]], references)
    card = ModelCard.load(toy_study.output / "sft" / "README.md")
    metadata = {result.metric_type: result.metric_value for result in card.data.eval_results}
    interval = Interval(*(scores[f"hallucination_rate{end}"] for end in ("", "_ci_low", "_ci_high")))
    assert f"| Hallucination rate ↓              | {format_interval(interval)} |" in card.text
    assert metadata["hallucination_rate"] == round(scores["hallucination_rate"], 4) > 0


def test_records_without_answers_are_refused(tmp_path):
    (tmp_path / "accuracy.jsonl").write_text('{"step": 0, "epoch": 0.0, "correct": {"heldout": {"a": true}}}\n')
    with pytest.raises(ValueError, match="accuracy.jsonl: an earlier version wrote it.*Move or delete"):
        read_records(tmp_path / "accuracy.jsonl")


def test_two_processes_share_the_facts(toy_study, tmp_path):
    run_in_two_processes(__file__, toy_study.output / "sft", tmp_path)
    model, tokenizer = load_model_and_tokenizer(toy_study.output / "sft")
    assert read_json(tmp_path / "asked.json") == [4, 4]
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [record.step for record in records] == [0, 1, 2]
    assert records[0].answers["heldout"] == ask_facts(model, tokenizer, ASKED)
    assert records[-1].answers["heldout"] == ask_facts(*load_model_and_tokenizer(tmp_path / "end"), ASKED)


def two_process_program(model: str, folder: Path) -> None:
    """Trains, and notes how many facts each process asked in the first evaluation."""
    asked, answer = [], generation.generate_tokens

    def noted(model, prompts, *args, **kwargs):
        asked.append(len(prompts))
        return answer(model, prompts, *args, **kwargs)

    generation.generate_tokens = noted
    trainer = make_trainer(model, folder, folder / "accuracy.jsonl")
    trainer.train()
    trainer.save_model(folder / "end")
    asked = gather_object(asked[:1])
    if trainer.is_world_process_zero():
        write_json(folder / "asked.json", asked)
    leave_processes()


@pytest.mark.parametrize(("config", "last"), [({}, 4), ({"max_steps": 3}, 3)])
def test_without_eval_epochs_the_end_is_evaluated_wherever_it_is(toy_study, tmp_path, config, last):
    trainer = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl", eval_epochs=0, **config)
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [record.step for record in records] == [0, last]
    assert records[-1].answers["heldout"] == ask_facts(trainer.model, trainer.processing_class, ASKED)


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
        record._replace(answers={name: dict(reversed(rows.items())) for name, rows in record.answers.items()})
        for record in records
    ]
    assert forgetting(turned).tolist() == [0, 1, 0]
    assert forgetting(make_records(fading_outcomes(90, [0.1, 0.5, 0.9]))).tolist() == [0] * 90
    faded = forgetting(make_records(fading_outcomes(90, [0.9, 0.95, 0.8, 0.7])))
    assert faded.mean() == pytest.approx((86 - 63) / 90)


if __name__ == "__main__":
    two_process_program(sys.argv[1], Path(sys.argv[2]))
