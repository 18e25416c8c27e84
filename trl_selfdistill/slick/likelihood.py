# SPDX-License-Identifier: Apache-2.0
"""How likely a model is to give a known answer, without generating anything.

The answer and the token that ends it are scored in one forward pass. Greedy decoding writes exactly this answer if
each of its tokens is the argmax given those before it; one sample writes it with the product of their probabilities.
SLiCK asks so with few-shot prompts (`slick`), the trainers' evaluation with the bare question.
"""

import copy
import inspect
import math
from collections.abc import Iterable, Sequence
from os.path import commonprefix
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

from ..hallucination.exact_match import spellings
from ..parameters.structure import base_causal_lm
from .generation import answer_ends, evaluation_mode
from .prompts import answer_completion


# Below this many shared tokens, computing them once saves less than handling the cache costs.
_MIN_SHARED_PREFIX = 16
# A further form of an answer that is less likely than this (one in a million) counts as impossible.
_NEGLIGIBLE_LOG_PROB = math.log(1e-6)
# Cache layers of keys and values alone. State-space and hybrid layers (which inherit from these) hold states that they
# change in place, so that they cannot be used for one batch after the other.
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_END = -1  # stands in an event for "one of the terminators" in place of a token


class AnswerScore(NamedTuple):
    """
    How a model stands to one question.

    Args:
        is_greedy (`bool`): Whether greedy decoding gives an accepted form of the answer, and ends it there.
        p_sampled (`float`): Probability, in [0, 1], that one sample is an accepted form of the answer.
    """

    is_greedy: bool
    p_sampled: float


class _Row(NamedTuple):
    """One tokenised `prompt + completion`; the completion's tokens begin at `start`."""

    token_ids: tuple[int, ...]
    start: int


class _RowScore(NamedTuple):
    """Score of one row, and those of its rivals (other forms of the same answer) that need a pass of their own."""

    is_greedy: bool
    p_sampled: float
    possible_rivals: list[_Row]


class _Sampling(NamedTuple):
    warpers: LogitsProcessorList
    terminator_ids: tuple[int, ...]
    negligible_log_prob: float  # forms of an answer that are less likely are not scored


class _Prefix(NamedTuple):
    """The tokens that all rows begin with and their key-value cache; length 0 without one."""

    length: int
    cache: Cache | None


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    accepted_answers: Sequence[Sequence[str]],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    greedy_only: bool = False,
    batch_size: int = 64,
    terminator_ids: Iterable[int] | None = None,
) -> list[AnswerScore]:
    """
    Scores each prompt's accepted answers: is one of them what greedy decoding writes, and how likely is it that one
    sample is one of them?

    `p_sampled` is the sum over the accepted forms of `prod_t p(token_t) * p(terminator)`, with `p = softmax(logits /
    temperature)` over the `top_k` largest logits, as `generate` samples. Of each form only the tokenizer's own tokens
    are scored, also with the other case of the first letter of its last word ("Swiss Franc", "Swiss franc"). The
    tokens that all rows of a call begin with (the exemplars of a few-shot prompt) go through the model once, if its
    cache can be shared.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, on any device, in training mode or not (it is put back).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. Prompt and answer are tokenised together, as the trainers do.
        prompts (`Sequence[str]`):
            The prompts, without their answers.
        accepted_answers (`Sequence[Sequence[str]]`):
            For each prompt the forms of the answer that count as right, as in a fact's `[answer, *aliases]`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of `p_sampled`.
        top_k (`int`, *optional*):
            Sampling is from the `top_k` most likely tokens; `None` for all.
        greedy_only (`bool`, *optional*, defaults to `False`):
            Whether `is_greedy` is all that is wanted, which about halves the time; `p_sampled` is a lower bound then.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompt-answer rows per forward pass.
        terminator_ids (`Iterable[int]`, *optional*):
            Tokens that end an answer; by default those of [`~trl_selfdistill.slick.generation.answer_ends`].

    Returns:
        `list[AnswerScore]`: One score a prompt, in their order.

    Raises:
        `ValueError`: If the two lists differ in length, or a prompt has no accepted answer or an empty one.
    """
    if (num_prompts := len(prompts)) != len(accepted_answers):
        raise ValueError(
            f"`prompts` has {num_prompts} entries and `accepted_answers` {len(accepted_answers)}; pair them"
        )
    rows_of_prompts = _tokenize(tokenizer, prompts, accepted_answers)
    if terminator_ids is None:
        terminator_ids = answer_ends(model, tokenizer).terminator_ids
    negligible = math.inf if greedy_only else _NEGLIGIBLE_LOG_PROB
    sampling = _Sampling(_sampling_warpers(temperature, top_k), tuple(terminator_ids), negligible)
    with evaluation_mode(model):
        prefix = _shared_prefix(model, {row for rows in rows_of_prompts for row in rows})
        # First one form of each answer. It tells which of the others have a chance at all; most have none.
        rivals: dict[_Row, list[_Row]] = {}
        for first, *others in rows_of_prompts:
            rivals.setdefault(first, []).extend(others)
        scores = _score_rows(model, rivals, prefix, sampling, batch_size)
        possible = {row: [] for score in list(scores.values()) for row in score.possible_rivals if row not in scores}
        scores |= _score_rows(model, possible, prefix, sampling, batch_size)
    impossible = _RowScore(False, 0.0, [])
    return [_any_form([scores.get(row, impossible) for row in rows]) for rows in rows_of_prompts]


