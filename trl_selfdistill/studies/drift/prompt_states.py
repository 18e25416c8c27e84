# SPDX-License-Identifier: Apache-2.0
"""What goes on inside of a model while it reads a question: hidden states at the entity that is asked about and at
the end of the prompt, the distribution of the next token, and how much attention the entity gets.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from ...slick.generation import evaluation_mode
from .subject_tokens import SubjectPrompt


POSITIONS = ("last_subject_token", "last_prompt_token")


class PromptStates(NamedTuple):
    """
    What a model makes of prompts, at two positions of each.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_prompts, num_layers, 2, hidden_size)`):
            Hidden states of the chosen layers at [`POSITIONS`], fp32.
        log_probs (`torch.Tensor` of shape `(num_prompts, vocab_size)`):
            Log-probabilities of the token after the prompt, in nats, fp32.
    """

    hidden_states: torch.Tensor
    log_probs: torch.Tensor


def causal_lm_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model of transformers inside of what DDP, FSDP, DeepSpeed, `torch.compile` and PEFT put around it."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_layers(model: torch.nn.Module, layers: Sequence[int] | None) -> tuple[int, ...]:
    """
    The layers to look at, from 1 to the number of decoder blocks; by default the middle one and the last (14 and 28 of
    28).

    Raises:
        `ValueError`: If there is none, one is named twice, or the model has no such layer.
    """
    num_layers = _num_layers(causal_lm_of(model))
    if layers is None:
        return tuple(sorted({max(1, num_layers // 2), num_layers}))
    wrong = [layer for layer in layers if type(layer) is not int or not 1 <= layer <= num_layers]
    if wrong:
        raise ValueError(f"`layers` has {wrong}; the model's layers are the whole numbers from 1 to {num_layers}.")
    if not layers or len({*layers}) < len(layers):
        raise ValueError(f"`layers` is {list(layers)}; name at least one layer, and each once.")
    return tuple(layers)


def prompt_states(model: torch.nn.Module, prompts: Sequence[SubjectPrompt], layers: Sequence[int]) -> PromptStates:
    """
    What `model` makes of one batch of prompts, in one forward pass without gradients.

    Layer `L` is `hidden_states[L]` of transformers: the output of the `L`-th decoder block and, for the last one, that
    output after the final norm, as the LM head reads it.

    Args:
        model (`torch.nn.Module`): Causal language model, in any wrapper, in training mode or not (it is put back).
        prompts (`Sequence[SubjectPrompt]`): The prompts of the batch.
        layers (`Sequence[int]`): Layers, from 1.
    """
    last, rows = _last_positions(prompts), torch.arange(len(prompts))
    subject = last - torch.tensor([len(prompt.token_ids) - 1 - prompt.subject_positions[-1] for prompt in prompts])
    with evaluation_mode(model):
        outputs = _forward(model, prompts, output_hidden_states=list(layers))
    # A model that knows `logits_to_keep` gives logits at the last positions only
    kept, place = last.unique(return_inverse=True)
    logits = outputs.logits[rows, place if outputs.logits.shape[1] == len(kept) else last]
    positions = torch.stack([subject, last])
    hidden_states = [outputs.hidden_states[layer][rows, positions].float().to(logits.device) for layer in layers]
    return PromptStates(torch.stack(hidden_states).permute(2, 0, 1, 3), logits.float().log_softmax(-1))


def subject_attention(model: torch.nn.Module, prompts: Sequence[SubjectPrompt], layers: Sequence[int]) -> torch.Tensor:
    """
    The share in [0, 1] of the last prompt token's attention that goes to the subject's tokens, mean over the heads.

    The attention runs as `"eager"` meanwhile, the only implementation that gives its weights, and gives them for all
    layers: `num_layers * batch_size * num_heads * width**2` numbers.

    Args:
        model (`torch.nn.Module`): Causal language model, in any wrapper, in training mode or not (it is put back).
        prompts (`Sequence[SubjectPrompt]`): The prompts of the batch.
        layers (`Sequence[int]`): Layers, from 1.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_layers)`, fp32.

    Raises:
        `ValueError`: If the model does not give the attention weights of every layer.
    """
    causal_lm = causal_lm_of(model)
    with evaluation_mode(model), _eager_attention(causal_lm):
        attentions = _forward(model, prompts, output_attentions=True).attentions
    given = [weights for weights in attentions or () if weights is not None]
    num_layers = _num_layers(causal_lm)
    if len(given) != num_layers:
        raise ValueError(
            f"`attention=True` needs the attention weights of all {num_layers} layers, and {type(causal_lm).__name__} "
            f"gives those of {len(given)} (linear attention and state spaces have none). Leave `attention` off."
        )
    last, rows = _last_positions(prompts), torch.arange(len(prompts))
    weights = torch.stack([given[layer - 1][rows, :, last].float().mean(1).cpu() for layer in layers], 1)
    width = max(len(prompt.token_ids) for prompt in prompts)
    inside = torch.zeros(len(prompts), 1, width)
    for row, prompt in enumerate(prompts):
        inside[row, :, list(prompt.subject_positions)] = 1
    # Virtual tokens have columns of their own, before those of the prompt
    return (weights[..., -width:] * inside).sum(-1)


def _num_layers(causal_lm: PreTrainedModel) -> int:
    return causal_lm.config.get_text_config().num_hidden_layers


def _last_positions(prompts: Sequence[SubjectPrompt]) -> torch.Tensor:
    """Where each prompt of a batch ends, counted from the end: adapters may put virtual tokens before the prompts."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    return torch.tensor([len(prompt.token_ids) - 1 - width for prompt in prompts])


def _forward(model: torch.nn.Module, prompts: Sequence[SubjectPrompt], **options):
    causal_lm = causal_lm_of(model)
    width = max(len(prompt.token_ids) for prompt in prompts)
    # Pads come after the prompt, where a causal model cannot see them, so they need neither a mask nor a pad token.
    padded = [[*prompt.token_ids, *prompt.token_ids[-1:] * (width - len(prompt.token_ids))] for prompt in prompts]
    # The class's `forward`: on the instance it may be wrapped (accelerate, TRL) beyond recognition.
    if "logits_to_keep" in inspect.signature(type(causal_lm).forward).parameters:
        options["logits_to_keep"] = _last_positions(prompts).unique().to(causal_lm.device)
    return model(input_ids=torch.tensor(padded, device=causal_lm.device), use_cache=False, **options)


@contextmanager
def _eager_attention(causal_lm: PreTrainedModel) -> Iterator[None]:
    """The implementation of attention that gives its weights; on leaving, the one of before is back."""
    config = causal_lm.config
    before = {"": config._attn_implementation}
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            before[name] = getattr(config, name)._attn_implementation
    causal_lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        # It ran before, be it a kernel of the Hub's that nobody has verified
        causal_lm.set_attn_implementation(before, allow_all_kernels=True)
