# SPDX-License-Identifier: Apache-2.0
"""Models and datasets with images, as `SFTTrainer` takes them: student and teacher see the same image."""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import build_tokenizer
from datasets import Dataset
from PIL import Image
from sft_runs import config, logs, weights
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from trl import SFTConfig

from trl_selfdistill import (
    FrozenGroupsSFTConfig,
    FrozenGroupsSFTTrainer,
    HallucinationEvalCallback,
    SelfDistillSFTConfig,
    SelfDistillSFTTrainer,
)
from trl_selfdistill.slick.prompt_tokens import tokenize_prompts
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.drift import DriftProbeCallback


CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


def build_processor() -> LlavaProcessor:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    # In transformers 4 the one that needs no torchvision has the plain name
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    images = processor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return LlavaProcessor(images, tokenizer, chat_template=CHAT, **options)


def build_vision_model(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(**size, vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.4)
    vision = CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=16)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision.to_dict(),
            text_config={**text.to_dict(), "pad_token_id": tokenizer.pad_token_id},
            image_token_id=image_token_id,
            vision_feature_layer=-1,
        )
    )


def build_dataset() -> Dataset:
    generator = np.random.default_rng(0)
    chats = [
        [dict(role="user", content="where is this"), dict(role="assistant", content=place)]
        for place in ("paris", "rome and its many old places", "oslo", "madrid in spain")
    ]
    images = [Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in chats]
    return Dataset.from_list([dict(images=[i], messages=chat) for i, chat in zip(images, chats, strict=True)])


@pytest.fixture
def build(tmp_path):
    processor = build_processor()
    model = build_vision_model(processor)
    configs = {SelfDistillSFTTrainer: SelfDistillSFTConfig, FrozenGroupsSFTTrainer: FrozenGroupsSFTConfig}

    def make(trainer_class=SelfDistillSFTTrainer, arguments=None, **options):
        args = config(tmp_path, configs.get(trainer_class, SFTConfig), max_length=None, **options)
        data = dict(train_dataset=build_dataset(), processing_class=processor)
        return trainer_class(copy.deepcopy(model), args, **data, **(arguments or {}))

    make.processor = processor
    return make


def test_kl_is_that_of_the_logits_given_the_images(build):
    teacher = build_vision_model(build.processor, seed=1)
    run = build(arguments=dict(teacher_model=teacher), temperature=0.7)
    batch = dict(next(iter(run.get_train_dataloader())))
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    run.compute_loss(run.model.eval(), dict(batch))

    def kl(pixel_values_of_teacher):
        counted = batch["labels"][:, 1:] != -100
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            own = run.model(**inputs, pixel_values=batch["pixel_values"]).logits[:, :-1][counted] / 0.7
            theirs = teacher(**inputs, pixel_values=pixel_values_of_teacher).logits[:, :-1][counted] / 0.7
        return torch.nn.functional.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="batchmean").item()

    found = run._metrics["eval"]["kl_loss"][-1]
    assert found == pytest.approx(kl(batch["pixel_values"]), rel=1e-4)
    assert found != pytest.approx(kl(-batch["pixel_values"]), rel=1e-3)  # another image


def test_the_vision_tower_is_frozen_or_trained_as_asked(build):
    with pytest.raises(ValueError, match="belong to none of .*'re:vision_tower'"):
        build(FrozenGroupsSFTTrainer, frozen_groups=["mlp"])
    run = build(FrozenGroupsSFTTrainer, frozen_groups=["mlp", "re:vision_tower|multi_modal_projector"])
    before = weights(run.model)
    run.train()
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("language_model" in name or "lm_head" in name for name in moved)
    assert not any(".mlp." in name for name in moved)
    assert run.group_table[-1].group == "unassigned" and run.group_table[-1].trainable_parameters == 0


def test_a_cache_of_the_teacher_needs_the_tokens(build):
    with pytest.raises(ValueError, match="`train_dataset` is .* becomes tokens only in a batch"):
        build(precompute_teacher=True)


def test_questions_are_asked_with_the_text_of_a_processor(build):
    facts = Dataset.from_dict({"question": ["where is oslo"], "subject": ["oslo"], "answer": ["norway"]})
    prompts = {"text": question_prompt, "chat": lambda question: [dict(role="user", content=question)]}
    run = build(max_steps=1)
    for name, prompt in prompts.items():
        [asked] = tokenize_prompts(build.processor, [prompt("where is oslo")])
        assert "where is oslo" in build.processor.decode(asked)
        run.add_callback(HallucinationEvalCallback(run, {name: facts}, prompt_function=prompt))
    run.add_callback(DriftProbeCallback(run, facts, every_steps=1))
    run.train()
    for name in ("eval_text_accuracy", "eval_chat_accuracy", "drift_kl"):
        assert len([row for row in logs(run) if name in row]) == 2


def test_anchors_are_refused(build):
    with pytest.raises(ValueError, match="`anchors='self'` are texts, and `train_dataset` has images"):
        build(anchors="self")
