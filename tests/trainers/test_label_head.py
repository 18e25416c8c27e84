# SPDX-License-Identifier: Apache-2.0
"""
The loss is that of each example by itself, on both models' own logits, in every family and however the data reach
them; or the family is refused by name.
"""

import pytest
import torch
from accelerate.utils import compare_versions
from conftest import build_model
from sft_runs import ARCHITECTURES, TOKENIZER, architecture, logs, train, trainer
from transformers import CONFIG_MAPPING

from trl_selfdistill import PAPER_SETTING, FrozenGroupsSFTTrainer, SelfDistillSFTTrainer


MOE = dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1)
FAMILIES = {
    "gemma3_text": dict(head_dim=8, final_logit_softcapping=2.0),
    "recurrent_gemma": dict(lru_width=16, attention_window_size=16, logits_soft_cap=2.0),
    "xlstm": dict(num_heads=2, output_logit_soft_cap=2.0),
    "cohere2": dict(logit_scale=0.3),
    "hyperclovax": dict(logits_scaling=3.0),
    "minicpm3": dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, num_key_value_heads=2),
    "opt": dict(ffn_dim=32, word_embed_proj_dim=8),
    "mamba": {},
    "falcon_mamba": {},
    "granitemoe": dict(**MOE, logits_scaling=4.0),
    "phimoe": dict(**MOE, num_key_value_heads=2),
    "doge": dict(is_moe=True, num_experts=16, num_experts_per_tok=2),
}
OTHERS = {
    "bert": ("BertLMHeadModel", dict(is_decoder=True)),
    "roberta": ("RobertaForCausalLM", dict(is_decoder=True)),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", dict(cls_token_id=1, sep_token_id=2)),
}


def tiny(name, dtype=torch.float32, seed=0, **options):
    if name not in CONFIG_MAPPING or (name == "doge" and compare_versions("transformers", "<", "5.0")):
        pytest.skip(f"transformers has no {name}, or one that does not run")
    options |= OTHERS[name][1] if name in OTHERS else FAMILIES.get(name, {})
    model = architecture(name, seed, dtype, **options)
    if dtype != torch.float32:  # transformers 4 draws other numbers in another dtype
        model.load_state_dict(tiny(name, seed=seed).state_dict())
    return model


def wrapped(examples):
    """The examples end to end, cut every 24 tokens."""
    ids, labels = (sum((example[side] for example in examples), []) for side in (0, 1))
    return [(ids[i : i + 24], labels[i : i + 24]) for i in range(0, len(ids), 24)]


# Settings, and the sequences that the models should see, made of the tokenised rows
PATHS = {
    "padded": ({}, list),
    # What Doge sees depends on the padding; RecurrentGemma of transformers 4 keeps states of the last batch's size
    "alone": (dict(per_device_train_batch_size=1), list),
    "packing, bfd": (dict(packing=True, max_length=64), list),
    "packing, wrapped": (dict(packing=True, packing_strategy="wrapped", max_length=24), wrapped),
    "padding_free": (dict(padding_free=True, max_length=None), list),
}
ALONE = ("doge", "recurrent_gemma")
CASES = [(name, "alone" if name in ALONE else "padded", {}) for name in [*FAMILIES, *ARCHITECTURES]]
CASES += [("llama", path, {}) for path in PATHS]