def _any_form(scores: "list[_RowScore]") -> AnswerScore:
    # The forms are distinct sequences of tokens, so one sample is at most one of them.
    p_sampled = min(1.0, sum(score.p_sampled for score in scores))
    return AnswerScore(any(score.is_greedy for score in scores), p_sampled)


def _sampling_warpers(temperature: float, top_k: int | None) -> LogitsProcessorList:
    # transformers' own warpers in the order of `generate`: the probabilities are those that it samples from.
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    return warpers


def _tokenize(tokenizer, prompts: Sequence[str], accepted_answers: Sequence[Sequence[str]]) -> list[list[_Row]]:
    texts = list(prompts)
    for i, (prompt, forms) in enumerate(zip(prompts, accepted_answers, strict=True)):
        if not forms or isinstance(forms, str) or not all(form.strip() for form in forms):
            raise ValueError(f"`accepted_answers[{i}]` is {forms!r}; it must be a list of non-empty answers")
        texts.extend(prompt + answer_completion(spelling) for form in forms for spelling in spellings(form))
    token_ids = tokenizer(texts)["input_ids"] if texts else []
    # A tokenizer may end every text with EOS; the terminator's place comes right after the answer.
    eos = tokenizer.eos_token_id
    token_ids = [tuple(ids[:-1] if ids[-1:] == [eos] else ids) for ids in token_ids]
    completions = iter(token_ids[len(prompts) :])
    rows = []
    for prompt_ids, forms in zip(token_ids, accepted_answers, strict=False):
        full = dict.fromkeys(next(completions) for form in forms for _ in spellings(form))
        # Where a token crosses the border between prompt and answer, the row's own tokens from there on count.
        rows.append([_Row(ids, max(1, _common_length(prompt_ids, ids))) for ids in full])
    return rows


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    return len(commonprefix([first, second]))


def _shared_prefix(model: PreTrainedModel, rows: Iterable[_Row]) -> _Prefix:
    rows = sorted(rows)
    # Of sorted rows the first and the last share what all share. The logits at `start - 1` predict the first token of
    # an answer, so that position stays in every row.
    length = (
        min(_common_length(rows[0].token_ids, rows[-1].token_ids), *(row.start - 1 for row in rows)) if rows else 0
    )
    if length < _MIN_SHARED_PREFIX or len(rows) < 2:
        return _Prefix(0, None)
    input_ids = torch.tensor([rows[0].token_ids[:length]], device=model.device)
    cache = getattr(model(input_ids=input_ids, use_cache=True), "past_key_values", None)
    shareable = isinstance(cache, Cache) and all(type(layer) in _SHAREABLE_LAYERS for layer in cache.layers)
    return _Prefix(length, cache) if shareable else _Prefix(0, None)


def _repeat_cache(cache: Cache, batch_size: int) -> Cache:
    # Layers grow by making new tensors, so copying the objects alone keeps `cache` as it is for the next batch.
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    repeated.batch_repeat_interleave(batch_size)
    return repeated


def _score_rows(
    model, rivals: dict[_Row, list[_Row]], prefix: _Prefix, sampling: _Sampling, batch_size: int
) -> dict[_Row, _RowScore]:
    """Scores the rows that are the keys; the values are the rivals of each."""
    rows = sorted(rivals, key=lambda row: (len(row.token_ids), row))  # like lengths share a batch: little padding
    scores = {}
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        scores.update(zip(batch, _score_batch(model, batch, rivals, prefix, sampling), strict=True))
    return scores


