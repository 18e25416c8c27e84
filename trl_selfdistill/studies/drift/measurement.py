# SPDX-License-Identifier: Apache-2.0
"""How far a model has moved from the one that its training started with, on prompts about entities that the training
does not show (arXiv 2604.15574, section 5).

What the start model makes of the prompts is kept in a file, of which a measurement reads the rows that it needs:
`num_prompts * (8 * num_layers * hidden_size + 4 * vocab_size)` bytes, 0.63 GB for 1,000 prompts and two layers of
Qwen2.5-1.5B. Only writing it takes as much memory, on the main process.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .prompt_states import POSITIONS, PromptStates, prompt_states, subject_attention
from .subject_tokens import SubjectPrompt


def write_reference(
    path: str | os.PathLike,
    model: torch.nn.Module,
    prompts: Sequence[SubjectPrompt],
    layers: Sequence[int],
    batch_size: int = 32,
) -> None:
    """
    Measures the start model and writes what [`measure_drift`] compares with to a safetensors file, whole or not at
    all. The log-probabilities are those of the whole vocabulary in fp32: the likeliest tokens alone would leave out
    what moves into the tail, and fp16 would put a floor of about 1e-5 nats under the KL.

    A collective: each process measures a share of the prompts, the main one writes. All of them read the file later,
    so that it has to be where they all see it.

    Args:
        path (`str` or `os.PathLike`): The file. Its folder is made if missing.
        model (`torch.nn.Module`): The start model, a causal language model in any wrapper.
        prompts (`Sequence[SubjectPrompt]`):
            Tokenised prompts, from [`~trl_selfdistill.studies.drift.subject_tokens.subject_prompts`].
        layers (`Sequence[int]`): Layers, from 1 (see [`~trl_selfdistill.studies.drift.prompt_states.prompt_states`]).
        batch_size (`int`, *optional*, defaults to `32`): Prompts in one forward pass, on each process.
    """
    state, path = PartialState(), Path(path)
    tensors: dict[str, torch.Tensor] = {}
    for rows, batch in _batches_of_this_process(prompts, batch_size):
        states = prompt_states(model, batch, layers)
        rows = torch.tensor(rows, device=states.log_probs.device)
        rows, *values = gather((rows, *(part.contiguous() for part in states)))
        if state.is_main_process:
            for name, value in zip(states._fields, values, strict=True):
                if name not in tensors:
                    tensors[name] = torch.empty(len(prompts), *value.shape[1:], dtype=value.dtype)
                tensors[name][rows.cpu()] = value.cpu()
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        save_file(tensors, temporary, metadata=_identity(prompts, layers))
        temporary.replace(path)
    state.wait_for_everyone()


def read_reference(path: str | os.PathLike, prompts: Sequence[SubjectPrompt], layers: Sequence[int]) -> PromptStates:
    """
    The start model's states from a file of [`write_reference`]. The file stays on the disk: rows are read as they are
    needed.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If it was measured on other prompts or layers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no drift reference {os.fspath(path)!r}, which holds the states of the model that training "
            "started from. Put it back, measure the start model again with `write_reference`, or resume without the "
            "probe."
        )
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    expected = _identity(prompts, layers)
    if found != expected:
        differing = [name for name in expected if found.get(name) != expected[name]]
        changes = ", ".join(f"{name} (there {found.get(name)}, now {expected[name]})" for name in differing)
        raise ValueError(
            f"The drift reference {os.fspath(path)!r} was measured with other {changes}. Use the same facts, "
            "tokenizer, `prompt_function` and `layers`, or name another file."
        )
    return PromptStates(**load_file(path))


def _identity(prompts: Sequence[SubjectPrompt], layers: Sequence[int]) -> dict[str, str]:
    digest = hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()
    return {"prompts": digest, "layers": json.dumps(list(layers))}


