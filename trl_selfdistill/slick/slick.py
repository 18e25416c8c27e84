# SPDX-License-Identifier: Apache-2.0
"""SLiCK: how well a model knows each fact (Gekhman et al. 2024, arXiv 2405.05904, section 3)."""

import logging
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hallucination.exact_match import exact_match
from ..hallucination.metric import SlickCategory
from ..parameters.hashes import hash_model
from .generation import predict_answers
from .likelihood import score_answers
from .process_sharding import ProgressFile, checksum
from .prompt_tokens import tokenize_prompts
from .prompts import answer_completion, few_shot_prompt


logger = logging.getLogger(__name__)

# Facts of one relation and prompt that are asked together: what an interruption loses
_CHUNK_SIZE = {"score": 256, "generate": 64}
_MAX_SHARE = 0.1  # of the facts of a relation, as exemplars are lost for training and evaluation
_LIKELY = 0.5  # probability of a right sample from which a fact is WeaklyKnown without drawing
_REQUIRED_COLUMNS = ["fact_id", "relation", "question", "answer", "aliases"]
_SAMPLING_COLUMNS = ("p_correct_sampled", "p_any_sample_correct")
SLICK_COLUMNS = ("p_correct_greedy", *_SAMPLING_COLUMNS, "slick_category")


def slick_category(p_correct_greedy: float, p_correct_sampled: float) -> SlickCategory:
    """Returns the category of a fact, given the fractions of its answers that are right (2405.05904, Figure 2)."""
    if p_correct_greedy >= 1.0:
        return SlickCategory.HIGHLY_KNOWN
    if p_correct_greedy > 0.0:
        return SlickCategory.MAYBE_KNOWN
    return SlickCategory.WEAKLY_KNOWN if p_correct_sampled > 0.0 else SlickCategory.UNKNOWN


