# SPDX-License-Identifier: Apache-2.0
"""`precompute_teacher`: the run is that of a teacher in memory, and there is none."""

import gc
import json
import multiprocessing
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sft_runs import FACTS, TOKENIZER, StopAt, architecture, assert_same_weights, config, logs, train, trainer

from trl_selfdistill.losses import ModelSide
from trl_selfdistill.trainers import hidden_state_cache
from trl_selfdistill.trainers.hidden_state_cache import HiddenStateCache
from trl_selfdistill.trainers.teacher import ModelTeacher


# The batches of the cache are padded otherwise than those of training, which changes the last bits
CLOSE = dict(rtol=1e-4, atol=1e-6)
ROWS = [FACTS[i % len(FACTS)] | {"prompt": f"Q: {i} {FACTS[i % len(FACTS)]['prompt']}"} for i in range(23)]


def cached(folder, **options) -> dict:
    return (
        dict(precompute_teacher=True, teacher_cache_dir=str(folder / "cache"), teacher_cache_dtype="float32") | options
    )


def data(rows=ROWS) -> dict:
    return {"train_dataset": Dataset.from_list(rows)}


def losses(run) -> list[float]:
    return [row[key] for row in logs(run) for key in ("loss", "kl_loss", "ce_loss") if key in row]


def cache_folders(folder) -> list[Path]:
    return sorted(path for path in (folder / "cache").iterdir() if path.is_dir())


PATHS = {
    "plain": {},
    "epochs": dict(max_steps=-1, num_train_epochs=3),
    "accumulation": dict(gradient_accumulation_steps=3),
    "bfd": dict(packing=True, max_length=40),
    "bfd_split": dict(packing=True, packing_strategy="bfd_split", max_length=24),
    "wrapped": dict(packing=True, packing_strategy="wrapped", max_length=24),
    "padding_free": dict(padding_free=True, max_length=None),
    "shuffled": dict(shuffle_dataset=True),
    "grouped": dict(train_sampling_strategy="group_by_length"),
    "whole text": dict(completion_only_loss=False),
    "workers": dict(dataloader_num_workers=1),
    "kept columns": dict(remove_unused_columns=False),
    "checkpointed": dict(gradient_checkpointing=True),
    "dft": dict(loss_type="dft"),
    "smoothed": dict(label_smoothing_factor=0.1),
    "bf16": dict(bf16=True),
    "tempered": dict(kl_weight=0.5, temperature=2.0),
    "frozen": dict(trainable_groups=["attention"]),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_run_is_that_of_a_teacher_in_memory(tmp_path, name):
    options = dict(max_steps=6) | PATHS[name]
    reference = train(tmp_path, arguments=data(), **options)
    run = train(tmp_path, arguments=data(), **options, **cached(tmp_path))
    tolerance = dict(rtol=2e-2, atol=2e-4) if name == "bf16" else CLOSE
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), **tolerance)
    assert sum(row.get("kl_loss", 0) for row in logs(run)) > 0
    if name != "bf16":
        assert_same_weights(run.model, reference.model, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "granite", "gpt2", "phi", "qwen3_moe"])
def test_the_run_is_that_of_a_teacher_in_memory_in_every_family(tmp_path, family):
    reference = train(tmp_path, architecture(family), arguments=data(), max_steps=4)
    run = train(tmp_path, architecture(family), arguments=data(), max_steps=4, **cached(tmp_path))
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), **CLOSE)


@pytest.mark.parametrize("kind", ["fresh", "trained", "whole head"])
def test_the_run_is_that_of_an_adapter_teacher(tmp_path, kind):
    def adapted():
        torch.manual_seed(1)
        modules = ["lm_head"] if kind == "whole head" else None
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=modules)
        peft_model = get_peft_model(build_model(TOKENIZER), adapter)
        if kind == "trained":
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        return peft_model

    options = dict(max_steps=5)
    reference = train(tmp_path, adapted(), arguments=data(), **options)
    run = train(tmp_path, adapted(), arguments=data(), **options, **cached(tmp_path))
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), **CLOSE)
    assert list(run.model.peft_config) == ["default"]
    assert run.teacher.sha256 == reference.teacher.sha256


