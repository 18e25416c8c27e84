# SPDX-License-Identifier: Apache-2.0
"""DriftProbeCallback in real runs of a tiny model, alone and on two processes (DDP)."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import CITIES, build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs
from trl import SFTConfig, SFTTrainer
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.studies.drift.measurement import measure_drift, read_reference
from trl_selfdistill.studies.drift.probe import DriftProbeCallback


TOKENIZER = build_tokenizer()
HELD_OUT = Dataset.from_list(
    [{"subject": city, "question": f"Which country is {city} located in?"} for city in [*CITIES][:5]]
)
TRAIN = Dataset.from_list(
    [
        {"prompt": f"Q: {city}\nA:", "completion": f" {country}" * (1 + i % 3)}
        for i, (city, country) in enumerate(CITIES.items())
    ]
)
COSINES = [f"drift_cosine/layer_{layer}/last_{token}_token" for layer in (1, 2) for token in ("subject", "prompt")]


def make_trainer(folder, trainer_class=SFTTrainer, model=None, peft_config=None, eval_dataset=None, **config):
    settings = dict(output_dir=str(folder / "run"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    settings |= dict(max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no", seed=3)
    settings |= dict(logging_steps=1, gradient_checkpointing=False)
    config_class = SFTConfig if trainer_class is SFTTrainer else SelfDistillSFTConfig
    if trainer_class is FrozenGroupsSFTTrainer:
        config_class = SFTConfig
    # Dropout, so that the random state counts
    model = build_model(TOKENIZER, attention_dropout=0.2, initializer_range=0.4) if model is None else model
    options = dict(train_dataset=TRAIN, eval_dataset=eval_dataset, peft_config=peft_config)
    return trainer_class(model, config_class(**settings | config), processing_class=TOKENIZER, **options)


def run(folder, probe=None, resume=None, callbacks=(), **options):
    trainer = make_trainer(folder, **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    if probe is not None:
        trainer.add_callback(DriftProbeCallback(trainer, HELD_OUT, **{"every_steps": 2, **probe}))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def measured(trainer, name="drift_kl") -> dict[int, float]:
    """What was logged under a name, by step."""
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_weights(one, other):
    others = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, others[name]), name


class StopAt(TrainerCallback):
    """Ends the run after some steps, as a killed job: its schedule is that of the whole run."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