@dataclass(frozen=True)
class SlickSettings:
    """
    How a fact is asked.

    Args:
        num_prompts (`int`, *optional*, defaults to `4`): Few-shot prompts for each fact.
        num_shots (`int`, *optional*, defaults to `4`): Solved exemplars of the same relation in each prompt.
        num_samples (`int`, *optional*, defaults to `16`): Answers sampled for each prompt, besides the greedy one.
        temperature (`float`, *optional*, defaults to `0.5`): Sampling temperature.
        top_k (`int`, *optional*, defaults to `40`): Number of most likely tokens to sample from; `None` for all.
        method (`str`, *optional*, defaults to `"score"`):
            `"score"` computes the probabilities of the right answers, `"generate"` draws answers (docs/slick.md).
        only_highly_known (`bool`, *optional*, defaults to `False`):
            Whether to find the HighlyKnown facts alone: a fact is asked greedily until one answer is wrong.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice of exemplars and of the sampling.
    """

    num_prompts: int = 4
    num_shots: int = 4
    num_samples: int = 16
    temperature: float = 0.5
    top_k: int | None = 40
    method: Literal["score", "generate"] = "score"
    only_highly_known: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("num_prompts", "num_shots", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        if self.method not in _CHUNK_SIZE:
            raise ValueError(f"`method` is {self.method!r}; choose one of {', '.join(map(repr, _CHUNK_SIZE))}")


PRESETS = {
    # arXiv 2405.05904, section 3: 10 random 4-shot prompts, each greedy and 16 samples at T = 0.5 with top-k 40
    "gekhman2024": SlickSettings(num_prompts=10, method="generate"),
    # arXiv 2604.15574: "several" few-shot prompts and about 20 draws in all. 5 x 4 is this package's choice, and so
    # are temperature and top-k, those of 2405.05904
    "kaplan2026": SlickSettings(num_prompts=5, num_samples=4, method="generate"),
    # The sampling of 2405.05904 with fewer prompts and without drawing: minutes on a CPU
    "quick": SlickSettings(num_prompts=4, method="score"),
}


def reserve_exemplars(
    facts: Dataset, num_prompts: int, num_shots: int, seed: int
) -> tuple[dict[str, list[list[tuple[str, str]]]], list[int]]:
    """
    Sets facts of each relation aside as exemplars and draws the exemplars of each prompt from them.

    A relation gives `num_prompts * num_shots` facts, or a tenth of its facts if that is less, but at least
    `num_shots`. As far as these allow, the exemplars of a prompt have distinct answers, and prompts share few. Returns
    for each relation its prompts, each a list of `(question, answer)`, and the rows of `facts` that are left. A
    `ValueError` if a relation has none left to ask.
    """
    fact_ids, questions, answers = facts["fact_id"][:], facts["question"][:], facts["answer"][:]
    rows_of_relation: dict[str, list[int]] = {}
    for row, relation in enumerate(facts["relation"]):
        rows_of_relation.setdefault(relation, []).append(row)
    exemplars, reserved = {}, set()
    for relation, rows in rows_of_relation.items():
        size = min(num_prompts * num_shots, max(num_shots, int(_MAX_SHARE * len(rows))))
        if size >= len(rows):
            found = f"relation {relation!r} has {len(rows)} facts, and `num_shots` = {num_shots} are exemplars"
            raise ValueError(f"{found}, which leaves none to ask; add facts, drop it or lower `num_shots`")
        rng = random.Random(f"{seed}/{relation}")
        pool = rng.sample(sorted(rows, key=lambda row: fact_ids[row]), size)
        reserved.update(pool)
        used: Counter[int] = Counter()
        exemplars[relation] = []
        for _ in range(num_prompts):
            # Least used first, chance decides between equals; then those that repeat an answer go to the end
            order = sorted(pool, key=lambda row: (used[row], rng.random()))
            first_rows = {answers[row]: row for row in reversed(order)}
            prompt = sorted(order, key=lambda row: row != first_rows[answers[row]])[:num_shots]
            used.update(prompt)
            rng.shuffle(prompt)
            exemplars[relation].append([(questions[row], answers[row]) for row in prompt])
    return exemplars, [row for row in range(len(facts)) if row not in reserved]


def annotate_facts(
    facts: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SlickSettings = PRESETS["quick"],
    *,
    prompt_function: Callable[[str, list[tuple[str, str]]], str | list[dict]] = few_shot_prompt,
    batch_size: int = 64,
    progress_file: str | os.PathLike | None = None,
) -> Dataset:
    """
    Asks a model every fact and adds columns.

    - `p_correct_greedy`: fraction of the prompts whose greedy answer is right.
    - `p_correct_sampled`: fraction of the samples that are right; with method `"score"`, their mean probability.
    - `p_any_sample_correct`: 1.0 or 0.0; with `"score"`, the probability that at least one of all samples is right.
    - `slick_category`: a [`~trl_selfdistill.hallucination.metric.SlickCategory`]. With `"score"`, a fact without
      a right greedy answer is WeaklyKnown if drawing the samples would more likely than not give a right one.

    The facts that serve as exemplars are left out ([`reserve_exemplars`]): nothing from a prompt is trained or
    evaluated on. With `only_highly_known`, so are the facts of the other categories and the columns about samples. In
    a distributed launch this is a collective: each process, with the whole model, asks a share of the facts.

    Args:
        facts (`Dataset`): Table with the columns `fact_id`, `relation`, `question`, `answer` and `aliases`.
        model ([`~transformers.PreTrainedModel`]): The model to ask, in its dtype.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        settings ([`SlickSettings`], *optional*, defaults to `PRESETS["quick"]`): How to ask.
        prompt_function (`Callable`, *optional*, defaults to [`~trl_selfdistill.slick.prompts.few_shot_prompt`]):
            Makes the prompt of a question and its exemplars, pairs of question and answer: a text, or a conversation
            for the chat template ([`~trl_selfdistill.slick.prompts.few_shot_messages`]).
        batch_size (`int`, *optional*, defaults to `64`): Sequences in one forward pass.
        progress_file (`str` or `os.PathLike`, *optional*): JSON lines of the results, to continue a stopped run.

    Returns:
        `Dataset`: The facts that are not exemplars, in their order, with the new columns, the same on each process.

    Raises:
        `ValueError`: If there are no facts, a relation has too few, or the progress file is of other work.
    """
    if not len(facts):
        raise ValueError("`facts` has no rows; add some")
    exemplars, kept = reserve_exemplars(facts, settings.num_prompts, settings.num_shots, settings.seed)
    asked = facts.select(kept)
    relations, questions = asked["relation"][:], asked["question"][:]
    accepted = [[answer, *aliases] for answer, aliases in zip(asked["answer"], asked["aliases"], strict=True)]
    identity = {"settings": asdict(settings), "batch_size": batch_size}
    if progress_file is not None:
        first = [prompt_function(questions[row], exemplars[relations[row]][0]) for row in range(len(asked))]
        identity |= {"prompts": checksum(tokenize_prompts(tokenizer, first)), "model": hash_model(model)}
        identity["facts"] = checksum(facts.select_columns(_REQUIRED_COLUMNS).to_list())
    work = ProgressFile(progress_file, identity)

    def ask(prompt: int, name: str, rows: list[int]) -> list:
        shots = exemplars[relations[rows[0]]][prompt]
        prompts = [prompt_function(questions[row], shots) for row in rows]
        return _ask(model, tokenizer, prompts, [accepted[row] for row in rows], settings, batch_size, name)

    outcomes: dict[int, list] = {row: [] for row in range(len(asked))}  # of each fact, one for each prompt
    size = _CHUNK_SIZE[settings.method]
    for prompt in range(settings.num_prompts):
        units = {}  # by name, pieces of one relation each
        for relation in exemplars:
            own = [row for row in outcomes if relations[row] == relation]
            units |= {f"{relation}/{prompt}/{begin}": own[begin : begin + size] for begin in range(0, len(own), size)}
        work.do(partial(ask, prompt), units, f"SLiCK, prompt {prompt + 1} of {settings.num_prompts}")
        for name, rows in units.items():
            for row, result in zip(rows, work.results[name], strict=True):
                outcomes[row].append(result)
        if settings.only_highly_known:
            outcomes = {row: results for row, results in outcomes.items() if results[-1][0]}
    if settings.only_highly_known:
        logger.info(f"SLiCK: {len(outcomes)} of {len(asked)} facts are HighlyKnown, and the others are left out.")
    return _add_columns(asked.select([*outcomes]), [*outcomes.values()], settings)


def _ask(model, tokenizer, prompts, accepted, settings: SlickSettings, batch_size: int, unit: str) -> list:
    """For each prompt whether the greedy answer is right, and the fraction or probability of right samples."""
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "batch_size": batch_size}
    if settings.method == "score":
        sampling["greedy_only"] = settings.only_highly_known
        return score_answers(model, tokenizer, prompts, accepted, **sampling)
    longest = longest_answer(tokenizer, accepted)
    # A seed for each unit: its samples do not depend on which units an earlier run has done
    seed = random.Random(f"{settings.seed}/{unit}").getrandbits(32)
    sampling |= {"num_samples": settings.num_samples, "max_new_tokens": longest, "seed": seed}
    greedy = predict_answers(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=longest)
    sampled = greedy if settings.only_highly_known else predict_answers(model, tokenizer, prompts, **sampling)
    return [
        [exact_match(answer, forms), fmean(exact_match(sample, forms) for sample in samples)]
        for [answer], samples, forms in zip(greedy, sampled, accepted, strict=True)
    ]


