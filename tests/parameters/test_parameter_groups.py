# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters on tiny random models of the architectures that transformers ships."""

import re
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import build_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from trl_selfdistill.parameters.groups import GroupSelection, GroupTable, freeze_selection, parameter_table
from trl_selfdistill.parameters.hashes import digest, hash_parameters, verify_frozen
from trl_selfdistill.parameters.structure import GROUPS, group_of, named_tensors


class Expected(NamedTuple):
    """The modules (or raw parameters) that an architecture has in each group."""

    attention: str
    mlp: str
    embeddings: str = "embed_tokens"
    norm_in_attention: bool = False
    config: dict = {}


QKVO, GATED = "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
TIED = {"tie_word_embeddings": True}
HEAD_DIM = {"head_dim": 8}
DEEPSEEK = {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"qk_nope_head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DELTANET = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8}
DELTANET |= {f"linear_{what}_head_dim": 4 for what in ("key", "value")}
DELTANET |= {f"linear_num_{what}_heads": 2 for what in ("key", "value")}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
JAMBA |= {"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False}
GEMMA4 = {"global_head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64}
MAMBA = "A_log D conv1d in_proj x_proj dt_proj out_proj"
# transformers 5 keeps the experts of a layer in two tensors, transformers 4 each in a module
FUSED = transformers.__version__ >= "5"
EXPERTS = "gate_up_proj down_proj" if FUSED else GATED

ARCHITECTURES = {
    "llama": Expected(QKVO, GATED),
    "qwen3_moe": Expected(QKVO, f"gate {EXPERTS}", norm_in_attention=True, config=HEAD_DIM | MOE),
    "mixtral": Expected(QKVO, f"gate {EXPERTS}" if FUSED else "gate w1 w2 w3", config=MOE),
    "gemma3_text": Expected(QKVO, GATED, norm_in_attention=True, config=HEAD_DIM | TIED),
    "gemma4_text": Expected(
        QKVO,
        GATED + " per_layer_input_gate per_layer_projection",
        "embed_tokens embed_tokens_per_layer per_layer_model_projection",
        norm_in_attention=True,
        config=GEMMA4 | HEAD_DIM | TIED,
    ),
    "phi": Expected("q_proj k_proj v_proj dense", "fc1 fc2"),
    "gpt2": Expected("c_attn c_proj", "c_fc c_proj", "wte wpe", config=TIED),
    "gpt_neox": Expected("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "embed_in"),
    "opt": Expected(
        "q_proj k_proj v_proj out_proj",
        "fc1 fc2",
        "embed_tokens embed_positions project_in project_out",
        config=TIED | {"ffn_dim": 32, "word_embed_proj_dim": 8},
    ),
    "mpt": Expected("Wqkv out_proj", "up_proj down_proj", "wte", config=TIED | {"d_model": 16, "n_heads": 2}),
    "cohere": Expected(QKVO, GATED, norm_in_attention=True, config=TIED | {"use_qk_norm": True}),
    "deepseek_v3": Expected(
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        f"{GATED} gate {EXPERTS}",
        norm_in_attention=True,
        config=DEEPSEEK | MOE,
    ),
    "gpt_oss": Expected(
        QKVO + " sinks", "router gate_up_proj gate_up_proj_bias down_proj down_proj_bias", config=HEAD_DIM | MOE
    ),
    "qwen3_next": Expected(
        QKVO + " dt_bias A_log conv1d in_proj_qkvz in_proj_ba out_proj",
        f"{GATED} gate {EXPERTS} shared_expert_gate",
        norm_in_attention=True,
        config=DELTANET | HEAD_DIM | MOE,
    ),
    "jamba": Expected(QKVO, f"{MAMBA} {GATED} router {EXPERTS}", config=JAMBA | MOE),
    "mamba": Expected("", MAMBA, "embeddings", config=TIED | {"state_size": 4, "time_step_rank": 2}),
}


def skip_unknown(architecture: str) -> None:
    if architecture not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")


def tiny(architecture: str, **config) -> torch.nn.Module:
    """A random model of two layers, hidden size 16."""
    skip_unknown(architecture)
    settings = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    settings |= dict(num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    settings |= dict(tie_word_embeddings=False)
    torch.manual_seed(0)
    expected = ARCHITECTURES[architecture].config
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**settings, **expected, **config}))


def freeze_groups(model, **options) -> GroupTable:
    return freeze_selection(model, GroupSelection.parse(**options))


def group_of_parameters(model) -> dict[str, str]:
    return {names[0].name: group_of(names) for _, names in named_tensors(model)}


def modules_of(groups: dict[str, str], group: str) -> set[str]:
    """The last module of each parameter in `group`, or the parameter itself where it is a raw one."""
    names = [re.sub(r"\.(weight|bias)$", "", name) for name in groups if groups[name] == group]
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_its_group(architecture):
    expected, model = ARCHITECTURES[architecture], tiny(architecture)
    groups = group_of_parameters(model)
    assert list(groups) == [name for name, _ in model.named_parameters()]
    assert modules_of(groups, "attention") == set(expected.attention.split())
    assert modules_of(groups, "mlp") == set(expected.mlp.split())
    assert modules_of(groups, "embeddings") == set(expected.embeddings.split())
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    assert modules_of(groups, "lm_head") == (set() if expected.config.get("tie_word_embeddings") else head)
    norms = {name for name, group in groups.items() if group == "norm"}
    assert norms == {name for name in groups if re.search(r"norm|\bln_", name)}
    assert any("attn." in name for name in norms) == expected.norm_in_attention
    table = {row.group: row for row in parameter_table(model)}
    assert tuple(table) == GROUPS
    assert sum(row.parameters for row in table.values()) == sum(p.numel() for p in model.parameters())


OTHERS = "bart bert codegen cohere2 falcon_h1 gemma3n_text gptj hrm_text jetmoe kimi_linear lfm2 longcat_flash "
OTHERS += "minimax nemotron_h olmoe persimmon prophetnet recurrent_gemma rembert rwkv xlm xlnet zamba2 zaya"


@pytest.mark.parametrize("architecture", OTHERS.split())
def test_structures_of_other_architectures(architecture):
    """On the meta device, as configured by default: models whose structure is unlike the above have groups as well."""
    skip_unknown(architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture))
    groups = group_of_parameters(model)
    assert list(groups) == [name for name, _ in model.named_parameters()]
    assert set(groups.values()) >= {"embeddings", "attention", "mlp"}
    freeze_groups(model, frozen_groups=["embeddings", "mlp", "lm_head"])
    trainable = {groups[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable <= {"attention", "norm"}


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
    model = tiny("mamba")
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
    bits[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"1 of 6 frozen parameters in 'mlp' changed: \['model.layers.1.mlp.up_proj"):
        verify_frozen(model, hashes)
    changed = hash_parameters(model)
    assert digest(changed["norm"]) == digest(hashes["norm"]) and digest(changed["mlp"]) != digest(hashes["mlp"])
