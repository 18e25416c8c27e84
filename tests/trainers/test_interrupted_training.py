# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and resumed ends with the weights of one that was not; what it cannot continue is refused."""

import os
import shutil
import signal

import pytest
from conftest import build_model
from datasets import Dataset, List, Value
from sft_runs import FACTS, TOKENIZER, StopAt, architecture, assert_same_weights, forked, other_teacher, train, trainer
from transformers.trainer_callback import TrainerState
from trl import SFTTrainer

from trl_selfdistill.files import read_json
from trl_selfdistill.trainers.resume import describe_dataset, last_complete_checkpoint


# Six steps in two epochs, a checkpoint every other one; dropout, so that the random state counts as well
RUN = dict(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=2e-2)


def student():
    return build_model(TOKENIZER, attention_dropout=0.2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a teacher that nothing interrupts."""
    return train(tmp_path_factory.mktemp("whole"), student(), other_teacher(), **RUN)


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder, prepare, extra=dict, **options):
    """Trains in a process of its own, a fork of this one, until what `prepare` set up on the trainer kills it."""

    def work():
        run = trainer(folder, student(), extra(), **RUN, **options)
        prepare(run)
        run.train()

    process = forked(work)
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL


def half_the_weights(run):
    """Kills in the middle of the weights of checkpoint-4."""

    def save(output_dir, *args, **kwargs):
        write(output_dir, *args, **kwargs)
        if "checkpoint-4" in str(output_dir):
            file = os.path.join(output_dir, "model.safetensors")
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    write, run._save = run._save, save


def half_the_state(run):
    def save(self, path):
        if "checkpoint-4" in path:
            with open(path, "w") as file:
                file.write('{"global_step": 4, "ep')
            die()
        write(self, path)

    write, TrainerState.save_to_json = TrainerState.save_to_json, save  # in the process that dies


@pytest.mark.parametrize("kill", [half_the_weights, half_the_state])
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, whole, kill):
    run_and_die(tmp_path, kill, other_teacher)
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    resumed = train(tmp_path, student(), other_teacher(), resume=True, **RUN)
    assert resumed.state.global_step == 6
    assert_same_weights(resumed.model, whole.model)


def test_a_checkpoint_that_is_written_again_is_not_complete_meanwhile(tmp_path):
    """The end of an earlier run's checkpoint must not vouch for the beginning of a new one's."""
    train(tmp_path, student(), **RUN)
    (tmp_path / "run" / "checkpoint-4" / "model-1-of-2.safetensors").touch()
    run_and_die(tmp_path, half_the_weights)
    left = {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert not left & {"trainer_state.json", "model-1-of-2.safetensors"}
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()  # of the run before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at step 4, whose folder tests take copies of."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, student(), other_teacher() | dict(callbacks=[StopAt(4)]), **RUN)
    return folder


@pytest.fixture
def copy_of_stopped(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def test_there_is_nothing_to_resume_from(copy_of_stopped):
    checkpoints = [copy_of_stopped / "run" / f"checkpoint-{step}" for step in (10, 4, 6)]
    (copy_of_stopped / "run" / "checkpoint-2").rename(checkpoints[0])
    shutil.copytree(checkpoints[1], copy_of_stopped / "run" / "checkpoint-12-backup")
    assert last_complete_checkpoint(copy_of_stopped / "run") == str(checkpoints[0])  # by number
    for checkpoint in checkpoints[:2]:
        (checkpoint / "trainer_state.json").unlink()
    for checkpoint in checkpoints[1:]:
        with pytest.raises(ValueError, match=rf"Can't find a valid checkpoint at {checkpoint}: .*trainer_state"):
            train(copy_of_stopped, student(), other_teacher(), resume=str(checkpoint), **RUN)
    for folder in (copy_of_stopped / "nowhere", copy_of_stopped):
        with pytest.raises(ValueError, match="No valid checkpoint found.*: train from the start"):
            train(folder, student(), other_teacher(), resume=True, **RUN)


def tied_by_hand():
    """Only one of the tensors that share memory is in the file; the other must not be made anew."""
    model = student()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def experts_of_two_dtypes():
    """Their names in the file are others, so that the model is loaded anew: no weight may be rounded on the way."""
    model = architecture("mixtral").bfloat16()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "norm" in name else parameter.data
    return model


@pytest.mark.parametrize("make, bf16", [(tied_by_hand, False), (experts_of_two_dtypes, True)])
def test_weights_that_are_not_one_to_one_in_the_file_resume(tmp_path, make, bf16):
    resumes = (None, f"{tmp_path}/run/checkpoint-2")
    runs = [train(tmp_path, make(), resume=resume, bf16=bf16, **RUN) for resume in resumes]
    assert_same_weights(runs[1].model, runs[0].model)


def test_a_checkpoint_of_sft_trainer_resumes(tmp_path):
    sft = dict(callbacks=[StopAt(4)])
    train(tmp_path, student(), sft, SFTTrainer, **RUN)
    assert train(tmp_path, student(), resume=True, kl_weight=0, **RUN).state.global_step == 6


OTHER_ROWS = [{**FACTS[0], "completion": " Peru"}, *FACTS[1:]]


@pytest.mark.parametrize(
    "rows, options",
    [(OTHER_ROWS, {}), (FACTS[::-1], {}), (FACTS, dict(completion_only_loss=False)), (FACTS, dict(max_length=9))],
    ids=["a row", "order", "loss mask", "length"],
)
def test_a_dataset_that_changed_is_refused(copy_of_stopped, rows, options):
    extra = other_teacher() | dict(train_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="`train_dataset` is not the one .*checkpoint-4.*`ignore_data_skip=True`"):
        train(copy_of_stopped, student(), extra, resume=True, **RUN, **options)


@pytest.mark.parametrize("value", [1, 1.5, "a", ["a"], [1.5], [[1]], {"a": 1}, None], ids=str)
def test_a_column_that_happens_to_have_a_name_of_ours_is_no_part_of_the_data(value):
    tokens = Dataset.from_dict({"input_ids": [[3, 4], [5]]})
    named = Dataset.from_dict({"input_ids": [[3, 4], [5]], "seq_lengths": [value] * 2, "labels": [value] * 2})
    assert describe_dataset(named) == describe_dataset(tokens)
    assert describe_dataset(tokens) != describe_dataset(Dataset.from_dict({"input_ids": [[3], [4, 5]]}))


def test_the_same_data_by_other_ways_are_the_same(copy_of_stopped, whole):
    """Tokenised anew, in another order of columns, with others; tokens of int64, where SFTTrainer's are of int32."""
    rows = [
        {"seq_lengths": i, "completion": row["completion"], "prompt": row["prompt"]} for i, row in enumerate(FACTS)
    ]
    tokens = whole.train_dataset.select_columns(["input_ids", "labels"])
    tokens = tokens.cast_column("input_ids", List(Value("int64")))
    assert tokens.features != whole.train_dataset.select_columns(["input_ids", "labels"]).features
    for data in (Dataset.from_list(rows), tokens):
        extra = other_teacher() | dict(train_dataset=data)
        resumed = train(copy_of_stopped, student(), extra, resume=f"{copy_of_stopped}/run/checkpoint-4", **RUN)
        assert_same_weights(resumed.model, whole.model)


def test_other_data_are_taken_on_purpose(copy_of_stopped):
    other = other_teacher() | dict(train_dataset=Dataset.from_list(OTHER_ROWS))
    run = train(copy_of_stopped, student(), other, resume=True, ignore_data_skip=True, **RUN)
    assert run.state.global_step == 6
    run.train_dataset = run.train_dataset.select(range(4))
    run.train()  # with these from the start: its checkpoints are of them
    record = read_json(copy_of_stopped / "run" / "checkpoint-6" / "resume.json")
    assert record["training_data"] == describe_dataset(run.train_dataset)