def longest_answer(tokenizer: PreTrainedTokenizerBase, accepted: Sequence[Sequence[str]]) -> int:
    """Tokens in which each accepted form fits: a longer answer is wrong however it ends. 8 are for full stops."""
    completions = [answer_completion(form) for forms in accepted for form in forms]
    return 8 + max(map(len, tokenizer(completions, add_special_tokens=False)["input_ids"]))


def _add_columns(asked: Dataset, outcomes_of_facts: list[list], settings: SlickSettings) -> Dataset:
    rows = []
    for outcomes in outcomes_of_facts:
        p_greedy, p_sampled = map(fmean, zip(*outcomes, strict=True))
        p_any = float(p_sampled > 0)
        if settings.method == "score":
            p_any = 1.0 - math.prod((1.0 - sampled) ** settings.num_samples for _, sampled in outcomes)
        category = slick_category(p_greedy, p_sampled if p_any >= _LIKELY else 0.0)
        rows.append((p_greedy, p_sampled, p_any, str(category)))
    asked = asked.remove_columns([name for name in SLICK_COLUMNS if name in asked.column_names])
    for i, name in enumerate(SLICK_COLUMNS):
        if not (settings.only_highly_known and name in _SAMPLING_COLUMNS):
            asked = asked.add_column(name, [row[i] for row in rows])
    return asked