@pytest.mark.parametrize("name, path, config", [*CASES, ("llama", "packing, bfd", dict(attn_implementation="eager"))])
def test_the_loss_is_that_of_each_example_on_the_models_own_logits(tmp_path, name, path, config):
    settings, sequences = PATHS[path]
    models, rows = [tiny(name, seed=seed, **config) for seed in (0, 1)], trainer(tmp_path).train_dataset
    options = dict(per_device_train_batch_size=3, router_aux_loss_coef=0.0, **PAPER_SETTING) | settings
    run = trainer(tmp_path, models[0], dict(teacher_model=models[1]), **options)
    batches, ce, kl = list(run.get_train_dataloader()), [], []
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    with torch.no_grad():
        loss = sum(run.compute_loss(run.model.eval(), dict(batch), num_items_in_batch=count) for batch in batches)
        for ids, labels in sequences([(row["input_ids"], row["labels"]) for row in rows]):
            ids, labels = torch.tensor([ids]), torch.tensor(labels)[1:]
            counted = labels != -100
            logits = [model(input_ids=ids, use_cache=False).logits[0, :-1][counted].double() for model in models]
            ce.append(torch.nn.functional.cross_entropy(logits[0], labels[counted], reduction="none"))
            q, p = ((x / 0.5).log_softmax(-1) for x in logits)
            kl.append((p.exp() * (p - q)).sum(-1))
    ce, kl = torch.cat(ce).mean(), torch.cat(kl).mean()
    torch.testing.assert_close(loss.double(), ce + 0.25 * kl, rtol=1e-4, atol=1e-5)
    assert kl > 1e-5 and (len(run.train_dataset) < len(rows)) == ("packing" in path)


@pytest.mark.parametrize("name", OTHERS)
def test_a_head_that_does_more_is_refused_by_name(tmp_path, name):
    model = tiny(name).train()
    with pytest.raises(
        ValueError, match=f"`model` is a {OTHERS[name][0]}, which does more .* `kl_weight=0` .* off by"
    ):
        trainer(tmp_path, model)
    state = torch.get_rng_state()
    assert all(module.training for module in model.modules()) and torch.manual_seed(3).get_state().equal(state)
    with pytest.raises(ValueError, match=f"`teacher_model` is a {OTHERS[name][0]}, "):
        trainer(tmp_path, build_model(TOKENIZER), dict(teacher_model=tiny(name)))
    assert trainer(tmp_path, model, kl_weight=0).teacher is None  # as SFTTrainer


def test_a_head_with_rows_that_are_no_tokens_is_refused(tmp_path):
    """Inkling's vocabulary is padded, and its logits are not."""
    model = build_model(TOKENIZER)
    whole = type(model).forward

    def forward(self, *args, **kwargs):
        outputs = whole(self, *args, **kwargs)
        return type(outputs)(logits=outputs.logits[..., :290])

    model.__class__ = type("PaddedForCausalLM", (type(model),), {"forward": forward})
    with pytest.raises(ValueError, match="is a PaddedForCausalLM, .* 290 logits for a head of 300 tokens"):
        trainer(tmp_path, model)


@pytest.mark.parametrize("name", ["granitemoe", "phimoe"])
def test_the_router_loss_of_experts_under_another_name(tmp_path, name):
    for trainer_class in (SelfDistillSFTTrainer, FrozenGroupsSFTTrainer):
        run = trainer(tmp_path, tiny(name), None, trainer_class)
        batch = {key: value for key, value in next(iter(run.get_train_dataloader())).items() if key != "labels"}
        expected = run.model(**batch, output_router_logits=True).aux_loss.item()
        run.compute_loss(run.model, dict(next(iter(run.get_train_dataloader()))))
        assert run._metrics["train"]["aux_loss"] == pytest.approx([expected])
        run.train()
        assert logs(run)[0]["aux_loss"] > 0 and "num_experts" not in run.model.config.to_dict()


DTYPES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("dtypes", [*DTYPES, (torch.float32, torch.float16)])
@pytest.mark.parametrize("name", ["mamba", "gemma3_text"])
def test_dtypes_may_differ(tmp_path, name, dtypes):
    """Those of student and teacher, without autocast. Mamba's hidden states are fp32 whatever its head is."""
    options = dict(max_steps=1, precompute_teacher=dtypes[0] == dtypes[1], teacher_cache_dir=str(tmp_path / "cache"))
    losses = []
    for student, teacher in (dtypes, [torch.float32] * 2):
        given = dict(teacher_model=tiny(name, teacher, seed=1))
        losses.append(logs(train(tmp_path, tiny(name, student), given, **options))[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_router_loss_of_another_form_is_refused_by_name(tmp_path):
    run = trainer(tmp_path, tiny("doge"), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="load-balancing loss of DogeForCausalLM .* Set `router_aux_loss_coef=0`"):
        run.train()
