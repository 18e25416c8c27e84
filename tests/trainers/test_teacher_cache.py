# SPDX-License-Identifier: Apache-2.0
"""`precompute_teacher`: the run is that of a teacher in memory, and there is no teacher in memory."""

import gc
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build_model, build_tokenizer
from datasets import Dataset, List, Value
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sft_runs import FACTS, ROUNDING, TINY, TOKENIZER, architecture, forked, logs, train, trainer
from transformers import AutoModelForCausalLM, MambaConfig, TrainingArguments

from trl_selfdistill.losses import ModelSide
from trl_selfdistill.trainers import teacher_cache
from trl_selfdistill.trainers.teachers import ModelTeacher


# The batches of the cache are padded otherwise than those of training, which changes the last bits
CLOSE = dict(rtol=1e-4, atol=1e-6 + ROUNDING)
ROWS = [FACTS[i % len(FACTS)] | {"prompt": f"Q: {i} {FACTS[i % len(FACTS)]['prompt']}"} for i in range(11)]


def cached(folder, **options) -> dict:
    settings = dict(precompute_teacher=True, teacher_cache_dir=str(folder / "cache"), teacher_cache_dtype="float32")
    return settings | options


def data(rows=ROWS) -> dict:
    return {"train_dataset": Dataset.from_list(rows)}


def losses(run) -> torch.Tensor:
    return torch.tensor([row[key] for row in logs(run) for key in ("loss", "kl_loss", "ce_loss") if key in row])


