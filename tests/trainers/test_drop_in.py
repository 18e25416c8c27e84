# SPDX-License-Identifier: Apache-2.0
"""What TRL promises of `SFTTrainer` holds for both trainers: data, models, evaluation, callbacks, checkpoints."""

import json
import math

import pytest
import torch
from conftest import CHAT_TEMPLATE, CITIES, build_model, build_tokenizer
from datasets import Dataset, DatasetDict
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from sft_runs import FACTS, TOKENIZER, StopAt, architecture, assert_same_weights, config, logs, weights
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig

from trl_selfdistill import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer, SelfDistillSFTConfig, SelfDistillSFTTrainer


@pytest.fixture(params=["self-distillation", "frozen groups"])
def build(request, tmp_path):
    """A factory of one of the trainers: with a KL to another model than the student, or with frozen MLPs."""
    distils = request.param == "self-distillation"
    trainer_class, config_class = (
        (SelfDistillSFTTrainer, SelfDistillSFTConfig) if distils else (FrozenGroupsSFTTrainer, FrozenGroupsSFTConfig)
    )

    def make(model=None, arguments=None, own=True, **options):
        arguments = dict(processing_class=build_tokenizer(), train_dataset=Dataset.from_list(FACTS)) | (
            arguments or {}
        )
        if own and distils:
            arguments |= dict(teacher_model=build_model(TOKENIZER, seed=1, initializer_range=0.4))
        if own and not distils:
            options |= dict(frozen_groups=["mlp"])
        arguments.setdefault("args", config(tmp_path, config_class, **options))
        return trainer_class(build_model(TOKENIZER) if model is None else model, **arguments)

    make.trainer_class, make.distils, make.folder = trainer_class, distils, tmp_path
    return make


def train(run, resume=None):
    """Trains, and checks that exactly what is trainable moved."""
    before = weights(run.model)
    run.train(resume_from_checkpoint=resume)
    trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and moved <= trainable
    rows = [row for row in logs(run) if "loss" in row]
    assert all(math.isfinite(row["loss"]) for row in rows)
    if isinstance(run, SelfDistillSFTTrainer):
        assert all(row["kl_loss"] > 0 for row in rows[1:])
    return run


CHATS = [[dict(role="user", content=city), dict(role="assistant", content=land)] for city, land in CITIES.items()]
TEXTS = [row["prompt"] + row["completion"] for row in FACTS]
IDS = TOKENIZER(TEXTS)["input_ids"]
TOOL = dict(name="country", description="", parameters=dict(type="object", properties={}))
FORMATS = {
    "text": [dict(text=text) for text in TEXTS],
    "messages": [dict(messages=chat) for chat in CHATS],
    "prompt-completion": FACTS,
    "conversational prompt-completion": [dict(prompt=chat[:1], completion=chat[1:]) for chat in CHATS],
    "ShareGPT": [
        dict(conversations=[{"from": "human", "value": c}, {"from": "gpt", "value": a}]) for c, a in CITIES.items()
    ],
    "input_ids": [dict(input_ids=ids) for ids in IDS],
    "input_ids and labels": [dict(input_ids=ids, labels=[-100, *ids[1:]]) for ids in IDS],
    "input_ids and completion_mask": [
        dict(input_ids=ids, completion_mask=[0] * 4 + [1] * (len(ids) - 4)) for ids in IDS
    ],
    "tools": [dict(messages=chat, tools=json.dumps([TOOL])) for chat in CHATS],
    "chat_template_kwargs": [dict(messages=chat, chat_template_kwargs=dict(extra="x")) for chat in CHATS],
    "other columns": [{**row, "source": "here", "number": 3} for row in FACTS],
}


@pytest.mark.parametrize("name", FORMATS)
def test_dataset_formats(build, name):
    run = train(build(None, dict(train_dataset=Dataset.from_list(FORMATS[name])), max_steps=1))
    assert {"input_ids", "labels"} <= {*run.train_dataset.column_names}


