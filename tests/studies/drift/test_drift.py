# SPDX-License-Identifier: Apache-2.0
"""The states of a model are those of each prompt by itself, and the drift is what a hand computes from them."""

import math

import pytest
import torch
from conftest import CITIES, build_model
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from sft_runs import TOKENIZER, architecture

from trl_selfdistill.studies.drift.prompt_states import PromptStates, check_layers, drift, prompt_states
from trl_selfdistill.studies.drift.subject_tokens import subject_prompts


# Prompts of uneven length, the subject here and there
FORMS = ["Where is {}?", "{} is in which country, and why?", "Is it {}"] * 2
QUESTIONS = [form.format(city) for form, city in zip(FORMS, CITIES, strict=True)]
PROMPTS = subject_prompts(TOKENIZER, QUESTIONS, [*CITIES])
LAYERS = (1, 2)
ADAPTERS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def model_of(name: str):
    if name not in ADAPTERS:
        return architecture(name)
    torch.manual_seed(0)
    return get_peft_model(build_model(TOKENIZER, initializer_range=0.4), ADAPTERS[name])


@torch.no_grad()
def direct_states(model) -> PromptStates:
    """The same states from the model's own outputs, one prompt at a time. Virtual tokens come before the prompts."""
    model.eval()
    hidden_states, log_probs = [], []
    for token_ids, position in PROMPTS:
        outputs = model(torch.tensor([token_ids]), output_hidden_states=True)
        positions = [position - len(token_ids), -1]
        hidden_states.append(torch.stack([outputs.hidden_states[layer][0, positions] for layer in LAYERS]))
        log_probs.append(outputs.logits[0, -1].log_softmax(-1))
    return PromptStates(torch.stack(hidden_states), torch.stack(log_probs))


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", *ADAPTERS])
def test_the_states_are_those_of_each_prompt_by_itself(name):
    model = model_of(name)
    for batch_size in (1, 4, 32):
        model.train()
        found = prompt_states(model, PROMPTS, LAYERS, batch_size)
        assert model.training
        for part, other in zip(found, direct_states(model), strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


def test_the_drift_by_layer_and_position_by_hand():
    # Of one prompt, the last subject token and the last prompt token of two layers
    start = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[3.0, 4.0], [0.0, 2.0]]]])
    now = torch.tensor([[[[5.0, 0.0], [0.0, 1.0]], [[-3.0, -4.0], [2.0, 2.0]]]])
    # The start model rules out the third token
    start_probs, probs = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = drift(PromptStates(start, start_probs.log()), PromptStates(now, probs.log()), (7, 14))
    assert found == {
        "cosine/layer_7/last_subject_token": [pytest.approx(0)],
        "cosine/layer_7/last_prompt_token": [pytest.approx(1)],
        "cosine/layer_14/last_subject_token": [pytest.approx(2)],
        "cosine/layer_14/last_prompt_token": [pytest.approx(1 - math.sqrt(0.5))],
        "kl": [pytest.approx(0.5 * math.log(2))],
    }


def test_layers_are_the_middle_and_the_last_or_those_asked_for():
    model = build_model(TOKENIZER, num_hidden_layers=5)
    assert check_layers(model, None) == (2, 5) and check_layers(model, [5, 1]) == (5, 1)
    for wrong in ([0], [1, 6], [-1], ["1"], [], [2, 2]):
        with pytest.raises(ValueError, match=r"`layers` is \[.*different whole numbers from 1 to 5"):
            check_layers(model, wrong)