def test_a_given_teacher(tmp_path):
    def arguments():
        return {**data(), "teacher_model": build_model(TOKENIZER, seed=7, hidden_size=24)}

    reference = train(tmp_path, arguments=arguments())
    run = train(tmp_path, arguments=arguments(), **cached(tmp_path))
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), **CLOSE)


def test_bf16_is_the_teacher_with_rounded_hidden_states(tmp_path, monkeypatch):
    run = train(tmp_path, arguments=data(), **cached(tmp_path, teacher_cache_dtype="bfloat16"))
    exact = ModelTeacher.targets

    def rounded(self, student, inputs):
        side = exact(self, student, inputs)
        return ModelSide(side.hidden_states.to(torch.bfloat16).float(), side.lm_head)

    monkeypatch.setattr(ModelTeacher, "targets", rounded)
    reference = train(tmp_path, arguments=data())
    # Where a last bit decides the rounding, a number may be one bf16 step apart
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(reference)), rtol=1e-3, atol=1e-4)


def test_evaluation_sets_have_their_answers_too(tmp_path):
    sets = {"seen": Dataset.from_list(ROWS[:5]), "other": Dataset.from_list(ROWS[7:14])}
    arguments = {**data(), "eval_dataset": sets}
    reference = train(tmp_path, arguments=arguments)
    run = train(tmp_path, arguments=arguments, **cached(tmp_path))
    for each in (reference, run):
        each.evaluate()
    evaluations = [[row for row in logs(each) if "eval_kl_loss" in row] for each in (reference, run)]
    assert [len(rows) for rows in evaluations] == [2, 2] and evaluations[1][1]["eval_kl_loss"] > 0
    for expected, row in zip(*evaluations, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="another one.*eval_dataset"):
        run.evaluate(Dataset.from_list(ROWS[:3]))


def test_no_teacher_is_alive(tmp_path):
    given = build_model(TOKENIZER, seed=7)
    watch = weakref.ref(given), weakref.ref(given.model.layers[0].mlp.up_proj.weight)
    arguments = {**data(), "teacher_model": given}
    run = trainer(tmp_path, arguments=arguments, **cached(tmp_path))
    del given, arguments
    gc.collect()
    assert watch[0]() is None and watch[1]() is None and run.teacher_model is None


def test_a_copy_of_the_model_is_never_made(tmp_path, monkeypatch):
    import trl_selfdistill.trainers.self_distill_sft_trainer as module

    def refuse(model):
        raise AssertionError("copied")

    monkeypatch.setattr(module, "frozen_copy", refuse)
    train(tmp_path, arguments=data(), **cached(tmp_path))


def chunk_times(folder) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("chunk-*")}


def test_a_second_run_takes_what_is_there(tmp_path, capsys):
    first = train(tmp_path, arguments=data(), **cached(tmp_path))
    [folder] = cache_folders(tmp_path)
    output = capsys.readouterr().out
    assert (
        "label tokens x 16 x 4 bytes" in output and str(folder) in output and "16 of 16" not in output.split("0 of")[0]
    )
    before = chunk_times(folder)
    second = train(tmp_path, arguments=data(), **cached(tmp_path))
    assert chunk_times(folder) == before and losses(second) == losses(first)
    assert f"0 of {len(before)} chunks are to be made" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        dict(packing=True, packing_strategy="wrapped", max_length=24),
        dict(max_length=20),
        dict(completion_only_loss=False),
        dict(bf16=True),
        dict(teacher_cache_dtype="bfloat16"),
        dict(padding_free=True, max_length=None),
        dict(seed=4, shuffle_dataset=True),
    ],
    ids=str,
)
def test_what_the_answers_depend_on_makes_a_new_cache(tmp_path, change):
    trainer(tmp_path, arguments=data(), **cached(tmp_path))
    trainer(tmp_path, arguments=data(), **cached(tmp_path) | change)
    assert len(cache_folders(tmp_path)) == 2


