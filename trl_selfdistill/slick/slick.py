# SPDX-License-Identifier: Apache-2.0
"""SLiCK: how well a model knows each fact (Gekhman et al. 2024, arXiv 2405.05904, section 3).

Each fact is asked with several few-shot prompts. `annotate_facts` takes a table of facts and adds how often the
answers are right and the category that follows; `training_mix` builds the training data from the categories.
"""

import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Literal, NamedTuple

from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hallucination.exact_match import exact_match
from .exemplars import reserve_exemplars
from .generation import predict_answers
from .likelihood import score_answers
from .process_sharding import map_in_parallel
from .progress_file import ProgressFile
from .prompts import answer_completion, few_shot_prompt


# Facts of one (relation, prompt) that are answered together: what an interruption loses, and one step of the ETA.
_CHUNK_SIZE = {"score": 256, "generate": 64}
_REQUIRED_COLUMNS = ("fact_id", "relation", "question", "answer", "aliases")
SLICK_COLUMNS = ("p_correct_greedy", "p_correct_sampled", "p_any_sample_correct", "slick_category")


class SlickCategory(str, Enum):
    """The four categories; "Known" means the first three."""

    HIGHLY_KNOWN = "HighlyKnown"
    MAYBE_KNOWN = "MaybeKnown"
    WEAKLY_KNOWN = "WeaklyKnown"
    UNKNOWN = "Unknown"


