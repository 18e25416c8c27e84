# SPDX-License-Identifier: Apache-2.0
"""Where SelfDistillSFTTrainer's teacher comes from, that it stays where it is, and that resuming finds it again."""

import shutil
from functools import partial
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sft_runs import FACTS, IDS, LORA, TOKENIZER, StopAt, assert_same_weights, config, logs, train, trainer, weights
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from trl_selfdistill.parameters.hashes import hash_model
from trl_selfdistill.trainers import teachers


VIRTUAL_TOKENS = dict(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def other_model(**options):
    return build_model(TOKENIZER, seed=1, **options)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    other_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("source", ["copy", "instance", "path", "path in the config", "another size"])
def test_teacher_stays_while_the_student_trains(tmp_path, teacher_dir, source):
    size = dict(hidden_size=32) if source == "another size" else {}
    expected = build_model(TOKENIZER) if source == "copy" else other_model(**size)
    given = {"copy": None, "path": teacher_dir, "path in the config": None}.get(source, other_model(**size))
    options = dict(teacher_model_name_or_path=teacher_dir) if source == "path in the config" else {}
    run = trainer(tmp_path, None, dict(teacher_model=given), **options)
    before, student = weights(run.teacher_model), weights(run.model)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(run.teacher_model(input_ids=IDS).logits, expected.eval()(input_ids=IDS).logits)
        assert not run.teacher_model.training
        if run.state.global_step == 0:
            run.train()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in run.teacher_model.named_parameters())
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, student[name])}
    assert moved == {name for name, p in run.model.named_parameters() if p.requires_grad} != set()
    first, second = logs(run)[:2]
    assert (first["kl_loss"] < 1e-6) == (source == "copy") and second["kl_loss"] > 1e-6


def test_with_which_arguments_the_teacher_is_loaded(tmp_path, teacher_dir, monkeypatch):
    loads = []

    def load(result, name, **kwargs):
        loads.append(kwargs)
        return result

    named = other_model()
    named.config._name_or_path = teacher_dir
    monkeypatch.setattr(teachers, "create_model_from_path", partial(load, named))
    monkeypatch.setattr(teachers.AutoTokenizer, "from_pretrained", partial(load, TOKENIZER))
    options = dict(teacher_model_init_kwargs={"dtype": "auto", "revision": "v1"}, trust_remote_code=True)
    run = trainer(tmp_path, None, dict(teacher_model=teacher_dir), **options)
    assert loads[0] == loads[1] | dict(dtype="auto") == dict(revision="v1", trust_remote_code=True, dtype="auto")
    run.args.distributed_state = SimpleNamespace(distributed_type="MULTI_GPU")
    teachers.load_teacher(teacher_dir, run)
    assert loads[2]["device_map"] is None  # TRL's default would spread it over the GPUs


def test_tokens_of_a_new_chat_template(tmp_path, model_dir):
    """They resize the embeddings, of which the teacher is a copy and which are frozen."""
    source = build_tokenizer()
    source.chat_template += "{# as another model has it #}"
    source.eos_token = "<|im_start|>"
    source.add_special_tokens({"additional_special_tokens": [f"<|extra_{index}|>" for index in range(70)]})
    source.save_pretrained(tmp_path / "template")
    options = dict(frozen_groups=["embeddings"], chat_template_path=str(tmp_path / "template"))
    run = train(tmp_path, str(model_dir), dict(processing_class=None), **options)
    sizes = [model.get_input_embeddings().num_embeddings for model in (run.model, run.teacher_model)]
    assert sizes[0] == sizes[1] > len(TOKENIZER) and not run.model.get_input_embeddings().weight.requires_grad
    assert logs(run)[0]["kl_loss"] < 1e-6 < logs(run)[1]["kl_loss"]


def test_the_students_tokenizer_may_have_tokens_more_than_the_teachers(tmp_path):
    for part in (other_model(vocab_size=320), TOKENIZER):
        part.save_pretrained(tmp_path / "base")
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    options = dict(teacher_model_name_or_path=str(tmp_path / "base"))
    run = train(tmp_path, build_model(tokenizer, vocab_size=320), dict(processing_class=tokenizer), **options)
    assert logs(run)[0]["kl_loss"] > 0


def test_the_model_of_another_trainer_as_teacher(tmp_path):
    """TRL binds a forward to it, and it may be trained further: the teacher is a copy."""
    other = train(tmp_path)
    run = trainer(tmp_path, None, dict(teacher_model=other.model))
    before = run.teacher_model(input_ids=IDS).logits
    torch.testing.assert_close(before, other.model(input_ids=IDS).logits)
    other.train()
    assert torch.equal(run.teacher_model(input_ids=IDS).logits, before)
    assert all(parameter.requires_grad for parameter in other.model.parameters())


def test_positions_that_the_teacher_does_not_have_are_refused(tmp_path):
    rows = Dataset.from_list([{"text": row["prompt"]} for row in FACTS])
    run = trainer(tmp_path, None, VIRTUAL_TOKENS | dict(train_dataset=rows, teacher_model=other_model()))
    with pytest.raises(ValueError, match="prompt-learning adapter shifts them: pass a `teacher_model`"):
        run.train()


