# SPDX-License-Identifier: Apache-2.0
"""The callbacks that ask a model change nothing in the training, and measure on two processes (DDP, weights in FSDP2's
shards) what they do on one."""

import os
from pathlib import Path

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model, towns_prompts
from conftest import CITIES, note_calls
from fact_rows import facts_from_rows
from peft import LoraConfig
from sft_runs import TOKENIZER, assert_same_weights, logs, trainer
from torch.distributed.fsdp import fully_shard
from transformers import GenerationMixin
from trl import SFTTrainer
from two_processes import FSDP2_ON_CPU, needs_fsdp2_on_cpu, run_in_two_processes

from trl_selfdistill import HallucinationEvalCallback, SelfDistillSFTTrainer
from trl_selfdistill.files import read_json, read_jsonl, write_json
from trl_selfdistill.slick.generation import answer_prompts, predict_answers
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.drift import DriftProbeCallback
from trl_selfdistill.studies.drift.prompt_states import prompt_states
from trl_selfdistill.studies.fact_accuracy import FactAccuracyCallback, read_records


# An odd number, so that one process has less to do
FACTS = facts_from_rows(
    [
        {"relation": "P17", "subject": city, "question": question, "answer": answer}
        for city, (question, answer) in list(zip(CITIES, QUESTIONS.items(), strict=True))[:5]
    ]
)
PROMPTS = [*towns_prompts(), question_prompt(FACTS["question"][0])]


def run(folder: Path, batch_size=2, asked=True, dropout=0.0, trainer_class=SFTTrainer, **options) -> SFTTrainer:
    """A training, by default with all of them; dropout makes the random state count."""
    model = build_answering_model(TOKENIZER)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    options = dict(max_steps=-1, num_train_epochs=3, per_device_train_batch_size=batch_size) | options
    trained = trainer(folder, model, options.pop("arguments", None), trainer_class, **options)
    if asked:
        trained.add_callback(HallucinationEvalCallback(trained, {"seen": FACTS}))
        trained.add_callback(FactAccuracyCallback(trained, {"heldout": FACTS}, folder / "accuracy.jsonl"))
        trained.add_callback(DriftProbeCallback(trained, FACTS, every_steps=3, output_file=folder / "drift.jsonl"))
    trained.train()
    return trained


LORA = dict(arguments=dict(peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")))
RUNS = {
    "logs of steps": dict(logging_steps=2),
    "logs of epochs": dict(logging_strategy="epoch"),
    "bf16, gradient checkpointing": dict(bf16=True, gradient_checkpointing=True),
    "self-distillation": dict(trainer_class=SelfDistillSFTTrainer, gradient_accumulation_steps=2),
    "self-distillation of an adapter": dict(trainer_class=SelfDistillSFTTrainer, **LORA),
}


@pytest.mark.parametrize("name", RUNS)
def test_training_is_bitwise_the_same_with_them_and_so_are_its_logs(tmp_path, name):
    """
    A log of a callback's own takes back the order for the trainer's of the epoch, if it is not given again, and must
    not take the metrics of the steps before it.
    """
    runs = []
    for asked in (False, True):
        torch.manual_seed(0)  # for the adapter
        runs.append(run(tmp_path / str(asked), asked=asked, dropout=0.2, **RUNS[name]))
    without, probed = runs
    assert_same_weights(probed.model, without.model)
    own = [row for row in logs(probed) if {"loss", "total_flos"} & row.keys()]
    assert all(expected.items() <= row.items() for row, expected in zip(own, logs(without), strict=True))
    assert len(measured(probed)) > 4 and probed.model.training == without.model.training


def measured(run: SFTTrainer) -> list[dict]:
    return [row for row in logs(run) if not {"loss", "total_flos"} & row.keys()]


def run_on_two_processes(folder: Path) -> None:
    """The run, and answers and states of weights in shards; each process writes what it saw."""
    generated = note_calls(GenerationMixin, "generate")
    trained, rank = run(folder, batch_size=1), os.environ["RANK"]
    seen = {"log": measured(trained), "asked": len(generated[0].kwargs["input_ids"])}
    if FSDP2_ON_CPU:
        model = build_answering_model(TOKENIZER)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        seen["answers"] = answer_prompts(model, TOKENIZER, PROMPTS, batch_size=2)
        prompts = trained.callback_handler.callbacks[-1].prompts
        torch.save(tuple(prompt_states(model, prompts, (1, 2), batch_size=2)), folder / f"states{rank}.pt")
    synced = dict.fromkeys(call.kwargs["synced_gpus"] for call in generated)
    write_json(folder / f"{rank}.json", seen | {"synced": [*synced]})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, run(folder, batch_size=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_in_two_processes(run_on_two_processes, folder)
    return folder, [read_json(folder / f"{rank}.json") for rank in range(2)]


def test_two_processes_ask_a_share_each_and_log_and_write_what_one_does(one, two):
    log, expected = two[1][0]["log"], measured(one[1])
    assert log == two[1][1]["log"] and [seen["asked"] for seen in two[1]] == [3, 2]
    for row, alone in zip(log, expected, strict=True):
        assert row == pytest.approx(alone, rel=1e-2, abs=1e-6)
    assert len({row["eval_seen_accuracy"] for row in expected if "eval_seen_accuracy" in row}) > 1
    assert read_records(two[0] / "accuracy.jsonl") == read_records(one[0] / "accuracy.jsonl")
    written = [row["drift_kl"] for row in read_jsonl(two[0] / "drift.jsonl")]
    assert written == [row["drift_kl"] for row in log if "drift_kl" in row] and written[-1] > 1e-4


@needs_fsdp2_on_cpu
def test_sharded_weights_answer_and_are_measured_as_whole_ones(one, two):
    model = build_answering_model(TOKENIZER)
    answers = [answer for [answer] in predict_answers(model, TOKENIZER, PROMPTS)]
    states = prompt_states(model, one[1].callback_handler.callbacks[-1].prompts, (1, 2))
    assert len({*answers}) > 1
    for rank, seen in enumerate(two[1]):
        assert seen["answers"] == answers and seen["synced"] == [None, True]
        for part, other in zip(torch.load(two[0] / f"states{rank}.pt"), states, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)
