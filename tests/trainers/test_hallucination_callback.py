# SPDX-License-Identifier: Apache-2.0
"""HallucinationEvalCallback in real runs of a tiny model."""

import pytest
import sft_runs
import torch
from answering_model import QUESTIONS, build_answering_model
from datasets import Dataset
from sft_runs import TOKENIZER, assert_same_weights
from transformers import EarlyStoppingCallback
from trl import SFTTrainer

from trl_selfdistill import HallucinationEvalCallback
from trl_selfdistill.hallucination import score_hallucinations
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.prompts import question_prompt


HELDOUT = Dataset.from_dict({"question": [*QUESTIONS], "answer": [*QUESTIONS.values()], "aliases": [[]] * 6})
# The answers of the model to these are wrong before the training
NEW = Dataset.from_dict({"question": ["Which country is Kobe located in?"] * 3, "answer": ["Japan", "Peru", "Norway"]})
TRAIN = Dataset.from_dict({"prompt": ["Q: a\nA:"] * 4, "completion": [" b"] * 4})


def make_trainer(folder, **config) -> SFTTrainer:
    arguments = {"train_dataset": TRAIN}
    if "eval_strategy" in config:
        arguments["eval_dataset"] = config.pop("eval_dataset", TRAIN)
    settings = dict(max_steps=-1, num_train_epochs=3, seed=0) | config
    return sft_runs.trainer(folder, build_answering_model(TOKENIZER), arguments, SFTTrainer, **settings)


def run(folder, eval_sets, resume=None, after=(), alphas=(), **config) -> SFTTrainer:
    run = make_trainer(folder, **config)
    run.add_callback(HallucinationEvalCallback(run, eval_sets, batch_size=4, alphas=alphas))
    for callback in after:
        run.add_callback(callback)
    run.train(resume_from_checkpoint=resume)
    return run