def other_tokenizer(folder):
    """Of as many tokens, one of which is another."""
    for part in (other_model(), TOKENIZER):
        part.save_pretrained(folder / "other")
    file = folder / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|begin|>"))
    return str(folder / "other")


model, in_its_memory = build_model(TOKENIZER), other_model()
in_its_memory.load_state_dict(model.state_dict(), assign=True)
locked = build_model(TOKENIZER)
locked.model.norm.lock = Lock()
on_its_head = get_peft_model(other_model(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))


@pytest.mark.parametrize(
    "student, extra, options, message",
    [
        (None, dict(teacher_model="a"), dict(teacher_model_name_or_path="b"), "Set one of them"),
        (None, dict(teacher_model=other_model()), dict(teacher_snapshot_steps=1), "Set one of them"),
        (model, dict(teacher_model=model), {}, "itself, .* Leave it unset"),
        (model, dict(teacher_model=model, peft_config=LoraConfig(**LORA)), {}, "in training itself"),
        (model, dict(teacher_model=in_its_memory), {}, "shares parameters"),
        (None, dict(teacher_model=cpu_offload(other_model())), {}, "offloaded, .* load the model without"),
        (None, dict(teacher_model=on_its_head), {}, "In `teacher_model`, an adapter .*merge_and_unload"),
        (None, dict(teacher_model=other_model(vocab_size=320)), {}, "vocabulary has 300 .* 320: take one of the"),
        (locked, {}, {}, "cannot be copied for the teacher: cannot pickle .* remove that, or pass a"),
        (None, dict(teacher_model=other_tokenizer), {}, "tokenizer of the teacher .* is not the student's.* Take a"),
        (None, {}, dict(teacher_model_init_kwargs={"dtype": "auto"}), "`teacher_model_init_kwargs` .* by name"),
        (None, {}, dict(teacher_snapshot_steps=1, load_best_model_at_end=True), "'loss' is another loss"),
        (None, VIRTUAL_TOKENS, dict(teacher_snapshot_steps=1), "one adapter that can be held twice. Train stage 1"),
    ],
)
def test_teachers_that_are_refused(tmp_path, student, extra, options, message):
    if extra.get("teacher_model") is other_tokenizer:
        extra = dict(teacher_model=other_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, student, extra, **options)


SNAPSHOTS = {
    "2 steps": dict(teacher_snapshot_steps=2),
    "1 epoch": dict(teacher_snapshot_epochs=2 / 3),
    "1 epoch of accumulated steps": dict(teacher_snapshot_epochs=1.0, gradient_accumulation_steps=2),
    "mixed precision": dict(teacher_snapshot_steps=2, bf16=True),
}


@pytest.mark.parametrize("snapshot", SNAPSHOTS)
def test_before_the_snapshot_it_is_sft_trainer_and_after_it_there_is_a_kl(tmp_path, snapshot):
    options = SNAPSHOTS[snapshot] | dict(max_steps=4, learning_rate=2e-2)
    run = train(tmp_path, **options)
    plain = {key: value for key, value in options.items() if not key.startswith("teacher")}
    theirs = train(tmp_path, None, dict(callbacks=[StopAt(2)]), SFTTrainer, **plain)
    assert logs(run)[:2] == logs(theirs)[:2]
    assert_same_weights(run.teacher_model, theirs.model)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "_teacher"), theirs.model)
    third, fourth = logs(run)[2:4]
    assert abs(third["kl_loss"]) < 1e-6 < 1e-4 < fourth["kl_loss"]
    assert fourth["loss"] == pytest.approx(fourth["ce_loss"] + 0.25 * fourth["kl_loss"], rel=1e-2)
    run.train()  # anew: plain SFT comes first again
    assert "kl_loss" not in logs(run)[0]