def test_another_teacher_template_or_row_makes_a_new_cache(tmp_path):
    trainer(tmp_path, arguments=data(), **cached(tmp_path))
    trainer(tmp_path, build_model(TOKENIZER, seed=1), arguments=data(), **cached(tmp_path))
    trainer(tmp_path, build_model(TOKENIZER, rope_theta=77.0), arguments=data(), **cached(tmp_path))
    trainer(tmp_path, arguments=data(ROWS[:-1]), **cached(tmp_path))
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    trainer(tmp_path, arguments={**data(), "processing_class": tokenizer}, **cached(tmp_path))
    assert len(cache_folders(tmp_path)) == 5


def test_an_adapter_with_another_scale_makes_a_new_cache(tmp_path):
    for alpha in (1, 64):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=alpha)
        given = data() | dict(teacher_model=get_peft_model(build_model(TOKENIZER), config))
        trainer(tmp_path, arguments=given, **cached(tmp_path))
    assert len(cache_folders(tmp_path)) == 2


def test_what_they_do_not_depend_on_makes_none(tmp_path):
    for options in ({}, dict(learning_rate=0.1), dict(kl_weight=3.0), dict(per_device_train_batch_size=5)):
        trainer(tmp_path, arguments=data(), **cached(tmp_path), **options)
    assert len(cache_folders(tmp_path)) == 1


def test_a_cache_that_was_cut_off_is_completed(tmp_path):
    reference = train(tmp_path, arguments=data(), **cached(tmp_path))
    [folder] = cache_folders(tmp_path)
    kept = chunk_times(folder)
    gone = sorted(kept)[2::3]
    for name in gone:
        (folder / name).unlink()
        del kept[name]
    run = train(tmp_path, arguments=data(), **cached(tmp_path))
    assert kept.items() <= chunk_times(folder).items() and set(gone) <= chunk_times(folder).keys()
    assert losses(run) == losses(reference)


def in_a_process_of_its_own(work) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize("when", ["layout", "first chunk", "in the middle of a chunk", "last chunk"])
def test_a_kill_while_the_cache_is_written_changes_nothing(tmp_path, when):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        write = HiddenStateCache.write

        def dying(cache, chunk, *tensors):
            if when == "first chunk" or (when == "last chunk" and chunk == len(cache.chunks) - 1):
                die()
            if when == "in the middle of a chunk" and chunk == 5:
                hidden_state_cache.os.replace = die
            write(cache, chunk, *tensors)

        HiddenStateCache.write = dying
        if when == "layout":
            hidden_state_cache.os.replace = die
        trainer(tmp_path, arguments=data(), **cached(tmp_path))

    process = in_a_process_of_its_own(work)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    run = train(tmp_path, arguments=data(), **cached(tmp_path))
    whole = train(tmp_path / "whole", arguments=data(), **cached(tmp_path / "whole"))
    assert losses(run) == losses(whole)
    assert_same_weights(run.model, whole.model)


def test_jobs_that_start_together_share_one_cache(tmp_path):
    def work(name):
        run = train(tmp_path / name, arguments=data(), **cached(tmp_path))
        (tmp_path / f"{name}.json").write_text(json.dumps(losses(run)))

    jobs = [in_a_process_of_its_own(lambda name=name: work(name)) for name in ("a", "b", "c")]
    for job in jobs:
        job.join(timeout=120)
        assert job.exitcode == 0
    assert len(cache_folders(tmp_path)) == 1
    expected = losses(train(tmp_path / "d", arguments=data(), **cached(tmp_path / "d")))
    assert all(json.loads((tmp_path / f"{name}.json").read_text()) == expected for name in ("a", "b", "c"))


def test_a_damaged_cache_is_refused_by_name(tmp_path):
    trainer(tmp_path, arguments=data(), **cached(tmp_path))
    [folder] = cache_folders(tmp_path)
    file = sorted(folder.glob("chunk-*"))[3]
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged.*Delete the file"):
        trainer(tmp_path, arguments=data(), **cached(tmp_path))
    file.unlink()
    trainer(tmp_path, arguments=data(), **cached(tmp_path))