def test_labels_are_what_the_dataset_says(build):
    run = build(None, dict(train_dataset=Dataset.from_list(FORMATS["input_ids and labels"])))
    assert run.train_dataset[0]["labels"] == FORMATS["input_ids and labels"][0]["labels"]
    mask = build(
        None,
        dict(train_dataset=Dataset.from_list(FORMATS["input_ids and completion_mask"])),
        completion_only_loss=True,
    )
    assert mask.train_dataset[0]["labels"][:5] == [-100] * 4 + [IDS[0][4]]


def test_formatting_func(build):
    rows = [dict(q=city, a=country) for city, country in CITIES.items()]
    extra = dict(train_dataset=Dataset.from_list(rows), formatting_func=lambda row: f"Q: {row['q']}\nA: {row['a']}")
    run = train(build(None, extra))
    assert TOKENIZER.decode(run.train_dataset[0]["input_ids"]) == "Q: Lyon\nA: France<|im_end|>"


def test_truncation_drops_what_has_no_label_left(build):
    shortest = min(len(TOKENIZER(row["prompt"])["input_ids"]) for row in FACTS)
    run = train(build(max_length=shortest + 1))
    assert 0 < len(run.train_dataset) < len(FACTS)
    assert all(len(row["input_ids"]) <= shortest + 1 for row in run.train_dataset)
    assert all(label != -100 for row in run.train_dataset for label in row["labels"][-1:])


