# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import sft_runs
from datasets import Dataset
from study_records import fading_outcomes, make_records
from toy_study import toy_facts
from trl import SFTTrainer

from trl_selfdistill.hallucination import RATES
from trl_selfdistill.studies.fact_accuracy import (
    FactAccuracyCallback,
    ask_facts,
    forgetting,
    read_records,
    write_records,
)
from trl_selfdistill.studies.models import load_model_and_tokenizer


ASKED = toy_facts().select(range(0, 80, 10))


def make_trainer(model, folder, path, eval_epochs=1, **config) -> SFTTrainer:
    model, tokenizer = load_model_and_tokenizer(model)
    dataset = Dataset.from_dict({"prompt": ["Q: a\nA:"] * 8, "completion": [" b"] * 8})
    settings = dict(per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2) | config
    arguments = dict(train_dataset=dataset, processing_class=tokenizer)
    run = sft_runs.trainer(folder, model, arguments, SFTTrainer, **settings)
    run.add_callback(FactAccuracyCallback(run, {"heldout": ASKED}, path, eval_epochs=eval_epochs))
    return run


def test_callback_records_every_epoch_and_logs_it(toy_study, tmp_path):
    trainer = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl", logging_strategy="epoch")
    before = ask_facts(trainer.model, trainer.processing_class, ASKED)
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [(record.step, record.epoch) for record in records] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert records[0].answers["heldout"] == before
    # A fact is right by any of its answers
    asked = ASKED.map(lambda row: {"answer": "Nowhere", "aliases": ["Neverland", row["answer"]]})
    assert records[-1].answers["heldout"] == ask_facts(trainer.model, trainer.processing_class, asked) != before
    for rate, outcome in RATES.items():
        logged = [log[f"eval_heldout_{rate}"] for log in trainer.state.log_history if f"eval_heldout_{rate}" in log]
        assert logged == [record.outcomes("heldout", outcome).mean() for record in records]


def test_without_eval_epochs_the_end_is_evaluated_even_within_an_epoch(toy_study, tmp_path):
    trainer = make_trainer(toy_study.model, tmp_path, tmp_path / "accuracy.jsonl", eval_epochs=0, max_steps=3)
    trainer.train()
    records = read_records(tmp_path / "accuracy.jsonl")
    assert [record.step for record in records] == [0, 3]
    assert records[-1].answers["heldout"] == ask_facts(trainer.model, trainer.processing_class, ASKED)


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
    records = read_records(path)
    assert [record.step for record in records] == [step for step in steps if step < killed_at]
    write_records(path, [*records, records[-1]._replace(step=6, epoch=3.0)])  # of a step that is done again
    resumed = make_trainer(toy_study.model, tmp_path, path, eval_epochs, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{killed_at}"))
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [record.step for record in read_records(path)] == steps


def test_forgetting_is_the_peak_minus_the_end_of_each_fact():
    """Facts are paired by their ids, whatever their order; of equal peaks the first counts."""
    outcomes = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]])
    records = make_records(outcomes)
    assert forgetting(records).tolist() == [0, 1, 0]
    turned = [r._replace(answers={k: dict(reversed(rows.items())) for k, rows in r.answers.items()}) for r in records]
    assert forgetting(turned).tolist() == [0, 1, 0]
    assert forgetting(make_records(fading_outcomes(90, [0.1, 0.5, 0.9]))).tolist() == [0] * 90
    faded = forgetting(make_records(fading_outcomes(90, [0.9, 0.95, 0.8, 0.7])))
    assert faded.mean() == pytest.approx((86 - 63) / 90)