def values(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def own_scores(model, rows: Dataset) -> dict:
    answers = predict_answers(model, TOKENIZER, [question_prompt(question) for question in rows["question"]])
    return score_hallucinations([answer for [answer] in answers], rows["answer"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), {"heldout": HELDOUT, "new": NEW.to_list()})


def test_it_logs_each_set_before_the_training_and_after_each_epoch(finished):
    before, after = (own_scores(model, HELDOUT) for model in (build_answering_model(TOKENIZER), finished.model))
    accuracy = values(finished, "eval_heldout_accuracy")
    assert len(accuracy) == 4 and accuracy[0] == before["accuracy"] > accuracy[-1] == after["accuracy"]
    assert values(finished, "eval_heldout_hallucination_rate")[-1] == after["hallucination_rate"]
    assert values(finished, "eval_new_accuracy")[-1] == own_scores(finished.model, NEW)["accuracy"]
    peaks = [max(accuracy[: i + 1]) for i in range(4)]
    expected = [peak - now for peak, now in zip(peaks, accuracy, strict=True)]
    assert values(finished, "eval_heldout_forgetting") == expected and expected[-1] > 0


def test_the_curve_goes_from_the_start_to_the_end(tmp_path, finished):
    mixed = run(tmp_path, {"heldout": HELDOUT}, alphas=[0, 1.0, 0.5])
    assert_same_weights(mixed.model, finished.model)
    accuracies = values(finished, "eval_heldout_accuracy")
    ends = [values(mixed, f"eval_heldout_accuracy_alpha_{alpha}") for alpha in (0, 1)]
    assert ends == [[accuracies[0]], [accuracies[-1]]]
    start = build_answering_model(TOKENIZER)
    with torch.no_grad():
        for ours, other in zip(start.parameters(), mixed.model.parameters(), strict=True):
            ours.lerp_(other, 0.5)
    assert values(mixed, "eval_heldout_accuracy_alpha_0.5") == [own_scores(start, HELDOUT)["accuracy"]]
    with pytest.raises(ValueError, match=r"`alphas` are shares .* in \[0, 1\], got \[2\]"):
        run(tmp_path, {"heldout": HELDOUT}, alphas=[2])


@pytest.mark.parametrize("eval_dataset", [TRAIN, {"one": TRAIN, "two": TRAIN}], ids=["one dataset", "a dict"])
def test_transformers_keeps_the_best_checkpoint_and_stops_early_by_it(tmp_path, eval_dataset):
    trainer = run(
        tmp_path,
        {"heldout": HELDOUT},
        after=[EarlyStoppingCallback(early_stopping_patience=2)],
        alphas=[1.0],
        eval_strategy="epoch",
        eval_on_start=True,
        eval_dataset=eval_dataset,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="heldout_accuracy",
        num_train_epochs=8,
    )
    accuracy = values(trainer, "eval_heldout_accuracy")
    trained = accuracy[1:]  # the first is from before the training, and saves nothing
    best = trained.index(max(trained))
    assert trainer.state.best_metric == max(trained) and trainer.state.best_global_step == 2 * (best + 1)
    curve = values(trainer, "eval_heldout_accuracy_alpha_1")  # of the weights that are loaded
    assert curve == [own_scores(trainer.model, HELDOUT)["accuracy"]] == [max(trained)]
    assert trainer.state.global_step == 2 * len(trained) < 16 and len(trained) == best + 3


def test_a_resumed_run_goes_on_with_the_peak(finished, tmp_path):
    run(tmp_path, {"heldout": HELDOUT, "new": NEW}, save_strategy="epoch")
    resumed = run(tmp_path, {"heldout": HELDOUT, "new": NEW}, resume=str(tmp_path / "run" / "checkpoint-2"))
    for name in ("eval_heldout_accuracy", "eval_heldout_forgetting", "eval_new_hallucination_rate"):
        # A checkpoint is written before the epoch's end is evaluated, where the trainer itself evaluates nothing
        assert values(resumed, name)[0] == values(finished, name)[0]
        assert values(resumed, name)[-2:] == values(finished, name)[-2:]


@pytest.mark.parametrize(
    "prompt_function", [lambda q: f"{question_prompt(q)} x", lambda q: [{"role": "user", "content": q}]]
)
def test_the_rules_of_answers_and_the_prompt_are_the_users(tmp_path, prompt_function):
    """A text or a conversation."""
    trainer, rules = make_trainer(tmp_path), {"match": "contains"}
    options = dict(prompt_function=prompt_function, answer_rules=rules)
    trainer.add_callback(HallucinationEvalCallback(trainer, {"x": HELDOUT}, **options))
    trainer.evaluate(TRAIN)
    [log] = [log for log in trainer.state.log_history if "eval_x_accuracy" in log]
    prompts = [prompt_function(question) for question in QUESTIONS]
    answers = [answer for [answer] in predict_answers(trainer.model, TOKENIZER, prompts)]
    expected = score_hallucinations(answers, HELDOUT["answer"][:], **rules)
    for rate in ("accuracy", "hallucination_rate", "abstention_rate"):
        assert log[f"eval_x_{rate}"] == expected[rate]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ({"answer": ["a"], "question": [None]}, "a row without a text as `question`"),
        ({"answer": ["a"], "aliases": ["Holland|NL"]}, "a text as `aliases`. Make each a list"),
        ({"answer": ["a"], "aliases": [["a\nb"]]}, r"the answer 'a\\nb' has a line break"),
        ({"answer": ["a", None]}, r"references\[1\]\[0\]` is None; it must be a string"),
        ({"answer": []}, "there is nothing to score"),
    ],
)
def test_answers_that_could_not_be_given_are_refused(tmp_path, rows, error):
    rows = Dataset.from_dict({"question": ["q"] * len(rows["answer"]), **rows})
    with pytest.raises(ValueError, match=rf"`eval_sets\['a'\]`.*{error}"):
        HallucinationEvalCallback(make_trainer(tmp_path), {"a": rows})
    trainer = make_trainer(tmp_path)
    trainer.add_callback(HallucinationEvalCallback(trainer, {"a": HELDOUT}, batch_size=-1))
    with pytest.raises(ValueError, match="must be 1 or more, got {'batch_size': -1"):
        trainer.evaluate(TRAIN)
    with pytest.raises(TypeError, match="`eval_sets` is a Dataset; it must be a dict"):
        HallucinationEvalCallback(None, rows)
