# SPDX-License-Identifier: Apache-2.0
"""How likely a model is to give a known answer, from one forward pass of it and without generating anything."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

from ..hallucination.exact_match import spellings
from .generation import answer_ends, evaluation_mode
from .prompt_tokens import text_tokenizer, tokenize_answers


_MIN_SHARED_PREFIX = 16  # tokens, below which sharing them saves less than handling the cache costs
_NEGLIGIBLE_LOG_PROB = math.log(1e-6)  # a further form of an answer that is less likely counts as impossible
# Cache layers of keys and values alone: of hybrid ones, `batch_repeat_interleave` would not repeat the states
_SHAREABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_END = -1  # stands for "one of the terminators" in place of a token


class AnswerScore(NamedTuple):
    """Whether a model answers one question right."""

    is_greedy: bool  # greedy decoding gives an accepted form of the answer, and ends it there
    p_sampled: float  # probability, in [0, 1], that one sample is an accepted form of the answer


class _Row(NamedTuple):
    """A tokenized `prompt + completion`."""

    token_ids: tuple[int, ...]
    start: int  # of the completion


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
) -> list[AnswerScore]:
    """
    Scores the accepted answers to each prompt: does greedy decoding write one of them, and how likely does a sample?

    Greedy decoding writes a form if each of its tokens, and one that ends it, is the argmax given those before.
    `p_sampled` is the sum over the accepted forms of `prod_t p(token_t) * p(terminator)`, with `p = softmax(logits /
    temperature)` over the `top_k` largest logits, as `generate` samples. Of each form the tokenizer's own tokens are
    scored, and those of its [`~trl_selfdistill.hallucination.exact_match.spellings`].

    Args:
        model, tokenizer, prompts, top_k: As in [`~trl_selfdistill.slick.generation.predict_answers`].
        accepted_answers (`Sequence[Sequence[str]]`): For each prompt the forms of the answer that count as right.
        temperature (`float`, *optional*, defaults to `1.0`): Sampling temperature of `p_sampled`.
        greedy_only (`bool`, *optional*, defaults to `False`):
            Whether only `is_greedy` is needed, which takes about half the time. `p_sampled` is then a lower bound.
        batch_size (`int`, *optional*, defaults to `64`): Rows of prompt and answer per forward pass.

    Returns:
        `list[AnswerScore]`: A score for each prompt. A `ValueError` if the lists differ in length, or a prompt has no
        accepted answer or one that is not one line.
    """
    if len(prompts) != len(accepted_answers):
        raise ValueError(f"`prompts` has {len(prompts)} entries and `accepted_answers` {len(accepted_answers)}")
    rows_of_prompts = _tokenize(tokenizer, prompts, accepted_answers)
    _, terminator_ids = answer_ends(model, text_tokenizer(tokenizer))
    negligible = math.inf if greedy_only else _NEGLIGIBLE_LOG_PROB
    # transformers' own warpers in the order of `generate`: the probabilities are those that it samples from
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    with evaluation_mode(model):
        cache = _shared_prefix(model, {row for rows in rows_of_prompts for row in rows})
        scorer = _Scorer(model, cache, terminator_ids, warpers, negligible, batch_size)
        # First one form of each answer. It tells which of its rivals, the other forms, have a chance; most have none
        rivals: dict[_Row, list[_Row]] = {}
        for first, *others in rows_of_prompts:
            rivals.setdefault(first, []).extend(others)
        scores, possible = scorer.score(rivals)
        scores |= scorer.score({row: [] for row in possible if row not in scores})[0]
    results = []
    for rows in rows_of_prompts:
        is_greedy, p_sampled = zip(*(scores[row] for row in rows if row in scores), strict=True)
        # The forms are distinct sequences of tokens, so a sample is at most one of them
        results.append(AnswerScore(any(is_greedy), min(1.0, sum(p_sampled))))
    return results


def _tokenize(tokenizer, prompts: Sequence[str], accepted_answers: Sequence[Sequence[str]]) -> list[list[_Row]]:
    """For each prompt its rows, one for each spelling of the accepted answers."""
    for i, forms in enumerate(accepted_answers):
        if not forms or isinstance(forms, str) or not all(form.strip() for form in forms):
            raise ValueError(f"`accepted_answers[{i}]` is {forms!r}; it must be a list of non-empty answers")
    answers, rows = [[spelling for form in forms for spelling in spellings(form)] for forms in accepted_answers], []
    for prompt_ids, *full in tokenize_answers(tokenizer, prompts, answers):
        # Where a token crosses the border between prompt and answer, the row's own tokens from there on count
        rows.append([_Row(ids, max(1, len(commonprefix([prompt_ids, ids])))) for ids in dict.fromkeys(full)])
    return rows


def _shared_prefix(model: PreTrainedModel, rows: set[_Row]) -> Cache | None:
    """The key-value cache of what all rows begin with (the exemplars of a prompt); `None` if it is not shared."""
    prefix = commonprefix([row.token_ids[: row.start - 1] for row in rows])  # the next position predicts a token
    if len(rows) < 2 or len(prefix) < _MIN_SHARED_PREFIX:
        return None
    input_ids = torch.tensor([prefix], device=model.device)
    cache = getattr(model(input_ids=input_ids, use_cache=True), "past_key_values", None)
    shareable = isinstance(cache, Cache) and all(type(layer) in _SHAREABLE_LAYERS for layer in cache.layers)
    return cache if shareable else None


def _judged_tokens(row: _Row, form: _Row) -> list[int]:
    """The tokens of `form` that a forward pass of `row` judges: those that both begin with, and the one after them."""
    if form.token_ids[: row.start] != row.token_ids[: row.start]:
        return []
    own, other = ([*ids[row.start :], _END] for ids, _ in (row, form))
    return other[: len(commonprefix([own, other])) + 1]


@dataclass
class _Scorer:
    """Scores rows, which begin with the tokens in a `cache`, if there is one."""

    model: PreTrainedModel
    cache: Cache | None
    terminator_ids: Sequence[int]
    warpers: LogitsProcessorList
    negligible_log_prob: float
    batch_size: int

    def score(self, rivals: dict[_Row, list[_Row]]) -> tuple[dict[_Row, AnswerScore], list[_Row]]:
        """Scores the rows that are the keys, and returns as well which of their rivals, the values, are possible."""
        rows = sorted(rivals, key=lambda row: (len(row.token_ids), row))  # similar lengths in a batch: little padding
        scores, possible = {}, []
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin : begin + self.batch_size]
            # A line is a position whose logits are needed, as (row, position). An event is a line and a token that may
            # come next there. The spans of a row are its own events and those of each rival.
            lines, events, spans = [], [], []
            for i, row in enumerate(batch):
                spans.append([])
                for form in [row, *rivals[row]]:
                    tokens = _judged_tokens(row, form)
                    spans[i].append(slice(len(events), len(events) + len(tokens)))
                    events += enumerate(tokens, start=len(lines))
                lines += [(i, t) for t in range(row.start - 1, len(row.token_ids))]
            hits, log_probs = self._judge_events(batch, lines, events)
            for row, (own, *others) in zip(batch, spans, strict=True):
                scores[row] = AnswerScore(all(hits[own]), math.exp(sum(log_probs[own])))
                for rival, span in zip(rivals[row], others, strict=True):
                    if all(hits[span]) or sum(log_probs[span]) > self.negligible_log_prob:  # a bound from above
                        possible.append(rival)
        return scores, possible

    def _judge_events(
        self, batch: list[_Row], lines: list[tuple[int, int]], events: list[tuple[int, int]]
    ) -> tuple[list[bool], list[float]]:
        """For each event whether greedy decoding chooses it, and its log-probability in sampling, in nats."""
        first = min(row.start for row in batch) - 1
        logits = self._forward(batch, first)  # (batch_size, width - first, vocab_size)
        row, position = torch.tensor(lines, device=logits.device).unbind(1)
        logits = logits[row, position - first].float()  # (num_lines, vocab_size)
        predicted = logits.argmax(-1)
        log_probs = self.warpers(None, logits).log_softmax(-1)
        line, token = torch.tensor(events, device=logits.device).unbind(1)
        # A tokenizer may have more tokens than the model
        ends = torch.tensor([i for i in self.terminator_ids if i < logits.shape[-1]], device=logits.device)
        hits = torch.where(token == _END, torch.isin(predicted, ends)[line], predicted[line] == token)
        end_log_probs = log_probs[:, ends].logsumexp(-1)[line]
        token_log_probs = log_probs[line, token.clamp(min=0)]
        return hits.tolist(), torch.where(token == _END, end_log_probs, token_log_probs).tolist()

    def _forward(self, batch: list[_Row], first: int) -> torch.Tensor:
        """The logits of the positions from `first` on, `(batch_size, width - first, vocab_size)`."""
        width = max(len(row.token_ids) for row in batch)
        begin, kwargs = 0, {"use_cache": False}
        if self.cache is not None:
            begin = self.cache.get_seq_length()
            cache = copy.deepcopy(self.cache)  # of one row: the next batch needs it as it is
            cache.batch_repeat_interleave(len(batch))
            kwargs = {"use_cache": True, "past_key_values": cache}
        # Padding comes after the row, where a causal model cannot see it: it needs neither a mask nor a pad token
        padded = [[*ids[begin:], *ids[-1:] * (width - len(ids))] for ids, _ in batch]
        input_ids = torch.tensor(padded, device=self.model.device)  # (batch_size, width - begin)
        num_kept = width - first  # the few models that ignore it return the logits of all positions
        return self.model(input_ids=input_ids, logits_to_keep=num_kept, **kwargs).logits[:, -num_kept:]
