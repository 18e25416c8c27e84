# SPDX-License-Identifier: Apache-2.0
"""What a model computes while it reads a question, and how far that is from its start (arXiv 2604.15574, sec. 5)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel

from ...parameters.structure import base_causal_lm
from ...slick.generation import evaluation_mode
from ...slick.process_sharding import map_in_parallel
from .subject_tokens import SubjectPrompt


POSITIONS = ("last_subject_token", "last_prompt_token")


class PromptStates(NamedTuple):
    """
    The states of a model on prompts.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_prompts, num_layers, 2, hidden_size)`):
            Hidden states of the chosen layers at [`POSITIONS`], fp32.
        log_probs (`torch.Tensor` of shape `(num_prompts, vocab_size)`):
            Log-probabilities of the token after the prompt, in nats, fp32.
    """

    hidden_states: torch.Tensor
    log_probs: torch.Tensor


def check_layers(model: torch.nn.Module, layers: Sequence[int] | None) -> tuple[int, ...]:
    """
    The layers to measure, from 1: `layers`, or the middle and the last one by default (14 and 28 of 28).

    Raises:
        `ValueError`: If there is none, a layer is named twice, or the model does not have it.
    """
    num_layers = base_causal_lm(model).config.get_text_config().num_hidden_layers
    if layers is None:
        return tuple(sorted({max(1, num_layers // 2), num_layers}))
    if not layers or len({*layers}) < len(layers) or not {*layers} <= {*range(1, num_layers + 1)}:
        raise ValueError(f"`layers` is {list(layers)}; pass different whole numbers from 1 to {num_layers}.")
    return tuple(layers)


def prompt_states(
    model: torch.nn.Module, prompts: Sequence[SubjectPrompt], layers: Sequence[int], batch_size: int = 32
) -> PromptStates:
    """
    The states of `model`, in the wrapper that gathers its shards, on prompts after the decoder blocks `layers`, from
    1, the last one after the final norm. A collective: each process measures a share of the prompts and gets all
    states, on the CPU. They take `num_prompts * (8 * num_layers * hidden_size + 4 * vocab_size)` bytes (fp32, as fp16
    puts a floor of about 1e-5 nats under a KL): 0.63 GB for 1,000 prompts and two layers of Qwen2.5-1.5B. The
    log-probabilities are of the whole vocabulary, as the top tokens miss what moves into the tail.
    """
    # Prompts of similar length share a batch, for little padding
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].token_ids))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    states = map_in_parallel(lambda rows: _states_of_batch(model, [prompts[row] for row in rows], layers), batches)
    rows = torch.tensor(order).argsort()
    return PromptStates(*(torch.cat(parts)[rows] for parts in zip(*states, strict=True)))


def _states_of_batch(model: torch.nn.Module, prompts: Sequence[SubjectPrompt], layers: Sequence[int]) -> PromptStates:
    device = base_causal_lm(extract_model_from_parallel(model)).device
    width = max(len(prompt.token_ids) for prompt in prompts)
    # Padding comes after the prompt, where a causal model cannot see it: it needs neither a mask nor a pad token
    padded = [[*prompt.token_ids, *prompt.token_ids[-1:] * (width - len(prompt.token_ids))] for prompt in prompts]
    # Positions are counted from the end, because adapters may put virtual tokens before the prompts
    last = torch.tensor([len(prompt.token_ids) - 1 - width for prompt in prompts])
    subject = torch.tensor([prompt.last_subject_token - width for prompt in prompts])
    with evaluation_mode(model):
        outputs = model(
            input_ids=torch.tensor(padded, device=device), output_hidden_states=list(layers), use_cache=False
        )
    rows, positions = torch.arange(len(prompts)), torch.stack([subject, last])
    logits = outputs.logits[rows, last].float()
    states = [outputs.hidden_states[layer][rows, positions].float().to(logits.device) for layer in layers]
    return PromptStates(torch.stack(states).permute(2, 0, 1, 3).cpu(), logits.log_softmax(-1).cpu())


def drift(start: PromptStates, now: PromptStates, layers: Sequence[int]) -> dict[str, list[float]]:
    """
    How far a model has moved: from its states at the start and now, on the same prompts and `layers`, by name, one
    value per prompt:
    - `cosine/layer_<L>/<position>`: cosine distance of the hidden states, `1 - cos`, in [0, 2];
    - `kl`: KL(start ‖ now) of the token after the prompt, in nats.
    """
    # In double precision, so that a model that did not move is at distance 0
    similarities = torch.cosine_similarity(start.hidden_states.double(), now.hidden_states.double(), dim=-1)
    values = {}
    for i, layer in enumerate(layers):
        for j, position in enumerate(POSITIONS):
            values[f"cosine/layer_{layer}/{position}"] = (1 - similarities[:, i, j]).tolist()
    values["kl"] = []
    for start_log_probs, log_probs in zip(start.log_probs, now.log_probs, strict=True):
        start_probs = start_log_probs.exp()
        # A token that the start model rules out adds 0, not NaN
        terms = torch.where(start_probs > 0, start_probs * (start_log_probs - log_probs), 0)
        values["kl"].append(terms.sum().item())
    return values
