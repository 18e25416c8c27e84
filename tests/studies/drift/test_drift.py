# SPDX-License-Identifier: Apache-2.0
"""The drift of a model equals what a direct computation of each prompt by itself gives."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import CITIES, build_model, build_tokenizer
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
    Qwen3NextConfig,
)
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.studies.drift.measurement import measure_drift, read_reference, write_reference
from trl_selfdistill.studies.drift.prompt_states import check_layers, prompt_states, subject_attention
from trl_selfdistill.studies.drift.subject_tokens import subject_prompts


TOKENIZER = build_tokenizer()
# Prompts of uneven length, the subject here and there
QUESTIONS = {
    city: question.format(city)
    for city, question in zip(
        CITIES, ["Where is {}?", "{} is in which country, and why?", "Is it {}"] * 2, strict=True
    )
}
PROMPTS = subject_prompts(
    TOKENIZER, [question_prompt(question) for question in QUESTIONS.values()], [*QUESTIONS.values()], [*QUESTIONS]
)
LAYERS = (1, 2)
TINY = dict(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.4)
TINY |= dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
FAMILIES = {
    "qwen3": Qwen3Config(**TINY, head_dim=8, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
    "cohere": CohereConfig(**TINY, logit_scale=0.3),
    "falcon_h1": FalconH1Config(**TINY, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_state=8, lm_head_multiplier=0.4),
    "gpt2": GPT2Config(**TINY, n_embd=16, n_layer=2, n_head=2),
    "opt": OPTConfig(**TINY, ffn_dim=32, word_embed_proj_dim=16),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}


def sharp_model(seed: int = 0, **config):
    """Weights large enough that attention and logits are not nearly uniform."""
    return build_model(TOKENIZER, seed=seed, initializer_range=0.4, **config)


def nudged(model, scale: float = 0.1):
    """The model with random noise on its weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn_like(parameter)
    return other


def reference_of(model, folder, prompts=PROMPTS, layers=LAYERS, batch_size=32):
    write_reference(folder / "reference.safetensors", model, prompts, layers, batch_size)
    return read_reference(folder / "reference.safetensors", prompts, layers)


@torch.no_grad()
def direct(start, model, prompts=PROMPTS, layers=LAYERS) -> dict[str, list[float]]:
    """The same numbers from the models' own outputs, one prompt at a time."""
    values = {}
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        before, now = (each.eval()(input_ids=ids, output_hidden_states=True) for each in (start, model))
        for layer in layers:
            for name, position in (("subject", prompt.subject_positions[-1]), ("prompt", len(prompt.token_ids) - 1)):
                one, two = (each.hidden_states[layer][0, position] for each in (before, now))
                cosine = torch.dot(one, two) / (one.norm() * two.norm())
                values.setdefault(f"cosine/layer_{layer}/last_{name}_token", []).append(1 - cosine.item())
        before, now = (each.logits[0, -1].double().softmax(-1) for each in (before, now))
        values.setdefault("kl", []).append((before * (before / now).log()).sum().item())
    return values


@torch.no_grad()
def direct_attention(model, layer: int) -> list[float]:
    """The attention of each prompt's last token to its subject, from the weights that the model gives."""
    model.set_attn_implementation("eager")
    masses = []
    for prompt in PROMPTS:
        weights = model(input_ids=torch.tensor([prompt.token_ids]), output_attentions=True).attentions[layer - 1]
        masses.append(sum(weights[0, :, -1, position].mean().item() for position in prompt.subject_positions))
    return masses


def assert_close(found, expected, rel=1e-3, abs=2e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=rel, abs=abs), name


def test_a_model_that_did_not_move_is_at_distance_zero(tmp_path):
    model = sharp_model()
    drift = measure_drift(model, reference_of(model, tmp_path), PROMPTS, LAYERS)
    assert [*drift] == [
        *(f"cosine/layer_{layer}/last_{name}_token" for layer in LAYERS for name in ("subject", "prompt")),
        "kl",
    ]
    for name, values in drift.items():
        assert values == ([0] * 6 if name == "kl" else pytest.approx([0] * 6, abs=1e-15))


@pytest.mark.parametrize("scale", [0.003, 0.03, 0.3])
def test_drift_equals_a_direct_computation(tmp_path, scale):
    start = sharp_model()
    model = nudged(start, scale)
    drift = measure_drift(model, reference_of(start, tmp_path), PROMPTS, LAYERS)
    assert_close(drift, direct(start, model), abs=1e-6)
    assert all(min(values) > -1e-6 and max(values) > 1e-6 for values in drift.values())


