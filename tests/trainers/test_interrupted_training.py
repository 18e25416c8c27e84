# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, or whose disk is full, and resumed ends with the weights of one that was not."""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from conftest import build_model
from datasets import Dataset
from full_disk import file_size_limit
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from sft_runs import FACTS, TOKENIZER, StopAt, assert_same_weights, train, trainer
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_callback import TrainerState

from trl_selfdistill.trainers.checkpoints import find_checkpoint, last_complete_checkpoint


# Six steps in two epochs, a checkpoint every other one; dropout, so that the random state counts as well
RUN = dict(max_steps=6, save_strategy="steps", save_steps=2, learning_rate=2e-2)


def student():
    return build_model(TOKENIZER, attention_dropout=0.2)


def teacher():
    return build_model(TOKENIZER, seed=1, initializer_range=0.4)


def with_teacher():
    return dict(teacher_model=teacher())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing interrupts, each done once."""
    done = {}

    def run(name, extra=None, **options):
        if name not in done:
            done[name] = train(tmp_path_factory.mktemp("whole"), student(), extra, **RUN, **options)
        return done[name]

    return run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    """Kills the process when `event` comes in a step."""

    def __init__(self, event: str, step: int):
        setattr(self, event, lambda args, state, control, **kwargs: die() if state.global_step == step else None)


def run_and_die(folder, prepare, extra=None, model=student, **options):
    """Trains in a process of its own, a fork of this one, until what `prepare` set up on the trainer kills it."""

    def work():
        run = trainer(folder, model(), extra and extra(), **RUN, **options)
        prepare(run)
        run.train()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL


def in_checkpoint(step, method, kill):
    """Runs `kill(folder, original)` in place of a method of the trainer that gets the folder of a checkpoint."""

    def prepare(run):
        original = getattr(run, method)

        def patched(output_dir, *args, **kwargs):
            if f"checkpoint-{step}" in str(output_dir):
                kill(output_dir, lambda: original(output_dir, *args, **kwargs))
            return original(output_dir, *args, **kwargs)

        setattr(run, method, patched)

    return prepare


def half_the_weights(folder, original):
    original()
    file = os.path.join(folder, "model.safetensors")
    os.truncate(file, os.path.getsize(file) // 2)
    die()


def half_the_optimizer(folder, original):
    original()
    file = os.path.join(folder, "optimizer.pt")
    os.truncate(file, os.path.getsize(file) // 2)
    die()


def half_the_state(run):
    def save(self, path):
        if "checkpoint-4" in path:
            with open(path, "w") as file:
                file.write('{"global_step": 4, "ep')
            die()
        write(self, path)

    write, TrainerState.save_to_json = TrainerState.save_to_json, save  # in the process that dies


def in_the_rotation(run):
    """`save_total_limit=1` deletes checkpoint-2 when checkpoint-4 is whole."""

    def delete(path, **kwargs):
        os.remove(os.path.join(path, "model.safetensors"))
        die()

    shutil.rmtree = delete


KILLS = {
    "before the first step of an epoch": (lambda run: run.add_callback(KillAt("on_epoch_begin", 3)), 2),
    "before an optimizer step": (lambda run: run.add_callback(KillAt("on_pre_optimizer_step", 4)), 4),
    "after an optimizer step": (lambda run: run.add_callback(KillAt("on_optimizer_step", 2)), 2),
    "after a step": (lambda run: run.add_callback(KillAt("on_step_end", 5)), 4),
    "before a save": (lambda run: run.add_callback(KillAt("on_step_end", 4)), 2),
    "in the middle of the weights": (in_checkpoint(4, "_save", half_the_weights), 2),
    "between weights and optimizer": (in_checkpoint(4, "_save_optimizer_and_scheduler", lambda *_: die()), 2),
    "in the middle of the optimizer": (in_checkpoint(4, "_save_optimizer_and_scheduler", half_the_optimizer), 2),
    "before the random state": (in_checkpoint(4, "_save_rng_state", lambda *_: die()), 2),
    "in the middle of the trainer's state": (half_the_state, 2),
    "after a save": (lambda run: run.add_callback(KillAt("on_save", 4)), 4),
    "while an old checkpoint is deleted": (in_the_rotation, 4),
}


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, whole, kill):
    prepare, expected = KILLS[kill]
    options = dict(save_total_limit=1) if "deleted" in kill else {}
    run_and_die(tmp_path, prepare, with_teacher, **options)
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{expected}")
    resumed = train(tmp_path, student(), with_teacher(), resume=True, **RUN, **options)
    assert resumed.state.global_step == 6
    assert_same_weights(resumed.model, whole("teacher", with_teacher()).model)
    assert not torch.equal(resumed.model.lm_head.weight, student().lm_head.weight)


def test_the_killed_runs_of_an_adapter_and_of_a_stream_resume_too(tmp_path, whole):
    cases = {
        "adapter": lambda: dict(peft_config=LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.2)),
        "stream": lambda: dict(train_dataset=Dataset.from_list(FACTS).to_iterable_dataset()),
    }
    for name, extra in cases.items():
        run_and_die(tmp_path / name, lambda run: run.add_callback(KillAt("on_step_end", 3)), extra)
        resumed = train(tmp_path / name, student(), extra(), resume=True, **RUN)
        assert_same_weights(resumed.model, whole(name, extra()).model)


def trained_adapter(seed=5):
    model = student()
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.2, init_lora_weights=False)
    return get_peft_model(model, settings)


def in_the_kept_adapter(run):
    """The second adapter is kept when the first checkpoint is saved: killed when its folder is to take its place."""
    shutil.rmtree = lambda path, **kwargs: die() if str(path).endswith("_teacher") else None


def test_killed_with_a_second_adapter_as_the_teacher(tmp_path):
    whole = train(tmp_path / "whole", trained_adapter(), **RUN)
    run_and_die(tmp_path, in_the_kept_adapter, model=trained_adapter)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        train(tmp_path, trained_adapter(), resume=True, **RUN)
    run_and_die(tmp_path, lambda run: run.add_callback(KillAt("on_step_end", 5)), model=trained_adapter)
    # Another adapter is handed over, as a script does that makes it anew: the student's and the teacher's are restored
    resumed = train(tmp_path, trained_adapter(seed=6), resume=str(tmp_path / "run" / "checkpoint-4"), **RUN)
    assert_same_weights(resumed.model, whole.model)
    shutil.rmtree(tmp_path / "run" / "_teacher")
    with pytest.raises(ValueError, match="The teacher is not the one"):
        train(tmp_path, trained_adapter(seed=6), resume=True, **RUN)


def in_snapshot(method, kill):
    def prepare(run):
        original = getattr(run, method)

        def patched(output_dir, *args, **kwargs):
            if "_teacher" in str(output_dir):
                kill(output_dir, lambda: original(output_dir, *args, **kwargs))
            return original(output_dir, *args, **kwargs)

        setattr(run, method, patched)

    return prepare


def only_the_config(folder, original):
    os.makedirs(folder, exist_ok=True)
    student().config.save_pretrained(folder)
    die()


def saved_but_not_in_place(folder, original):
    original()
    die()


SNAPSHOT_KILLS = {
    "before the weights": in_snapshot("_save", only_the_config),
    "in the middle of the weights": in_snapshot("_save", half_the_weights),
    "before it is in place": in_snapshot("save_model", saved_but_not_in_place),
    "when it is in place": lambda run: setattr(run, "set_teacher", lambda teacher: die()),
    "in the next step": lambda run: run.add_callback(KillAt("on_step_begin", 3)),
    "after the next checkpoint": lambda run: run.add_callback(KillAt("on_step_end", 5)),
}


@pytest.mark.parametrize("kill", SNAPSHOT_KILLS)
def test_killed_around_the_snapshot(tmp_path, whole, kill):
    run_and_die(tmp_path, SNAPSHOT_KILLS[kill], teacher_snapshot_steps=3)
    resumed = train(tmp_path, student(), resume=True, teacher_snapshot_steps=3, **RUN)
    expected = whole("snapshot", teacher_snapshot_steps=3)
    assert_same_weights(resumed.model, expected.model)
    assert_same_weights(resumed.teacher_model, expected.teacher_model)
    assert {path.name for path in (tmp_path / "run").glob("_*")} == {"_teacher"}


def test_a_damaged_snapshot_is_refused(tmp_path):
    train(tmp_path, student(), dict(callbacks=[StopAt(4)]), teacher_snapshot_steps=3, **RUN)
    file = tmp_path / "run" / "_teacher" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"snapshot cannot be read: .*_teacher/model\.safetensors is cut off"):
        train(tmp_path, student(), resume=True, teacher_snapshot_steps=3, **RUN)
    file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])  # one bit of one weight
    with pytest.raises(ValueError, match="The teacher is not the one"):
        train(tmp_path, student(), resume=True, teacher_snapshot_steps=3, **RUN)


class FillDisk(TrainerCallback):
    """From a step on, no file may grow beyond `limit` bytes."""

    def __init__(self, step, limit):
        self.step, self.limit = step, limit

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.full = file_size_limit(self.limit)
            self.full.__enter__()


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, whole, what):
    extra = dict(teacher_model=teacher())
    expected = whole("teacher", extra)
    size = os.path.getsize(os.path.join(expected.args.output_dir, "checkpoint-2", what))
    full = FillDisk(2, size - 1)  # from here on, at least `what` does not fit
    run = trainer(tmp_path, student(), {**extra, "callbacks": [full]}, save_total_limit=1, **RUN)
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*Free some space.*checkpoint-2, which"):
            run.train()
    finally:
        full.full.__exit__(None, None, None)
    resumed = train(tmp_path, student(), dict(teacher_model=teacher()), resume=True, save_total_limit=1, **RUN)
    assert_same_weights(resumed.model, expected.model)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_full_disk_at_the_snapshot_says_so(tmp_path):
    options = RUN | dict(teacher_snapshot_steps=3)
    full = FillDisk(2, 2000)
    run = trainer(tmp_path, student(), dict(callbacks=[full]), **options)
    try:
        with pytest.raises(OSError, match=r"_teacher could not be written .*Free some space.*checkpoint-2, which"):
            run.train()
    finally:
        full.full.__exit__(None, None, None)
    assert not (tmp_path / "run" / "_teacher").exists()
    assert train(tmp_path, student(), resume=True, **options).state.global_step == 6


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped at step 4, whose folder tests take copies of."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, student(), dict(teacher_model=teacher(), callbacks=[StopAt(4)]), **RUN)
    return folder


@pytest.fixture
def copy_of_stopped(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def split_into_shards(folder):
    model = student()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    return shards[1]


@pytest.mark.parametrize("damage", ["truncated", "missing", "emptied"])
def test_a_damaged_shard_is_named(copy_of_stopped, damage):
    run = copy_of_stopped / "run"
    shard = split_into_shards(run / "checkpoint-4")
    assert find_checkpoint(str(run / "checkpoint-4"), "unused") is not None
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 1 if damage == "truncated" else 0)
    with pytest.raises(ValueError, match=rf"checkpoint-4: .*{shard.name} is .*beside it is .*checkpoint-2\."):
        train(copy_of_stopped, resume=str(run / "checkpoint-4"), **RUN)
    assert find_checkpoint(True, str(run)) == str(run / "checkpoint-2")
    assert (run / "checkpoint-4").is_dir() and (run / "checkpoint-2").is_dir()  # nothing is deleted


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_truncated_file_is_named(copy_of_stopped, name):
    file = copy_of_stopped / "run" / "checkpoint-4" / name
    os.truncate(file, file.stat().st_size - 30)
    with pytest.raises(ValueError, match=f"{name} is cut off"):
        train(copy_of_stopped, resume=str(file.parent), **RUN)


def test_there_is_nothing_to_resume_from(copy_of_stopped):
    run = copy_of_stopped / "run"
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(
        ValueError, match=r"Can't find a valid checkpoint at .*-4: there is no such folder.*checkpoint-2"
    ):
        train(copy_of_stopped, resume=str(run / "checkpoint-4"), **RUN)
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="No valid checkpoint .* checkpoint-2: it has no trainer_state.json.* anew"):
        train(copy_of_stopped, resume=True, **RUN)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        train(copy_of_stopped / "nowhere", resume=True, **RUN)


def test_a_checkpoint_that_is_written_again_is_not_complete_meanwhile(tmp_path):
    """The end of an earlier run's checkpoint must not vouch for the beginning of a new one's."""
    train(tmp_path, student(), **RUN)
    run_and_die(tmp_path, in_checkpoint(4, "_save_optimizer_and_scheduler", lambda *_: die()))
    assert not (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").exists()
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()  # of the run before


OTHER_ROWS = [{**FACTS[0], "completion": " Peru"}, *FACTS[1:]]


@pytest.mark.parametrize(
    "rows, options",
    [
        (OTHER_ROWS, {}),
        (FACTS[:-1], {}),
        (FACTS[::-1], {}),
        (FACTS, dict(completion_only_loss=False)),
        (FACTS, dict(max_length=9)),
    ],
    ids=["a row", "fewer", "order", "loss mask", "length"],
)
def test_a_dataset_that_changed_is_refused(copy_of_stopped, rows, options):
    extra = dict(teacher_model=teacher(), train_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="`train_dataset` is not the one .*checkpoint-4.*`ignore_data_skip=True`"):
        train(copy_of_stopped, student(), extra, resume=True, **RUN, **options)


def test_the_same_data_by_other_ways_are_the_same(copy_of_stopped, whole):
    """Tokenised anew, in another order of columns, with another one; and on purpose with other data."""
    rows = [
        {"source": index, "completion": row["completion"], "prompt": row["prompt"]} for index, row in enumerate(FACTS)
    ]
    extra = dict(teacher_model=teacher(), train_dataset=Dataset.from_list(rows))
    resumed = train(copy_of_stopped, student(), extra, resume=True, **RUN)
    assert_same_weights(resumed.model, whole("teacher", dict(teacher_model=teacher())).model)
    other = dict(teacher_model=teacher(), train_dataset=Dataset.from_list(OTHER_ROWS))
    train(copy_of_stopped, student(), other, resume=True, ignore_data_skip=True, **{**RUN, "max_steps": 8})


def test_what_a_checkpoint_says_of_the_data(stopped, tmp_path):
    records = [
        json.loads((path / "training_data.json").read_text()) for path in (stopped / "run").glob("checkpoint-*")
    ]
    assert records[0] == records[1] and records[0]["num_rows"] == len(FACTS) and len(records[0]["sha256"]) == 64
    stream = dict(train_dataset=Dataset.from_list(FACTS).to_iterable_dataset(), callbacks=[StopAt(2)])
    train(tmp_path, student(), stream, **RUN)
    assert not (tmp_path / "run" / "checkpoint-2" / "training_data.json").exists()


def test_another_teacher_is_refused(tmp_path, whole):
    train(tmp_path, student(), dict(callbacks=[StopAt(4)]), **RUN)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    others = {
        "the drifted student": (AutoModelForCausalLM.from_pretrained(checkpoint), {}, {}),
        "another model": (student(), dict(teacher_model=teacher()), {}),
        "another precision": (student().bfloat16(), {}, {}),
        "a snapshot": (student(), {}, dict(teacher_snapshot_steps=3)),
    }
    for name, (model, extra, options) in others.items():
        with pytest.raises((ValueError, FileNotFoundError), match="teacher"):
            train(tmp_path, model, extra, resume=True, **RUN, **options)
            pytest.fail(name)
    assert_same_weights(train(tmp_path, student(), resume=True, **RUN).model, whole("copy").model)


def test_a_teacher_that_is_gone_is_refused(tmp_path):
    folder = tmp_path / "teacher"
    teacher().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    named = dict(teacher_model_name_or_path=str(folder))
    train(tmp_path, student(), dict(callbacks=[StopAt(4)]), **RUN, **named)
    assert json.loads((tmp_path / "run" / "checkpoint-4" / "teacher.json").read_text())["name_or_path"] == str(folder)
    with pytest.raises(ValueError, match=f"The teacher is not the one .*{folder}"):  # the default is a copy
        train(tmp_path, student(), resume=True, **RUN)
    shutil.rmtree(folder)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        train(tmp_path, student(), resume=True, **RUN, **named)


def test_a_checkpoint_without_a_teacher_is_refused(tmp_path):
    train(tmp_path, student(), dict(callbacks=[StopAt(4)]), kl_weight=0, **RUN)
    with pytest.raises(ValueError, match=r"has no teacher\.json"):
        train(tmp_path, student(), resume=True, **RUN)


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path):
    class Broken(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise SafetensorError("not a disk")

    with pytest.raises(SafetensorError, match="not a disk"):
        train(tmp_path, student(), dict(callbacks=[Broken()]), **RUN)