RUNS = {
    "SFT": dict(),
    "self-distillation": dict(trainer_class=SelfDistillSFTTrainer),
    "self-distillation of an adapter": dict(
        trainer_class=SelfDistillSFTTrainer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    ),
    "frozen groups": dict(trainer_class=FrozenGroupsSFTTrainer),
    "bf16, gradient checkpointing, accumulation": dict(
        bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_training_is_the_same_bit_for_bit(tmp_path, name):
    torch.manual_seed(0)
    without = run(tmp_path, **RUNS[name])
    torch.manual_seed(0)
    probed = run(tmp_path, {"attention": True, "batch_size": 2}, **RUNS[name])
    assert_same_weights(probed.model, without.model)
    assert losses(probed) == losses(without) and len(losses(probed)) == 6
    # So are the other logs of the training, but the times
    own = [log for log in probed.state.log_history if "drift_kl" not in log]
    for log, expected in zip(own, without.state.log_history, strict=True):
        names = {name for name in expected if not re.search("runtime|per_second", name)}
        assert {name: log[name] for name in names} == {name: expected[name] for name in names}
    for metric in [*COSINES, "drift_kl", "drift_attention/layer_1", "drift_attention/layer_2"]:
        values = measured(probed, metric)
        assert [*values] == [0, 2, 4, 6] and all(value >= -1e-15 for value in values.values())
        if "attention" in metric:
            assert all(0 < value < 1 for value in values.values())
        else:
            assert values[0] == pytest.approx(0, abs=1e-15) and values[6] > 1e-5
    assert probed.model.training == without.model.training


def test_a_quantised_model_goes_on_training(tmp_path):
    """bitsandbytes repacks weights in evaluation mode on some CPUs, and adapters would get no gradient after that."""
    pytest.importorskip("bitsandbytes")
    build_model(TOKENIZER, initializer_range=0.4).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    finished = []
    for probe in (None, {"attention": True}):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantisation, dtype=torch.float32, device_map={"": "cpu"}
        )
        finished.append(run(tmp_path, probe, model=model, peft_config=LoraConfig(target_modules=["q_proj"])))
    assert_same_weights(finished[1].model, finished[0].model)
    values = measured(finished[1])
    assert values[0] == 0 and values[6] > 1e-5


def test_the_log_has_the_distance_between_the_first_and_the_present_model(tmp_path):
    trainer = make_trainer(tmp_path)
    probe = DriftProbeCallback(trainer, HELD_OUT, every_steps=4)
    trainer.add_callback(probe)
    trainer.train()
    assert [*measured(trainer)] == [0, 4, 6]
    path = tmp_path / "run" / "_drift_reference.safetensors"
    reference = read_reference(path, probe.prompts, probe.layers)
    drift = measure_drift(trainer.model, reference, probe.prompts, (1, 2))
    for name, values in drift.items():
        assert measured(trainer, f"drift_{name}")[6] == pytest.approx(sum(values) / len(values))
    fresh = measure_drift(make_trainer(tmp_path).model, reference, probe.prompts, (1, 2))
    assert all(abs(value) < 1e-15 for values in fresh.values() for value in values)


@pytest.mark.parametrize("every_steps", [None, 100])
def test_off_it_does_nothing_and_on_it_measures_at_least_both_ends(tmp_path, monkeypatch, every_steps):
    hooked = []
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", lambda self, *args, **kw: hooked.append(self))
    trainer = make_trainer(tmp_path)
    hooked.clear()
    # Off, not even its input is looked at
    facts = None if every_steps is None else HELD_OUT
    trainer.add_callback(DriftProbeCallback(trainer, facts, every_steps=every_steps))
    calls = []
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: calls.append(trainer.model.training) or forward(*args, **kwargs)
    if every_steps is None:
        trainer.train()
        assert calls == [True] * 6 and not hooked
        assert not measured(trainer) and not [*Path(trainer.args.output_dir).glob("*drift*")]
    else:
        # Were the recorders of hidden states not installed, there would be nothing to measure
        with pytest.raises((IndexError, TypeError)):
            trainer.train()
        assert hooked and False in calls


def test_a_resumed_run_goes_on_from_the_first_model(tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    file = tmp_path / "drift.jsonl"
    whole = run(tmp_path / "whole", {"attention": True}, **options)
    run(tmp_path, {"output_file": file, "attention": True}, callbacks=[StopAt(4)], **options)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 2, 4]
    # Step 4 is done again
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = run(tmp_path, {"output_file": file, "attention": True}, resume=checkpoint, **options)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6] and lines[-1]["epoch"] == 2
    for name in [*COSINES, "drift_kl", "drift_attention/layer_2"]:
        assert measured(resumed, name) == measured(whole, name)
        assert {line["step"]: line[name] for line in lines} == measured(whole, name)
    # Killed after its last checkpoint, a run has no step left to do, and nothing to measure again
    before = file.read_text()
    run(tmp_path, {"output_file": file, "attention": True}, resume=str(tmp_path / "run" / "checkpoint-6"), **options)
    assert file.read_text() == before
    (tmp_path / "run" / "_drift_reference.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="There is no drift reference .*_drift_reference.safetensors"):
        run(tmp_path, {}, resume=checkpoint, **options)
    # A new run in the same folder starts from its own model, in the file as well
    again = run(tmp_path, {"output_file": file}, max_steps=1)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [*measured(again)] == [0, 1]


def test_other_facts_or_layers_are_refused_on_resuming(tmp_path):
    run(tmp_path, {}, save_strategy="steps", save_steps=2, max_steps=2)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(ValueError, match="measured with other layers"):
        run(tmp_path, {"layers": [2]}, resume=checkpoint)
    with pytest.raises(ValueError, match="measured with other prompts"):
        run(tmp_path, {"prompt_function": lambda question: f"{question} A:"}, resume=checkpoint)


def test_the_drift_goes_on_from_the_start_of_an_earlier_run(tmp_path):
    first = run(tmp_path / "first", {})
    reference = tmp_path / "first" / "run" / "_drift_reference.safetensors"
    second = run(tmp_path / "second", {"reference": reference, "prefix": "eval_drift"}, model=first.model)
    assert measured(second, "eval_drift_kl")[0] == pytest.approx(measured(first)[6])
    assert [*(tmp_path / "second" / "run").glob("_*")] == []


def test_two_probes_in_one_run_do_not_disturb_each_other(tmp_path):
    alone = run(tmp_path / "alone", {})
    trainer = make_trainer(tmp_path)
    for prefix, facts in (("known", HELD_OUT), ("other", HELD_OUT.select([0]))):
        trainer.add_callback(DriftProbeCallback(trainer, facts, every_steps=2, prefix=prefix))
    trainer.train()
    assert measured(trainer, "known_kl") == measured(alone) and [*measured(trainer, "other_kl")] == [0, 2, 4, 6]


def test_the_best_model_is_not_taken_for_the_last_step(tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", save_strategy="best")
    trainer = make_trainer(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, eval_dataset=TRAIN, **best)
    trainer.add_callback(DriftProbeCallback(trainer, HELD_OUT, every_steps=2))
    trainer.train()
    assert trainer.state.best_model_checkpoint and [*measured(trainer)] == [0, 2]


class Reporter(TrainerCallback):
    """What every integration of transformers is: a callback whose `on_log` gets numbers with a step."""

    def __init__(self):
        self.seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, value in rewrite_logs(logs).items():
            self.seen.setdefault(name, {})[state.global_step] = value


def test_every_reporter_gets_the_numbers(tmp_path):
    reporter = Reporter()
    trainer = run(tmp_path, {"attention": True}, callbacks=[reporter])
    for name in [*COSINES, "drift_kl", "drift_attention/layer_1"]:
        assert reporter.seen[f"train/{name}"] == measured(trainer, name)
        # TensorBoard drops what is neither an int nor a float
        assert {type(value) for value in reporter.seen[f"train/{name}"].values()} == {float}
    assert [*reporter.seen["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_mistakes_are_errors_before_the_training(tmp_path):
    trainer = make_trainer(tmp_path)

    def probe(facts=HELD_OUT, **options):
        return DriftProbeCallback(trainer, facts, **options)

    with pytest.raises(ValueError, match=r"`layers` has \[3\].*from 1 to 2"):
        probe(layers=[1, 3])
    rows = [*HELD_OUT.to_list(), {"subject": "Lyon", "question": "Which country is LYON in?"}]
    with pytest.raises(ValueError, match="The subject 'Lyon' is not in the question of the prompt 'Q: Which country"):
        probe(Dataset.from_list(rows))
    with pytest.raises(ValueError, match="does not contain its question"):
        probe(prompt_function=str.upper)
    with pytest.raises(ValueError, match=r"`facts` has no column \['subject'\]; it has \['question'\]"):
        probe(HELD_OUT.remove_columns("subject"))
    with pytest.raises(ValueError, match="`facts` is empty"):
        probe(HELD_OUT.select([]))
    for name in ("every_steps", "batch_size"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be a whole number from 1"):
                probe(**{name: value})
    for prefix in ("", "a/b"):
        with pytest.raises(ValueError, match=f"`prefix` is '{prefix}'"):
            probe(prefix=prefix)


def run_on_two_processes(folder: Path) -> None:
    trainer = run(folder, {"attention": True, "output_file": folder / "drift.jsonl"}, per_device_train_batch_size=1)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(trainer.state.log_history))


def test_two_processes_log_what_one_does(tmp_path):
    run_in_two_processes(__file__, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "drift.jsonl").read_text().splitlines()]
    for rank in range(2):
        log_history = json.loads((tmp_path / f"{rank}.json").read_text())
        rows = [log for log in log_history if "drift_kl" in log]
        assert [row["step"] for row in rows] == [0, 2, 4, 6]
        for row, line in zip(rows, lines, strict=True):
            assert row.keys() == line.keys() and all(row[name] == line[name] for name in row if "drift" in name)
    assert lines[-1]["drift_kl"] > 1e-4


if __name__ == "__main__":
    run_on_two_processes(Path(sys.argv[1]))
    leave_processes()