def test_a_known_change_has_the_known_distance(tmp_path):
    start = sharp_model(tie_word_embeddings=False)
    reference = reference_of(start, tmp_path)
    with torch.no_grad():
        # The last hidden state is what leaves the final norm: turned round, it points the other way
        model = copy.deepcopy(start)
        model.model.norm.weight *= -1
        turned = measure_drift(model, reference, PROMPTS, LAYERS)
        # Scaled, it points where it did, and so do the logits, which are flatter
        model = copy.deepcopy(start)
        model.model.norm.weight *= 0.5
        scaled = measure_drift(model, reference, PROMPTS, LAYERS)
    for name in ("last_subject_token", "last_prompt_token"):
        assert turned[f"cosine/layer_2/{name}"] == pytest.approx([2] * 6)
        assert scaled[f"cosine/layer_2/{name}"] == pytest.approx([0] * 6, abs=1e-12)
        assert (
            turned[f"cosine/layer_1/{name}"] == scaled[f"cosine/layer_1/{name}"] == pytest.approx([0] * 6, abs=1e-15)
        )
    assert min(scaled["kl"]) > 1e-3 and min(turned["kl"]) > 1e-3
    # A change of the head alone moves no hidden state
    model = copy.deepcopy(start)
    torch.nn.init.normal_(model.lm_head.weight)
    head = measure_drift(model, reference, PROMPTS, LAYERS)
    assert min(head.pop("kl")) > 1e-3 and max(map(max, head.values())) < 1e-15


def test_only_the_entity_s_own_tokens_count(tmp_path):
    """What only changes tokens after the subject's last one does not move the subject, and moves the end."""
    start = sharp_model()
    [prompt] = prompts = subject_prompts(TOKENIZER, ["Q: Lyon!\nA:"], ["Lyon!"], ["Lyon"])
    after = {*prompt.token_ids[prompt.subject_positions[-1] + 1 :]}
    after -= {*prompt.token_ids[: prompt.subject_positions[-1] + 1]}
    assert after
    model = copy.deepcopy(start)
    with torch.no_grad():
        model.model.embed_tokens.weight[list(after)] += 1
    drift = measure_drift(model, reference_of(start, tmp_path, prompts), prompts, LAYERS)
    assert drift["cosine/layer_1/last_subject_token"] == pytest.approx([0], abs=1e-15)
    assert drift["cosine/layer_1/last_prompt_token"][0] > 1e-4


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_do_not_matter_and_neither_does_the_order_of_the_prompts(tmp_path, batch_size):
    start = sharp_model()
    model = nudged(start)
    expected = measure_drift(model, reference_of(start, tmp_path), PROMPTS, LAYERS, attention=True)
    reference = reference_of(start, tmp_path, PROMPTS[::-1], batch_size=batch_size)
    other = measure_drift(model, reference, PROMPTS[::-1], LAYERS, batch_size=batch_size, attention=True)
    assert_close({name: values[::-1] for name, values in other.items()}, expected, rel=1e-4)


def test_the_attention_on_the_subject_and_on_the_other_tokens_is_one():
    model = sharp_model(num_hidden_layers=3)
    mass = subject_attention(model, PROMPTS, (1, 3))
    others = [
        prompt._replace(subject_positions=tuple({*range(len(prompt.token_ids))} - {*prompt.subject_positions}))
        for prompt in PROMPTS
    ]
    torch.testing.assert_close(mass + subject_attention(model, others, (1, 3)), torch.ones(6, 2))
    assert mass.min() > 0.01 and mass.std(0).min() > 0.01
    for i, layer in enumerate((1, 3)):
        assert mass[:, i].tolist() == pytest.approx(direct_attention(model, layer), rel=1e-5)


def test_measuring_leaves_no_trace_on_the_model(tmp_path):
    model = sharp_model(attention_dropout=0.5)
    reference = reference_of(model, tmp_path)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state, implementation = torch.get_rng_state(), model.config._attn_implementation
    measured = measure_drift(model, reference, PROMPTS, LAYERS, attention=True)
    assert implementation == model.config._attn_implementation == "sdpa" and torch.is_grad_enabled()
    assert modes == [module.training for module in model.modules()] and {*modes} == {True, False}
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # And the numbers do not depend on what is measured beside them
    without = measure_drift(model, reference, PROMPTS, LAYERS)
    assert without == {name: values for name, values in measured.items() if "attention" not in name}


def test_the_implementation_of_attention_is_put_back_after_an_error():
    model = sharp_model()
    model.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        subject_attention(model, PROMPTS, LAYERS)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_models(tmp_path, name):
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(FAMILIES[name], dtype=torch.float32)
    model = nudged(start, 0.05)
    drift = measure_drift(model, reference_of(start, tmp_path, batch_size=4), PROMPTS, LAYERS, attention=True)
    attention = {f"attention/layer_{layer}": drift.pop(f"attention/layer_{layer}") for layer in LAYERS}
    assert_close(drift, direct(start, model), abs=1e-4)
    for layer in LAYERS:
        assert attention[f"attention/layer_{layer}"] == pytest.approx(direct_attention(model, layer), abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters(tmp_path, config):
    start = sharp_model()
    reference = reference_of(start, tmp_path)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(start), config)
    drift = measure_drift(model, reference, PROMPTS, LAYERS, batch_size=4, attention=True)
    assert min(drift["kl"]) > 1e-4 and min(drift["attention/layer_2"]) > 0
    alone = [measure_drift(model, reference_of(start, tmp_path, [p]), [p], LAYERS, attention=True) for p in PROMPTS]
    assert_close(drift, {name: [each[name][0] for each in alone] for name in drift}, abs=1e-5)
    if isinstance(config, LoraConfig):
        drift = {name: values for name, values in drift.items() if "attention" not in name}
        assert_close(drift, direct(start, model.merge_and_unload()), abs=1e-5)
        assert min(drift["cosine/layer_1/last_subject_token"]) > 1e-6