def test_the_hash_is_of_all_that_the_teacher_computes_with(tmp_path):
    adapted = partial(get_peft_model, peft_config=LoraConfig(**LORA, init_lora_weights=False))
    teachers = {
        "itself": other_model(),
        "other weights": build_model(TOKENIZER, seed=2),
        "other positions": other_model(rope_theta=2.0),
        "other attention": other_model(attention_bias=True),
        "an adapter": fixed(adapted(other_model())),
        "another scale": fixed(get_peft_model(other_model(), LoraConfig(**LORA, lora_alpha=64))),
    }
    hashes = {name: hash_model(model) for name, model in teachers.items()}
    assert len({*hashes.values()}) == len(hashes), hashes
    other_model().save_pretrained(tmp_path / "saved")
    assert hash_model(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == hashes["itself"]


def fixed(model):
    """The same adapter weights whatever drew them."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(parameter, 0.01)
    return model


def test_a_snapshot_that_never_comes_is_refused(tmp_path):
    assert ["kl_loss" in row for row in logs(train(tmp_path, teacher_snapshot_epochs=1e-9))[:2]] == [False, True]
    stream = dict(train_dataset=Dataset.from_list(FACTS).to_iterable_dataset())
    with pytest.raises(ValueError, match="`teacher_snapshot_epochs=1.0` .* `teacher_snapshot_steps`"):
        trainer(tmp_path, None, stream, teacher_snapshot_epochs=1.0)
    assert "kl_loss" in logs(train(tmp_path, None, stream, teacher_snapshot_steps=1))[1]
    late = [dict(teacher_snapshot_steps=3), dict(teacher_snapshot_epochs=1.0)]  # of three steps, an epoch of three
    late += [dict(max_steps=-1, num_train_epochs=1.5, teacher_snapshot_epochs=1.8)]
    late += [dict(max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, teacher_snapshot_steps=4)]
    for options in late:
        with pytest.raises(ValueError, match="after step . of ., so that there would be no distillation"):
            trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="after step 3 of 3"):
        trainer(tmp_path, None, stream, teacher_snapshot_steps=3)
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=1, teacher_snapshot_steps=2)
    run.args.num_train_epochs = 0.5  # set later: refused when training starts
    with pytest.raises(ValueError, match="after step 2 of 2"):
        run.train()


def test_resuming_after_the_snapshot_needs_it(tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3)
    train(tmp_path, None, dict(callbacks=[StopAt(3)]), **options, teacher_snapshot_steps=2)
    with pytest.raises(ValueError, match="checkpoint-3 was written with a teacher.* without one.* as they were"):
        train(tmp_path, resume=True, **options, teacher_snapshot_steps=5)
    shutil.rmtree(tmp_path / "run" / "_teacher")
    with pytest.raises(ValueError, match="_teacher, the teacher of .*checkpoint-3, is gone"):
        train(tmp_path, resume=True, **options, teacher_snapshot_steps=2)
    with pytest.raises(ValueError, match="checkpoint-3 was written with a teacher.* without one"):
        train(tmp_path, resume=True, **options, teacher_snapshot_steps=2, kl_weight=0)


def test_the_snapshot_of_a_resumed_run_has_the_students_dtypes_and_attention(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, teacher_snapshot_steps=1, bf16=True)
    runs = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = build_model(TOKENIZER, attn_implementation="eager").to(torch.bfloat16)
        model.model.norm.float()
        runs.append(train(tmp_path, model, resume=checkpoint, **options))
    assert runs[1].teacher_model.config._attn_implementation == "eager"
    assert runs[1].teacher.sha256 == runs[0].teacher.sha256
    assert logs(runs[1])[3]["kl_loss"] == logs(runs[0])[3]["kl_loss"] > 0


def test_another_teacher_is_refused_when_resuming(tmp_path, teacher_dir):
    """With other weights, or other settings of the same; the message names the one that it was, if it had a name."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)

    def adapted(alpha):
        return dict(teacher_model=fixed(get_peft_model(other_model(), LoraConfig(**LORA, lora_alpha=alpha))))

    train(tmp_path, None, adapted(8) | dict(callbacks=[StopAt(2)]), **options)
    with pytest.raises(ValueError, match="The teacher is not the one that .*name_or_path=None"):
        train(tmp_path, None, adapted(64), resume=True, **options)
    train(tmp_path, None, adapted(8), resume=True, **options)

    named = dict(options, teacher_model_name_or_path=teacher_dir)
    train(tmp_path / "named", None, dict(callbacks=[StopAt(2)]), **named)
    with pytest.raises(ValueError, match=f"`teacher_model_name_or_path='{teacher_dir}'`"):
        train(tmp_path / "named", resume=True, **options)
    train(tmp_path / "none", None, dict(callbacks=[StopAt(2)]), kl_weight=0, **options)
    with pytest.raises(ValueError, match="checkpoint-2 was written without a teacher.* `kl_weight`"):
        train(tmp_path / "none", resume=True, **options)


def test_context_parallelism_is_refused(tmp_path, monkeypatch):
    def in_parallel(run, *_):  # as none of it runs on a CPU
        sizes = SimpleNamespace(sp_enabled=False, cp_enabled=True)
        monkeypatch.setattr(type(run.accelerator), "parallelism_config", sizes)

    monkeypatch.setattr("trl_selfdistill.trainers.self_distill_sft_trainer.prepare_anchors", in_parallel)
    with pytest.raises(ValueError, match="sequence or context parallelism"):
        trainer(tmp_path)


def test_a_teacher_does_not_keep_the_student_from_mixed_precision(tmp_path):
    """`evaluate` before `train` prepares the student although the teacher has been prepared."""
    run = trainer(tmp_path, bf16=True)
    metrics = run.evaluate(Dataset.from_list(FACTS))
    assert metrics["eval_kl_loss"] < 1e-5 and run.accelerator._models == [run.model_wrapped]


def test_without_kl_weight_no_teacher_is_loaded(tmp_path):
    run = trainer(tmp_path, None, dict(teacher_model="no/such-model"), kl_weight=0)
    assert run.teacher_model is None and config(tmp_path, kl_weight=0, teacher_snapshot_steps=1)