def slick_category(p_correct_greedy: float, p_correct_sampled: float) -> SlickCategory:
    """
    The category of a fact, from the fractions of its right answers (arXiv 2405.05904, Figure 2).

    ```python
    >>> slick_category(1.0, 0.9).value, slick_category(0.25, 0.0).value
    ('HighlyKnown', 'MaybeKnown')
    >>> slick_category(0.0, 0.1).value, slick_category(0.0, 0.0).value
    ('WeaklyKnown', 'Unknown')
    ```
    """
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
        num_prompts (`int`, *optional*, defaults to `4`):
            Few-shot prompts that each fact is asked with.
        num_shots (`int`, *optional*, defaults to `4`):
            Solved exemplars of the same relation in each prompt.
        num_samples (`int`, *optional*, defaults to `16`):
            Answers sampled for each prompt, besides the greedy one.
        temperature (`float`, *optional*, defaults to `0.5`):
            Sampling temperature.
        top_k (`int`, *optional*, defaults to `40`):
            Sampling is from the `top_k` most likely tokens; `None` for all.
        method (`str`, *optional*, defaults to `"score"`):
            `"score"` computes the probabilities of the right answers, `"generate"` draws answers and counts the right
            ones; docs/slick.md compares them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of exemplars and of the sampling.

    Raises:
        `ValueError`: If a number is too small or the method is not one of the two.
    """

    num_prompts: int = 4
    num_shots: int = 4
    num_samples: int = 16
    temperature: float = 0.5
    top_k: int | None = 40
    method: Literal["score", "generate"] = "score"
    seed: int = 0

    def __post_init__(self):
        for name in ("num_prompts", "num_shots", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0 (greedy answers come anyway)")
        if self.method not in _CHUNK_SIZE:
            raise ValueError(f"`method` is {self.method!r}; choose one of {', '.join(map(repr, _CHUNK_SIZE))}")


PRESETS = {
    # arXiv 2405.05904, section 3: 10 random 4-shot prompts, each greedy and 16 samples at T = 0.5 with top-k 40.
    "gekhman2024": SlickSettings(num_prompts=10, method="generate"),
    # arXiv 2604.15574: "several" few-shot prompts and about 20 draws in all. Only the sum is in the paper: that it is
    # 5 x 4 here is this package's choice, and so are temperature and top-k, which are those of 2405.05904.
    "kaplan2026": SlickSettings(num_prompts=5, num_samples=4, method="generate"),
    # The sampling of 2405.05904 with fewer prompts and without drawing: minutes on a CPU.
    "quick": SlickSettings(num_prompts=4, method="score"),
}


class _Unit(NamedTuple):
    """Some of the work: one prompt of a relation, and the rows of some of its facts."""

    name: str
    relation: str
    prompt: int
    rows: list[int]


def annotate_facts(
    facts: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SlickSettings | str = "quick",
    *,
    batch_size: int = 64,
    weakly_known_threshold: float = 0.5,
    progress_file: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """
    Asks a model every fact and adds the columns [`SLICK_COLUMNS`].

    - `p_correct_greedy`: fraction of the prompts whose greedy answer is right.
    - `p_correct_sampled`: fraction of the samples that are right; method `"score"`: their mean probability.
    - `p_any_sample_correct`: 1.0 or 0.0; method `"score"`: probability that at least one of all samples is right.
    - `slick_category`: the value of a [`SlickCategory`].

    The facts that serve as exemplars ([`reserve_exemplars`]) are left out, so that no fact is asked with its own
    answer in the prompt and nothing that was in a prompt is trained or evaluated on.

    In a distributed launch it is a collective: each process, with the whole model, asks a share of the facts, and all
    get the table that one process would.

    Args:
        facts (`Dataset`):
            Table with the columns `fact_id`, `relation`, `question`, `answer` and `aliases`.
        model ([`~transformers.PreTrainedModel`]):
            The model to ask. Its dtype and a surrounding autocast hold; near-ties may flip between dtypes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        settings ([`SlickSettings`] or `str`, *optional*, defaults to `"quick"`):
            How to ask, or the name of one of [`PRESETS`].
        batch_size (`int`, *optional*, defaults to `64`):
            Sequences in one forward pass.
        weakly_known_threshold (`float`, *optional*, defaults to `0.5`):
            Method `"score"`: a fact that is never right greedily is WeaklyKnown if `p_any_sample_correct` is at least
            this. At 0.5 the category is the one that drawing the samples would more likely give.
        progress_file (`str` or `os.PathLike`, *optional*):
            JSON-lines file of the answers so far. A run that was stopped goes on where it was, with the same result.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar with the time left.

    Returns:
        `Dataset`: The facts that are no exemplars, in their order, with the new columns.

    Raises:
        `ValueError`: If a column is missing, a relation has too few facts, the preset does not exist, or the progress
            file belongs to other facts, settings, model or batch size.
    """
    settings = _resolve_settings(settings)
    missing = [column for column in _REQUIRED_COLUMNS if column not in facts.column_names]
    if missing or not len(facts):
        raise ValueError(
            f"`facts` has {len(facts)} rows and lacks the columns {missing}; pass a table of `load_facts`"
        )
    exemplars, kept = reserve_exemplars(facts, settings.num_prompts, settings.num_shots, settings.seed)
    asked = facts.select(kept)
    questions, relations = asked["question"][:], asked["relation"][:]
    accepted = [[answer, *aliases] for answer, aliases in zip(asked["answer"], asked["aliases"], strict=True)]
    max_new_tokens = _max_new_tokens(tokenizer, accepted)
    work = ProgressFile(progress_file, _identity(facts, model, settings, batch_size))
    outcomes: list[list[tuple[bool, float]]] = [[] for _ in accepted]  # of each fact: (greedy, sampled) of each prompt

    def ask(unit: _Unit) -> list:
        prompts = [few_shot_prompt(questions[row], exemplars[unit.relation][unit.prompt]) for row in unit.rows]
        forms = [accepted[row] for row in unit.rows]
        return _ask(model, tokenizer, prompts, forms, settings, batch_size, max_new_tokens, unit.name)

    units = list(_units(relations, settings))
    missing = [unit for unit in units if unit.name not in work.results]
    # `initial`: what an earlier run did says nothing about the time left.
    total = len(asked) * settings.num_prompts
    done = total - sum(len(unit.rows) for unit in missing)
    state = PartialState()
    hidden = not (progress and state.is_main_process)
    with tqdm(total=total, initial=done, desc="SLiCK", unit="question", disable=hidden) as bar:
        for begin in range(0, len(missing), state.num_processes):  # one unit a process, then all are on the disk
            together = missing[begin : begin + state.num_processes]
            for unit, answers in zip(together, map_in_parallel(ask, together), strict=True):
                work.append(unit.name, answers)
                bar.update(len(unit.rows))
    for unit in units:
        for row, answer in zip(unit.rows, work.results[unit.name], strict=True):
            outcomes[row].append(_judge(answer, accepted[row], settings.method))
    return _add_columns(asked, outcomes, settings, weakly_known_threshold)


def _identity(facts: Dataset, model: PreTrainedModel, settings: SlickSettings, batch_size: int) -> dict:
    table = hashlib.sha256()
    for values in zip(*(facts[column] for column in _REQUIRED_COLUMNS), strict=True):
        table.update(repr(values).encode())
    # A few numbers of each parameter tell apart checkpoints of one name, and cost nothing.
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {parameter.detach().flatten()[:8].float().tolist()}".encode())
    return {
        "settings": asdict(settings),
        "facts": table.hexdigest(),
        "model": weights.hexdigest(),
        "batch_size": batch_size,
    }


def _resolve_settings(settings: SlickSettings | str) -> SlickSettings:
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise ValueError(f"`settings` is {settings!r}; the presets are {', '.join(map(repr, PRESETS))}")
        return PRESETS[settings]
    return settings


def _units(relations: Sequence[str], settings: SlickSettings) -> Iterator[_Unit]:
    size = _CHUNK_SIZE[settings.method]
    for relation in dict.fromkeys(relations):
        rows = [row for row, other in enumerate(relations) if other == relation]
        for prompt in range(settings.num_prompts):
            for begin in range(0, len(rows), size):
                yield _Unit(f"{relation}/{prompt}/{begin}", relation, prompt, rows[begin : begin + size])


def _max_new_tokens(tokenizer: PreTrainedTokenizerBase, accepted: list[list[str]]) -> int:
    # An answer that is longer than every right one is wrong however it ends; the rest is for articles and full stops.
    forms = list({answer_completion(form) for forms in accepted for form in forms})
    return 8 + max(map(len, tokenizer(forms, add_special_tokens=False)["input_ids"]))


def _ask(model, tokenizer, prompts, accepted, settings: SlickSettings, batch_size, max_new_tokens, unit: str) -> list:
    """One JSON value a prompt: `[is_greedy, p_sampled]`, or `[greedy answer, [sampled answers]]`."""
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "batch_size": batch_size}
    if settings.method == "score":
        return [list(score) for score in score_answers(model, tokenizer, prompts, accepted, **sampling)]
    # A seed of its own for each unit: what it draws does not depend on whether an earlier run did the units before it.
    seed = random.Random(f"{settings.seed}/{unit}").getrandbits(32)
    sampling |= {"max_new_tokens": max_new_tokens, "seed": seed}
    greedy = predict_answers(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    sampled = predict_answers(model, tokenizer, prompts, num_samples=settings.num_samples, **sampling)
    return [[answer, samples] for [answer], samples in zip(greedy, sampled, strict=True)]


def _judge(answer: list, accepted: list[str], method: str) -> tuple[bool, float]:
    greedy, sampled = answer
    if method == "score":
        return greedy, sampled
    return exact_match(greedy, accepted), sum(exact_match(sample, accepted) for sample in sampled) / len(sampled)


def _add_columns(asked: Dataset, outcomes, settings: SlickSettings, weakly_known_threshold: float) -> Dataset:
    columns: dict[str, list] = {name: [] for name in SLICK_COLUMNS}
    for prompts in outcomes:
        p_greedy = sum(greedy for greedy, _ in prompts) / len(prompts)
        p_sampled = sum(sampled for _, sampled in prompts) / len(prompts)
        p_any = float(p_sampled > 0)
        if settings.method == "score":
            p_any = 1.0 - math.prod((1.0 - sampled) ** settings.num_samples for _, sampled in prompts)
        category = slick_category(p_greedy, p_sampled if p_any >= weakly_known_threshold else 0.0)
        row = (p_greedy, p_sampled, p_any, category.value)
        for name, value in zip(SLICK_COLUMNS, row, strict=True):
            columns[name].append(value)
    asked = asked.remove_columns([name for name in SLICK_COLUMNS if name in asked.column_names])
    for name, values in columns.items():
        asked = asked.add_column(name, values)
    return asked