def test_the_reference_is_as_large_as_it_says_and_nothing_is_left_beside_it(tmp_path):
    model = sharp_model()
    reference_of(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]
    tensors = load_file(tmp_path / "reference.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == len(PROMPTS) * (8 * len(LAYERS) * 16 + 4 * len(TOKENIZER))


def test_layers_are_the_middle_and_the_last_or_those_asked_for():
    model = build_model(TOKENIZER, num_hidden_layers=5)
    assert check_layers(model, None) == (2, 5) and check_layers(model, [5, 1]) == (5, 1)
    assert check_layers(build_model(TOKENIZER, num_hidden_layers=1), None) == (1,)
    for wrong in ([0], [6], [-1], [True], [1.0], ["1"]):
        with pytest.raises(ValueError, match=r"`layers` has \[.*from 1 to 5"):
            check_layers(model, [1, *wrong])
    for wrong in ([], [2, 2]):
        with pytest.raises(ValueError, match="name at least one layer, and each once"):
            check_layers(model, wrong)


def test_another_reference_is_refused(tmp_path):
    model = sharp_model()
    reference = reference_of(model, tmp_path)
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ValueError, match=r"measured with other layers \(there \[1, 2\], now \[2\]\)"):
        read_reference(path, PROMPTS, (2,))
    moved = [PROMPTS[0]._replace(subject_positions=(0,)), *PROMPTS[1:]]
    for prompts in (PROMPTS[1:], moved):
        with pytest.raises(ValueError, match="measured with other prompts"):
            read_reference(path, prompts, LAYERS)
    with pytest.raises(FileNotFoundError, match="There is no drift reference .*none.safetensors"):
        read_reference(tmp_path / "none.safetensors", PROMPTS, LAYERS)
    for config, what in (({"hidden_size": 32}, "hidden size is 32"), ({"vocab_size": 310}, "vocabulary is 310")):
        with pytest.raises(ValueError, match=f"The model's {what}, that of the drift reference"):
            measure_drift(build_model(TOKENIZER, **config), reference, PROMPTS, LAYERS)


def test_layers_without_attention_are_an_error_that_says_so():
    torch.manual_seed(0)
    tiny = dict(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32, num_hidden_layers=4, head_dim=8)
    tiny |= dict(num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1)
    tiny |= dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_key_head_dim=8)
    tiny |= dict(linear_value_head_dim=8, linear_num_key_heads=1, linear_num_value_heads=2)
    model = AutoModelForCausalLM.from_config(Qwen3NextConfig(**tiny))
    assert prompt_states(model, PROMPTS, (2, 4)).hidden_states.shape == (6, 2, 2, 16)
    with pytest.raises(ValueError, match="weights of all 4 layers, and Qwen3NextForCausalLM gives those of 1 "):
        subject_attention(model, PROMPTS, (4,))


def measure_on_two_processes(folder: Path) -> None:
    """Five prompts for two processes, with whole weights and with weights that FSDP2 has sharded."""
    for name in ("whole", "sharded"):
        start = sharp_model()
        model = nudged(start)
        if name == "sharded":
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            for each in (start, model):
                for module in (*each.model.layers, each):
                    fully_shard(module, mesh=mesh)
        (folder / name).mkdir(exist_ok=True)
        reference = reference_of(start, folder / name, PROMPTS[:5], batch_size=2)
        drift = measure_drift(model, reference, PROMPTS[:5], LAYERS, batch_size=2, attention=True)
        torch.save(drift, folder / name / f"{torch.distributed.get_rank()}.pt")


def test_two_processes_measure_what_one_does(tmp_path):
    from accelerate import PartialState

    assert PartialState().num_processes == 1
    run_in_two_processes(__file__, tmp_path)
    start = sharp_model()
    reference = reference_of(start, tmp_path, PROMPTS[:5])
    expected = measure_drift(nudged(start), reference, PROMPTS[:5], LAYERS, attention=True)
    for name in ("whole", "sharded"):
        for rank in range(2):
            assert_close(torch.load(tmp_path / name / f"{rank}.pt"), expected, rel=1e-4)


if __name__ == "__main__":
    from accelerate import PartialState

    PartialState(cpu=True)
    measure_on_two_processes(Path(sys.argv[1]))
    leave_processes()