def _score_batch(
    model, batch: list[_Row], rivals: dict[_Row, list[_Row]], prefix: _Prefix, sampling: _Sampling
) -> list[_RowScore]:
    # A line is a position whose logits are needed, as (row, position). An event is a line and the token that should
    # come next there: each token of an answer and its end, then the first token of each rival that the row has not.
    lines, events, spans, probes = [], [], [], []
    for i, row in enumerate(batch):
        offset = len(lines)
        lines += [(i, t) for t in range(row.start - 1, len(row.token_ids))]
        spans.append(slice(len(events), len(events) + len(lines) - offset))
        events += zip(range(offset, len(lines)), [*row.token_ids[row.start :], _END], strict=True)
        probes.append([])
        for rival in rivals[row]:
            apart = _common_length(row.token_ids, rival.token_ids)
            if row.start <= apart < len(rival.token_ids):
                probes[i].append((rival, apart - row.start, len(events)))
                events.append((offset + apart - row.start, rival.token_ids[apart]))
            else:
                probes[i].append((rival, 0, None))
    hits, log_probs = _evaluate(model, batch, lines, events, prefix, sampling)
    scores = []
    for span, row_probes in zip(spans, probes, strict=True):
        row_hits, row_log_probs = hits[span], log_probs[span]
        possible = []
        for rival, num_common, event in row_probes:
            # What the two have in common and the rival's next token bound the rival's probability from above.
            if (
                event is None
                or (hits[event] and all(row_hits[:num_common]))
                or sum(row_log_probs[:num_common]) + log_probs[event] > sampling.negligible_log_prob
            ):
                possible.append(rival)
        scores.append(_RowScore(all(row_hits), math.exp(sum(row_log_probs)), possible))
    return scores


def _evaluate(
    model, batch: list[_Row], lines: list[tuple[int, int]], events: list[tuple[int, int]], prefix, sampling
) -> tuple[list[bool], list[float]]:
    """For each event whether it is greedy decoding's choice, and its log-probability when sampling, in nats."""
    width = max(len(row.token_ids) for row in batch)
    # Pads come after the row, where a causal model cannot see them, so they need neither a mask nor a pad token.
    padded = [[*ids[prefix.length :], *ids[-1:] * (width - len(ids))] for ids, _ in batch]
    input_ids = torch.tensor(padded, device=model.device)  # (batch_size, width - prefix.length)
    first = min(row.start for row in batch) - 1
    logits = _forward(model, input_ids, prefix.cache, first - prefix.length)  # (batch_size, width - first, vocab_size)
    row, position = torch.tensor(lines, device=logits.device).unbind(1)
    logits = logits[row, position - first].float()  # (num_lines, vocab_size)
    predicted = logits.argmax(-1)
    log_probs = sampling.warpers(None, logits).log_softmax(-1)

    line, token = torch.tensor(events, device=logits.device).unbind(1)
    # A tokenizer may have more tokens than the model, never the other way round for those that it writes.
    ends = torch.tensor([i for i in sampling.terminator_ids if i < logits.shape[-1]], device=logits.device)
    hits = torch.where(token == _END, torch.isin(predicted, ends)[line], predicted[line] == token)
    end_log_probs = log_probs[:, ends].logsumexp(-1)[line]
    token_log_probs = log_probs[line, token.clamp(min=0)]
    return hits.tolist(), torch.where(token == _END, end_log_probs, token_log_probs).tolist()


def _forward(model, input_ids: torch.Tensor, cache: Cache | None, first: int) -> torch.Tensor:
    """The logits of the positions from `first` on, `(batch_size, width - first, vocab_size)`."""
    kwargs = {"use_cache": False}
    if cache is not None:
        kwargs = {"use_cache": True, "past_key_values": _repeat_cache(cache, len(input_ids))}
    # The class's `forward`: on the instance it may be wrapped (accelerate, TRL) beyond recognition.
    if "logits_to_keep" not in inspect.signature(type(base_causal_lm(model)).forward).parameters:
        return model(input_ids=input_ids, **kwargs).logits[:, first:]
    kwargs["logits_to_keep"] = torch.arange(first, input_ids.shape[1], device=input_ids.device)
    return model(input_ids=input_ids, **kwargs).logits