def test_padding_token_and_multiple(build):
    run = build(pad_to_multiple_of=16, pad_token="<|im_start|>")
    batch = next(iter(run.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 16 == 0 and run.model.config.pad_token_id == 1
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {1}
    assert set(batch["labels"][batch["attention_mask"] == 0].tolist()) == {-100}
    train(run)


def test_eos_token(build):
    run = train(build(eos_token="<|endoftext|>"))
    assert run.train_dataset[0]["input_ids"][-1] == TOKENIZER.pad_token_id == run.model.config.eos_token_id
    with pytest.raises(ValueError, match="`eos_token` .*nonsense"):
        build(eos_token="nonsense")


def test_chat_template_from_a_file_and_from_a_tokenizer(build):
    rows = dict(train_dataset=Dataset.from_list(FORMATS["messages"]))
    file = build.folder / "template.jinja"
    file.write_text("{{ 'New ' }}" + CHAT_TEMPLATE)
    run = train(build(None, rows, chat_template_path=str(file)))
    assert TOKENIZER.decode(run.train_dataset[0]["input_ids"]).startswith("New <|im_start|>user")
    assert run.processing_class.chat_template == file.read_text()
    build_tokenizer().save_pretrained(build.folder / "other")
    # Its tokens may be new, and the embeddings grow: a teacher that is given would not have them
    train(build(None, rows, own=not build.distils, chat_template_path=str(build.folder / "other")))


@pytest.mark.parametrize("rows", ["text", "prompt-completion"])
def test_packing_of_training_and_evaluation(build, rows):
    data = Dataset.from_list(FORMATS[rows])
    for eval_packing, packed in ((None, True), (False, False), (True, True)):
        extra = dict(train_dataset=data, eval_dataset=data)
        run = build(None, extra, packing=True, eval_packing=eval_packing, max_length=64)
        assert len(run.train_dataset) < len(data)
        assert (len(run.eval_dataset) < len(data)) == packed
    train(run)


def test_model_by_path_with_init_kwargs(build, model_dir):
    options = dict(model_init_kwargs=dict(attn_implementation="eager", dtype="bfloat16"))
    run = train(build(str(model_dir), dict(processing_class=None), own=not build.distils, **options))
    assert run.model.config._attn_implementation == "eager" and run.model.dtype == torch.bfloat16
    assert build(str(model_dir), own=not build.distils).model.dtype == torch.float32


@pytest.mark.parametrize("given", [TrainingArguments, SFTConfig, None])
def test_plain_arguments(build, given, monkeypatch):
    monkeypatch.chdir(build.folder)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    args = given and config(build.folder, given, weight_decay=0.3)
    model = build_model(TOKENIZER)
    model.config._name_or_path = "org/tiny"
    run = build(model, dict(args=args), own=build.distils)
    assert isinstance(run.args, SFTConfig) and (given is None or run.args.weight_decay == 0.3)
    if given is not None:
        train(run)


def test_a_training_set_is_required(build):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        build(None, dict(train_dataset=None))


PEFT = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "lora and whole modules": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "ia3": lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", PEFT)
def test_adapters(build, name):
    run = build(
        None, dict(peft_config=PEFT[name]()), own=False, save_strategy="steps", save_steps=3, learning_rate=0.1
    )
    assert isinstance(run.model, PeftModel)
    base = {key: value for key, value in weights(run.model).items() if "base_layer" in key}
    train(run)
    assert all(torch.equal(value, run.model.get_parameter(key)) for key, value in base.items())
    checkpoint = build.folder / "run" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    reloaded = PeftModel.from_pretrained(build_model(TOKENIZER), checkpoint)
    ids = torch.tensor([IDS[0]])
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(reloaded.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_peft_model_with_checkpointing(build, use_reentrant):
    model = get_peft_model(build_model(TOKENIZER), PEFT["lora"]())
    kwargs = dict(use_reentrant=use_reentrant)
    train(build(model, own=False, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs))
    with pytest.raises(ValueError, match="PeftModel.* together with a `peft_config`|adapter"):
        build(model, dict(peft_config=PEFT["lora"]()), own=False)


def test_mixture_of_experts(build):
    run = train(build(architecture("mixtral")))
    assert all("aux_loss" in row for row in logs(run)[:3])


class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            object.__getattribute__(self, "events").append(name)
        return object.__getattribute__(self, name)


def test_callbacks_get_the_events_of_sft_trainer(build):
    from trl import SFTTrainer

    options = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    recorders = Recorder(), Recorder()
    evaluation = dict(eval_dataset=Dataset.from_list(FACTS[:2]))
    build(None, {**evaluation, "callbacks": [recorders[0]]}, **options).train()
    args = config(build.folder / "theirs", SFTConfig, **options)
    extra = dict(train_dataset=Dataset.from_list(FACTS), processing_class=build_tokenizer(), **evaluation)
    SFTTrainer(build_model(TOKENIZER), args, callbacks=[recorders[1]], **extra).train()
    assert recorders[0].events == recorders[1].events and recorders[0].events.count("on_step_end") == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("batched", [False, True])
def test_compute_metrics(build, batched):
    calls = []

    def metrics(prediction, compute_result=True):
        calls.append(prediction.predictions.shape if hasattr(prediction.predictions, "shape") else None)
        return {"seen": len(calls)} if compute_result else {}

    def argmax(logits, labels):
        assert logits.shape[:2] == labels.shape and logits.shape[2] == len(TOKENIZER)
        return logits.argmax(-1)

    extra = dict(eval_dataset=Dataset.from_list(FACTS), compute_metrics=metrics, preprocess_logits_for_metrics=argmax)
    result = build(None, extra, batch_eval_metrics=batched, per_device_eval_batch_size=2).evaluate()
    assert result["eval_seen"] == (3 if batched else 1) and all(len(shape) == 2 for shape in calls)
    assert math.isfinite(result["eval_loss"])


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_evaluation_sets_and_the_best_checkpoint(build, kind):
    sets = kind(a=Dataset.from_list(FACTS[:2]), b=Dataset.from_list(FACTS[2:]))
    options = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1)
    options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_b_loss")
    run = build(None, dict(eval_dataset=sets), **options)
    run.train()
    values = [row["eval_b_loss"] for row in logs(run) if "eval_b_loss" in row]
    assert len(values) == 3 and run.state.best_metric == min(values)
    assert run.evaluate(sets)["eval_b_loss"] == pytest.approx(min(values), rel=1e-5)


@pytest.mark.parametrize("name", ["text", "messages", "prompt-completion", "input_ids"])
def test_evaluation_of_raw_data(build, name):
    """What is handed to `evaluate` is tokenised as the training set is."""
    rows = Dataset.from_list(FORMATS[name])
    run = build(None, dict(train_dataset=rows, eval_dataset=rows))
    prepared, raw = run.evaluate(), run.evaluate(rows)
    streamed = run.evaluate(rows.to_iterable_dataset())
    named = run.evaluate({"x": rows}, metric_key_prefix="test")
    assert prepared["eval_loss"] == raw["eval_loss"] == streamed["eval_loss"] == named["test_x_loss"]
    if build.distils:
        assert prepared["eval_kl_loss"] > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_prediction(build):
    run = build(None, dict(eval_dataset=Dataset.from_list(FACTS)))
    output = run.predict(run.eval_dataset)
    assert output.predictions.shape == (len(FACTS), output.label_ids.shape[1], len(TOKENIZER))
    assert run.model.training is False or math.isfinite(output.metrics["test_loss"])


@pytest.mark.parametrize("split", [(3, 2), (2, 3), (1, 6)])
def test_the_split_into_micro_batches_changes_nothing(build, split):
    """`num_items_in_batch` is the denominator of the whole step, of rows of uneven length."""

    def run(size, steps):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1, optim="sgd")
        return train(build(learning_rate=1.0, max_grad_norm=0.0, **options))

    whole, other = run(6, 1), run(*split)
    assert_same_weights(other.model, whole.model, atol=1e-6)
    assert logs(other)[0]["loss"] == pytest.approx(logs(whole)[0]["loss"], rel=1e-5)
    assert logs(other)[0]["grad_norm"] == pytest.approx(logs(whole)[0]["grad_norm"], rel=1e-4)


def test_two_runs_are_the_same_run(build):
    first, second = train(build()), train(build())
    assert_same_weights(first.model, second.model)
    assert logs(first) == logs(second)


def test_resuming(build):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = train(build(**options))
    for path in (build.folder / "run").glob("checkpoint-4"):
        path.rename(build.folder / "aside")
    resumed = train(build(**options), resume=True)
    assert_same_weights(resumed.model, whole.model)
    build(None, dict(callbacks=[StopAt(2)]), **options).train()
    by_path = train(build(**options), resume=str(build.folder / "run" / "checkpoint-2"))
    assert_same_weights(by_path.model, whole.model)


def test_what_is_saved_loads_without_this_package(build):
    run = train(build(save_strategy="steps", save_steps=3))
    run.save_model(str(build.folder / "final"))
    for folder in (build.folder / "run" / "checkpoint-3", build.folder / "final"):
        assert_same_weights(AutoModelForCausalLM.from_pretrained(folder), run.model)
        assert load_file(folder / "model.safetensors").keys() == build_model(TOKENIZER).state_dict().keys()
        assert (folder / "tokenizer.json").is_file()
        assert "trl_selfdistill" not in (folder / "config.json").read_text()


def test_model_card_and_tags(build):
    run = train(build(save_strategy="steps", save_steps=3))
    run.create_model_card(model_name="tiny", dataset_name="org/facts", tags="mine")
    card = (build.folder / "run" / "README.md").read_text()
    for tag in [*run._tag_names, "mine"]:
        assert f"\n- {tag}\n" in card
    assert "org/facts" in card and {"trl", "sft"} < {*run.model.model_tags}
    assert (build.folder / "run" / "checkpoint-3" / "README.md").is_file()


def test_optimizers_of_the_users_own(build):
    kind = dict(optimizer_cls_and_kwargs=(torch.optim.SGD, dict(lr=0.5)))
    run = train(build(None, kind))
    assert isinstance(run.optimizer.optimizer, torch.optim.SGD)


def test_neftune_noise_is_the_students_alone(build):
    losses, targets = [], []
    for alpha in (None, 5.0):
        run = build(max_steps=2, neftune_noise_alpha=alpha)
        if build.distils:
            of_teacher = run.teacher.targets
            run.teacher.targets = lambda *args, of_teacher=of_teacher: targets.append(of_teacher(*args)) or targets[-1]
        losses.append(logs(train(run))[0]["loss"])
    assert losses[0] != losses[1]
    if build.distils:
        plain, noisy = targets[:2], targets[2:]
        assert len(plain) == len(noisy) == 2
        assert all(torch.equal(a.hidden_states, b.hidden_states) for a, b in zip(plain, noisy, strict=True))
