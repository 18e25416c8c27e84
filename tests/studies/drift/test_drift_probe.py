# SPDX-License-Identifier: Apache-2.0
"""DriftProbeCallback in real runs of a tiny model."""

import pytest
from conftest import CITIES, build_model
from datasets import Dataset
from sft_runs import FACTS, TOKENIZER, trainer
from trl import SFTTrainer

from trl_selfdistill.files import read_jsonl
from trl_selfdistill.studies.drift import DriftProbeCallback
from trl_selfdistill.studies.drift.prompt_states import drift, prompt_states


SUBJECTS = [*CITIES][:5]
HELD_OUT = Dataset.from_dict({"subject": SUBJECTS, "question": [f"Which country is {city} in?" for city in SUBJECTS]})
NAMES = [f"drift_cosine/layer_{layer}/last_{token}_token" for layer in (1, 2) for token in ("subject", "prompt")]
NAMES += ["drift_kl"]


def dropout_model():
    """Dropout makes the random state count."""
    return build_model(TOKENIZER, attention_dropout=0.2, initializer_range=0.4)


def run(folder, probe, resume=None, **options):
    trained = trainer(folder, dropout_model(), trainer_class=SFTTrainer, **options)
    trained.add_callback(DriftProbeCallback(trained, HELD_OUT, **{"every_steps": 2, **probe}))
    trained.train(resume_from_checkpoint=resume)
    return trained


def measured(trainer, name="drift_kl") -> dict[int, float]:
    """What was logged under a name, by step."""
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def test_the_log_has_the_drift_from_the_first_model_and_a_resumed_run_goes_on_from_it(tmp_path):
    options, file = dict(save_strategy="steps", save_steps=1, max_steps=3), tmp_path / "drift.jsonl"
    probe = {"output_file": file, "every_steps": 1}
    whole = run(tmp_path, probe, **options)
    prompts, lines = whole.callback_handler.callbacks[-1].prompts, read_jsonl(file)
    first, last = (prompt_states(model, prompts, (1, 2)) for model in (dropout_model(), whole.model))
    for name, values in drift(first, last, (1, 2)).items():
        assert measured(whole, f"drift_{name}")[3] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert all(lines[0][name] == pytest.approx(0, abs=1e-15) for name in NAMES)
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[-1]["epoch"] == 1
    assert all({line["step"]: line[name] for line in lines} == measured(whole, name) for name in NAMES)
    # Steps 2 and 3 are done again, and after the last checkpoint none
    for checkpoint in ("checkpoint-1", "checkpoint-3"):
        resumed = run(tmp_path, probe, resume=str(tmp_path / "run" / checkpoint), **options)
        assert measured(resumed) == measured(whole) and read_jsonl(file) == lines
    with pytest.raises(ValueError, match="is of other facts, layers or prompts"):
        run(tmp_path, {"layers": [2]}, resume=str(tmp_path / "run" / "checkpoint-1"))
    (tmp_path / "run" / "_drift_reference.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="_drift_reference.safetensors"):
        run(tmp_path, {}, resume=str(tmp_path / "run" / "checkpoint-1"))
    # A new run in the same folder starts from its own model, in the file as well
    again = run(tmp_path, {"output_file": file}, max_steps=1)
    assert [line["step"] for line in read_jsonl(file)] == [*measured(again)] == [0, 1]


def test_the_best_model_is_not_taken_for_the_last_step(tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", save_strategy="steps", save_steps=1)
    best |= dict(eval_strategy="steps", eval_steps=1, arguments=dict(eval_dataset=Dataset.from_list(FACTS)))
    trainer = run(tmp_path, {}, max_steps=3, **best)
    assert trainer.state.best_model_checkpoint and [*measured(trainer)] == [0, 2]


def test_mistakes_are_errors_before_the_training(tmp_path):
    for facts, options, message in (
        (HELD_OUT.select([]), {}, "`facts` is empty"),
        (HELD_OUT, dict(every_steps=0), "`every_steps` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DriftProbeCallback(trainer(tmp_path), facts, **options)