def test_a_full_disk_is_refused_before_the_teacher_runs(tmp_path, monkeypatch):
    usage = hidden_state_cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hidden_state_cache.shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(OSError, match="needs .* kB more in .* has 100 B free"):
        trainer(tmp_path, arguments=data(), **cached(tmp_path))
    [folder] = cache_folders(tmp_path)
    assert not list(folder.glob("chunk-*"))


def test_resuming_is_exact_with_and_without_the_cache(tmp_path):
    options = dict(max_steps=8, save_strategy="steps", save_steps=4, **cached(tmp_path))
    whole = train(tmp_path / "whole", arguments=data(), **options)
    train(tmp_path / "cut", arguments={**data(), "callbacks": [StopAt(4)]}, **options)
    record = json.loads((tmp_path / "cut/run/checkpoint-4/teacher.json").read_text())
    assert record["sha256"] == whole.teacher.sha256
    resumed = train(tmp_path / "cut", arguments=data(), resume=True, **options)
    assert_same_weights(resumed.model, whole.model)
    without = dict(max_steps=8, save_strategy="no")
    resumed = train(tmp_path / "cut", arguments=data(), resume=str(tmp_path / "cut/run/checkpoint-4"), **without)
    assert_same_weights(resumed.model, whole.model, rtol=1e-3, atol=1e-5)


def test_the_drifted_student_is_refused_as_the_teacher(tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=2, **cached(tmp_path))
    run = train(tmp_path, arguments=data(), **options)
    with pytest.raises(ValueError, match="The teacher is not the one"):
        train(tmp_path, run.model, arguments=data(), resume=True, **options)


def test_nothing_of_the_cache_is_in_the_output(tmp_path):
    train(tmp_path, arguments=data(), save_strategy="steps", save_steps=1, **cached(tmp_path))
    assert not [path for path in (tmp_path / "run").rglob("*") if "chunk-" in path.name or "cache" in path.name]


def test_streams_are_refused(tmp_path):
    stream = {"train_dataset": Dataset.from_list(ROWS).to_iterable_dataset()}
    with pytest.raises(ValueError, match="`train_dataset` is a stream"):
        trainer(tmp_path, arguments=stream, **cached(tmp_path))
    stream = {**data(), "eval_dataset": {"held": Dataset.from_list(ROWS).to_iterable_dataset()}}
    with pytest.raises(ValueError, match=r"`eval_dataset\['held'\]` is a stream"):
        trainer(tmp_path, arguments=stream, **cached(tmp_path))


def test_a_collator_that_changes_the_labels_is_refused(tmp_path):
    class Shuffling:
        """Makes other labels of a row in training than before it."""

        def __init__(self, collator):
            self.collator, self.calls = collator, 0

        def __call__(self, examples):
            self.calls += 1
            batch = self.collator(examples)
            if len(examples) > 1:
                batch["labels"] = torch.where(batch["labels"] == -100, -100, (batch["labels"] + self.calls) % 200)
            return batch

    run = trainer(tmp_path, arguments=data())
    arguments = {**data(), "data_collator": Shuffling(run.data_collator)}
    with pytest.raises(ValueError, match="labels of this batch.*data_collator"):
        train(tmp_path, arguments=arguments, **cached(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(precompute_teacher=True, teacher_snapshot_steps=3), "teacher_snapshot_steps"),
        (dict(precompute_teacher=True, teacher_snapshot_epochs=1.0), "teacher_snapshot_epochs"),
        (dict(precompute_teacher=True, teacher_cache_dtype="float16"), "bfloat16, float32, got 'float16'"),
        (dict(teacher_cache_dir="somewhere"), "precompute_teacher` is not set"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_cache_inside_what_is_pushed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="inside `output_dir="):
        trainer(tmp_path, **cached(tmp_path / "run"))


def test_without_a_kl_there_is_no_cache(tmp_path):
    train(tmp_path, arguments=data(), kl_weight=0.0, **cached(tmp_path))
    assert not (tmp_path / "cache").exists()
