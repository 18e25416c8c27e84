# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters on tiny random models of the architectures that transformers ships."""

import re

import pytest
import torch
import transformers
from conftest import build_model
from sft_runs import architecture
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from trl_selfdistill.parameters.groups import GroupSelection, GroupTable, freeze_selection
from trl_selfdistill.parameters.hashes import digest, hash_parameters, hash_tensor, verify_frozen
from trl_selfdistill.parameters.structure import GROUPS, group_of, named_tensors


ARCHITECTURES = "llama qwen3_moe mixtral gemma3_text gemma4_text phi gpt2 gpt_neox opt mpt cohere deepseek_v3 gpt_oss "
ARCHITECTURES += "qwen3_next jamba mamba bart bert codegen cohere2 falcon_h1 gemma3n_text gptj hrm_text jetmoe xlnet "
ARCHITECTURES += "kimi_linear lfm2 longcat_flash minimax nemotron_h olmoe persimmon prophetnet recurrent_gemma "
ARCHITECTURES += "rembert rwkv xlm zamba2 zaya electra modernbert-decoder"
# Few experts, as transformers 4 has a module for each; parameters that are not there by default
OPTIONS = dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4)
OPTIONS |= {"use_qk_norm": True, "word_embed_proj_dim": 8}
# What the names of those say, the first that fits; the package goes by the modules
NAMES = {
    "norm": r"(?i)norm|\bln_|\bln\d|_ln\b",
    "lm_head": r"^(lm_|head\.|pred_layer|embed_out|cls\.|generator_|decoder\.(weight|bias))",
    "attention": r"(?<!post_)attention|attn|\.[qkvo]_proj",
    "embeddings": r"embed|wte|wpe|project_(in|out)|per_layer_model|altup_proj|z_L_init|mask_emb|input_hidden",
    "mlp": "",
}


def freeze_groups(model, **options) -> GroupTable:
    return freeze_selection(model, GroupSelection.parse(**options))


@pytest.mark.parametrize("architecture", ARCHITECTURES.split())
def test_every_parameter_is_in_its_group(architecture):
    """On the meta device, as large as it is by default."""
    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **OPTIONS))
    groups = {names[0].name: group_of(names) for _, names in named_tensors(model)}
    assert [*groups] == [name for name, _ in model.named_parameters()]
    assert groups == {name: next(group for group in NAMES if re.search(NAMES[group], name)) for name in groups}
    table = freeze_groups(model, frozen_groups=["embeddings", "mlp", "lm_head"])
    assert tuple(row.group for row in table) == GROUPS
    assert sum(row.parameters for row in table) == sum(p.numel() for p in model.parameters())
    trainable = {groups[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"attention", "norm"} & {*groups.values()}


@pytest.mark.parametrize(
    "entry, selected",
    [
        ("mlp", r"mlp"),
        ("mlp:0-1", r"layers\.[01]\.mlp"),
        ("norm:0", r"layers\.0\..*norm"),
        ("lm_head", r"lm_head"),
        ("re:q_proj|k_proj", r"[qk]_proj"),
    ],
)
def test_entries_select_groups_layers_and_patterns(tokenizer, entry, selected):
    frozen, trainable = build_model(tokenizer, num_hidden_layers=3), build_model(tokenizer, num_hidden_layers=3)
    freeze_groups(frozen, frozen_groups=[entry])
    freeze_groups(trainable, trainable_groups=entry)  # a lone text, as YAML may have it
    matched = {name: re.search(selected, name) is not None for name, _ in frozen.named_parameters()}
    assert {name: not parameter.requires_grad for name, parameter in frozen.named_parameters()} == matched
    assert {name: parameter.requires_grad for name, parameter in trainable.named_parameters()} == matched


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(frozen_groups=["mlp"], trainable_groups=["attention"]), "`: set one"),
        (dict(frozen_groups=["mpl"]), "'mpl' is not a group.*embeddings, attention, mlp, norm, lm_head"),
        (dict(frozen_groups=["mlp", "attention:0-2"]), "'attention:0-2'.*in 2 layers"),
        (dict(frozen_groups=["mlp", "re:Wqkv"]), "'re:Wqkv', which matches no parameter"),
        (dict(frozen_groups=["re:("]), "not a regular expression"),
        (dict(frozen_groups=[*GROUPS]), "leaves nothing to train"),
        (dict(trainable_groups=[]), "leaves nothing to train"),
    ],
)
def test_errors_change_no_parameter(model, options, message):
    with pytest.raises(ValueError, match=message):
        freeze_groups(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_frozen_stays_frozen(model):
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze_groups(model, trainable_groups=["attention:0"])
    freeze_groups(model, trainable_groups=["attention"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}


def test_tied_embeddings_are_frozen_together(tokenizer):
    model = build_model(tokenizer, tie_word_embeddings=True)
    for half in (dict(frozen_groups=["mlp", "re:embed_tokens"]), dict(trainable_groups=["lm_head"])):
        with pytest.raises(ValueError, match="both 'embeddings' and 'lm_head', or none"):
            freeze_groups(model, **half)
        assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_groups(model, frozen_groups=["embeddings", "lm_head"])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_a_model_without_attention_says_so():
    model = architecture("mamba")
    with pytest.raises(ValueError, match="matches no parameter of MambaForCausalLM.*counted in 'mlp'"):
        freeze_groups(model, trainable_groups=["attention"])
    freeze_groups(model, trainable_groups=["mlp"])


def test_table_counts_and_renders(model):
    table = freeze_groups(model, frozen_groups=["mlp", "lm_head"])
    rows = {row.group: row for row in table}
    assert rows["mlp"] == ("mlp", 6, 2 * 3 * 16 * 32, 0)
    assert rows["attention"].trainable_parameters == rows["attention"].parameters == 2 * (2 * 16 * 16 + 2 * 16 * 8)
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines] == ["group", *GROUPS, "total"]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[2].replace(",", "") == str(sum(parameter.numel() for parameter in model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hashes_see_every_bit_of_what_is_frozen(model, dtype):
    model.to(dtype)
    freeze_groups(model, frozen_groups=["mlp", "norm"])
    hashes = hash_parameters(model)
    assert set(hashes) == {"mlp", "norm"} and len(hashes["mlp"]) == 6
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # trainable
    verify_frozen(model, hashes)
    weight = model.model.layers[1].mlp.up_proj.weight
    bits = weight.data.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    assert len({*map(hash_tensor, (weight, weight.flatten(), bits))}) == 3  # of the same bytes
    bits[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"1 of 6 frozen parameters in 'mlp' changed: \['model.layers.1.mlp.up_proj"):
        verify_frozen(model, hashes)
    changed = hash_parameters(model)
    assert digest(changed["norm"]) == digest(hashes["norm"]) and digest(changed["mlp"]) != digest(hashes["mlp"])