def measure_drift(
    model: torch.nn.Module,
    reference: PromptStates,
    prompts: Sequence[SubjectPrompt],
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    attention: bool = False,
) -> dict[str, list[float]]:
    """
    How far `model` is from the start model, prompt by prompt.

    A collective: each process measures a share of the prompts, in as many forward passes as the others.

    Args:
        model (`torch.nn.Module`): Causal language model, in any wrapper; one that shards the weights must be there.
        reference ([`PromptStates`]): The start model's, from [`read_reference`].
        prompts (`Sequence[SubjectPrompt]`): The prompts of the reference.
        layers (`Sequence[int]`): The layers of the reference.
        batch_size (`int`, *optional*, defaults to `32`): Prompts in one forward pass, on each process.
        attention (`bool`, *optional*, defaults to `False`): Whether to measure the attention as well.

    Returns:
        `dict[str, list[float]]`: By name, one value for each prompt, in their order:
        - `cosine/layer_<L>/last_subject_token` and `cosine/layer_<L>/last_prompt_token`: cosine distance, `1 - cos`,
          in [0, 2];
        - `kl`: KL(start ‖ model) of the token after the prompt, in nats;
        - `attention/layer_<L>`: what the model pays to the subject now ([`subject_attention`]).

    Raises:
        `ValueError`: If the model's hidden size or vocabulary is not that of the reference.
    """
    values: dict[int, list[float]] = {}
    for rows, batch in _batches_of_this_process(prompts, batch_size):
        now = prompt_states(model, batch, layers)
        _check_sizes(now, reference)
        numbers = _drift_of_batch(PromptStates(*(tensor[rows] for tensor in reference)), now)
        if attention:
            # A pass of its own, so that the other numbers do not depend on it
            numbers = torch.cat([numbers, subject_attention(model, batch, layers)], 1)
        values.update(zip(rows, numbers.tolist(), strict=True))
    values = dict(gather_object([*values.items()]))
    names = [f"cosine/layer_{layer}/{position}" for layer in layers for position in POSITIONS]
    names += ["kl", *(f"attention/layer_{layer}" for layer in layers if attention)]
    return {name: [values[row][i] for row in range(len(prompts))] for i, name in enumerate(names)}


def _drift_of_batch(start: PromptStates, now: PromptStates) -> torch.Tensor:
    """For each prompt of a batch the cosine distances, layer by layer, and the KL."""
    # In double precision, so that a model that did not move is at distance 0; on the CPU, as not every device has it
    cosine = torch.cosine_similarity(start.hidden_states.double(), now.hidden_states.cpu().double(), dim=-1)
    start_log_probs = start.log_probs.to(now.log_probs.device)
    start_probs = start_log_probs.exp()
    # A token that the start model rules out adds nothing, however its logarithm is written
    terms = torch.where(start_probs > 0, start_probs * (start_log_probs - now.log_probs), 0)
    return torch.cat([(1 - cosine).flatten(1), terms.sum(-1, keepdim=True).cpu()], 1)


def _check_sizes(now: PromptStates, reference: PromptStates) -> None:
    for name, field in (("hidden size", "hidden_states"), ("vocabulary", "log_probs")):
        size, expected = (getattr(states, field).shape[-1] for states in (now, reference))
        if size != expected:
            raise ValueError(
                f"The model's {name} is {size}, that of the drift reference {expected}. Measure the reference on the "
                "model that training starts from, after its embeddings were resized."
            )


def _batches_of_this_process(
    prompts: Sequence[SubjectPrompt], batch_size: int
) -> Iterator[tuple[list[int], list[SubjectPrompt]]]:
    """Batches of this process's share of the prompts, as row numbers and prompts: as many as the others have."""
    # Like lengths share a batch: little padding
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row].token_ids), row))
    # Padded with repeated rows: with sharded weights, every forward pass is a collective
    with PartialState().split_between_processes(order, apply_padding=True) as share:
        for begin in range(0, len(share), batch_size):
            rows = share[begin : begin + batch_size]
            yield rows, [prompts[row] for row in rows]