def caches(folder) -> dict[str, int]:
    """The caches in a folder, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir() if path.is_dir()}


def given_teacher() -> dict:
    return {"teacher_model": build_model(TOKENIZER, seed=7, hidden_size=24)}


def adapted(modules_to_save=None, trained=False):
    torch.manual_seed(1)
    adapter = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=modules_to_save, init_lora_weights=not trained
    )
    return get_peft_model(build_model(TOKENIZER), adapter)


MOE = dict(model=lambda: architecture("qwen3_moe"))
NEW_NAME = hasattr(TrainingArguments, "train_sampling_strategy")  # later than transformers 5.0
BY_LENGTH = dict(train_sampling_strategy="group_by_length") if NEW_NAME else dict(group_by_length=True)
# Options of the config; `model` and `arguments` make a model and further arguments of the trainer
PATHS = {
    "another teacher": dict(arguments=given_teacher, max_steps=-1, num_train_epochs=2),
    "softcap": dict(model=lambda: architecture("gemma2")),
    "experts": MOE | dict(dataloader_num_workers=1),
    "bfd_split": dict(packing=True, packing_strategy="bfd_split", max_length=24, gradient_accumulation_steps=2),
    "padding_free": dict(padding_free=True, max_length=None, **BY_LENGTH),
    "kept columns": dict(remove_unused_columns=False, shuffle_dataset=True, trainable_groups=["attention"]),
    "dispatched": dict(accelerator_config={"dispatch_batches": True}),
    "dft": dict(loss_type="dft", gradient_checkpointing=True),
    "bf16": dict(bf16=True, kl_weight=0.5, temperature=2.0),
    "fresh adapter": dict(model=adapted),
    "trained adapter": dict(model=lambda: adapted(trained=True)),
    "adapter and head": dict(model=lambda: adapted(["lm_head"])),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_run_is_that_of_a_teacher_in_memory(tmp_path, name):
    options = dict(max_steps=4) | PATHS[name]
    model, arguments = options.pop("model", lambda: None), options.pop("arguments", dict)
    reference = train(tmp_path, model(), data() | arguments(), **options)
    run = train(tmp_path, model(), data() | arguments(), **options, **cached(tmp_path))
    tolerance = dict(rtol=2e-2, atol=2e-4) if name == "bf16" else CLOSE
    torch.testing.assert_close(losses(run), losses(reference), **tolerance)
    assert sum(row.get("kl_loss", 0) for row in logs(run)) > 0
    assert run.teacher.sha256 == reference.teacher.sha256 and run.teacher_model is None
    assert list(getattr(run.model, "peft_config", {})) in ([], ["default"])


def test_bf16_is_the_teacher_with_rounded_hidden_states(tmp_path, monkeypatch):
    run = train(tmp_path, arguments=data(), **cached(tmp_path, teacher_cache_dtype="bfloat16"))
    exact = ModelTeacher.targets

    def rounded(self, student, inputs):
        side = exact(self, student, inputs)
        return ModelSide(side.hidden_states.to(torch.bfloat16).float(), side.lm_head)

    monkeypatch.setattr(ModelTeacher, "targets", rounded)
    reference = train(tmp_path, arguments=data())
    # Where a last bit decides the rounding, a number may be one bf16 step apart
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-3, atol=1e-4)


def test_evaluation_sets_have_their_answers_too(tmp_path):
    sets = {"seen": Dataset.from_list(ROWS[:5]), "other": Dataset.from_list(ROWS[7:])}
    reference = train(tmp_path, arguments=data() | dict(eval_dataset=dict(sets)))
    run = train(tmp_path, arguments=data() | dict(eval_dataset=dict(sets)), **cached(tmp_path))
    for name in sets:
        expected, found = (each.evaluate()[f"eval_{name}_loss"] for each in (reference, run))
        assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="another one.*eval_dataset"):
        run.evaluate(Dataset.from_list(ROWS[:3]))


def test_no_teacher_is_in_memory(tmp_path):
    given = build_model(TOKENIZER, seed=7)
    watch = weakref.ref(given), weakref.ref(given.model.layers[0].mlp.up_proj.weight)
    run = trainer(tmp_path, arguments=data() | {"teacher_model": given}, **cached(tmp_path))
    del given
    gc.collect()
    assert watch[0]() is None and watch[1]() is None and run.teacher_model is None


def other_end() -> dict:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    return {"processing_class": tokenizer}


CHANGES = {
    "packing": dict(packing=True, packing_strategy="wrapped", max_length=24),
    "joined": dict(padding_free=True, max_length=None),
    "labels": dict(completion_only_loss=False),
    "precision": dict(bf16=True),
    "dtype": dict(teacher_cache_dtype="bfloat16"),
    "order": dict(seed=4, shuffle_dataset=True),
    "weights": dict(model=build_model(TOKENIZER, seed=1)),
    "config": dict(model=build_model(TOKENIZER, rope_theta=77.0)),
    "rows": dict(arguments=data(ROWS[:-1])),
    "tokens": dict(arguments=data() | other_end()),
}


def test_a_cache_is_found_again_and_anything_it_depends_on_makes_another(tmp_path):
    first = train(tmp_path, arguments=data(), **cached(tmp_path))
    before = caches(tmp_path)
    same = dict(learning_rate=0.1, kl_weight=3.0, per_device_train_batch_size=5)
    trainer(tmp_path, arguments=data(), **cached(tmp_path), **same)
    second = train(tmp_path, arguments=data(), **cached(tmp_path))
    assert caches(tmp_path) == before and torch.equal(losses(second), losses(first))
    for number, (name, change) in enumerate(CHANGES.items(), start=2):
        options = dict(change)
        model, arguments = options.pop("model", None), options.pop("arguments", data())
        trainer(tmp_path, model, arguments, **cached(tmp_path) | options)
        assert len(caches(tmp_path)) == number, name


def test_a_killed_or_parallel_run_leaves_a_whole_cache_or_none(tmp_path, monkeypatch):
    def work():
        trainer(tmp_path, arguments=data(), **cached(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.ArrowWriter, "finalize", lambda writer: os.kill(os.getpid(), signal.SIGKILL))
        killed = forked(work)
    killed.join(timeout=120)
    jobs = [forked(work) for _ in range(2)]
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in (killed, *jobs)] == [-signal.SIGKILL, 0, 0]
    [before] = caches(tmp_path).items()
    assert [file.name for file in (tmp_path / "cache").glob("*/*")] == ["rows-00000.arrow"]
    run = train(tmp_path, arguments=data(), **cached(tmp_path))
    whole = train(tmp_path / "whole", arguments=data(), **cached(tmp_path / "whole"))
    assert [*caches(tmp_path).items()] == [before] and torch.equal(losses(run), losses(whole))


def test_the_folder_is_expanded_and_never_in_the_output(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = trainer(tmp_path, arguments=data(), **cached(Path("~")))
    assert len(caches(tmp_path / "home")) == 1 and not Path("~").exists()
    assert run.train_dataset.cache_files[-1]["filename"].startswith(str(tmp_path / "home/cache"))  # memory-mapped
    with pytest.raises(ValueError, match="inside `output_dir="):
        trainer(tmp_path, **cached(tmp_path / "run"))
    train(tmp_path, arguments=data(), kl_weight=0.0, **cached(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_data_that_cannot_be_seen_in_advance_are_refused(tmp_path):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset` is a stream"):
        trainer(tmp_path, arguments={"train_dataset": stream}, **cached(tmp_path))
    with pytest.raises(ValueError, match=r"`eval_dataset\['held'\]` is a stream"):
        trainer(tmp_path, arguments=data() | {"eval_dataset": {"held": stream}}, **cached(tmp_path))
    rows = Dataset.from_list([{"input_ids": [*range(3, 9)], "labels": [-100] * 4 + [7, 8]}] * 4)
    rows.set_transform(lambda batch: {name: values[::-1] for name, values in batch.items()})
    options = dict(dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="has a transform. Pass a plain"):
        trainer(tmp_path, arguments={"train_dataset": rows}, **cached(tmp_path), **options)
    collator = trainer(tmp_path, arguments=data()).data_collator
    with pytest.raises(ValueError, match="and got a `data_collator` of function. Leave one"):  # it may draw at random
        trainer(tmp_path, arguments=data() | {"data_collator": lambda rows: collator(rows)}, **cached(tmp_path))
    collator.padding_free = True  # TRL's own, which joins rows
    joined = trainer(tmp_path, arguments=data() | {"data_collator": collator}, **cached(tmp_path / "joined"))
    assert len(joined.train_dataset) == len(ROWS)


@pytest.mark.skipif(transformers.__version__ < "5", reason="Mamba takes no joined rows (`position_ids`)")
@pytest.mark.parametrize("joined", [dict(packing=True, max_length=24), dict(padding_free=True, max_length=None)])
def test_rows_that_see_the_row_before_them_are_refused(tmp_path, joined):
    """A state-space model carries its state over the border of two rows, which are others in each epoch."""
    model = AutoModelForCausalLM.from_config(MambaConfig(**TINY))
    with pytest.raises(ValueError, match="a row sees the one before it.*Set `packing=False`"):
        trainer(tmp_path, model, data(), **cached(tmp_path), **joined)
    assert not caches(tmp_path)


def test_first_tokens_that_virtual_ones_predict_are_refused(tmp_path):
    arguments = data([{"text": row["prompt"]} for row in ROWS])
    arguments["peft_config"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="virtual tokens of a prompt-learning adapter predict the first"):
        trainer(tmp_path, None, arguments, **cached(tmp_path))


def test_the_prepared_data_of_another_trainer(tmp_path):
    """Tokens of int64, where SFTTrainer's are of int32, are the same data."""
    prepared = trainer(tmp_path, arguments=data(), **cached(tmp_path)).train_dataset
    prepared = prepared.cast_column("input_ids", List(Value("int64")))
    trainer(tmp_path, arguments={"train_dataset": prepared}, **cached(tmp_path))
    assert len(caches(tmp_path)) == 1
    reference = train(tmp_path, arguments=data() | given_teacher())
    run = train(tmp_path, arguments={"train_dataset": prepared} | given_teacher(), **cached(tmp_path))
    torch.testing.assert_close(losses(run), losses(reference), **CLOSE)
