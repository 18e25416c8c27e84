# SPDX-License-Identifier: Apache-2.0
"""A check: which facts a base model HighlyKnows, what a model made from it answers to them, and what that one lost."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from ..files import read_json, read_jsonl, write_json, write_jsonl
from ..hallucination.intervals import Interval, Verdict, judge_loss
from ..hallucination.metric import RATES, score_hallucinations
from ..hub.environment import describe_environment
from ..hub.model_card import escape_markdown
from ..parameters.hashes import hash_model
from ..slick.generation import answer_prompts, eos_ids
from ..slick.process_sharding import checksum, on_main_process
from ..slick.prompts import few_shot_messages, few_shot_prompt
from ..slick.slick import PRESETS, annotate_facts, longest_answer, reserve_exemplars
from ..trainers.hallucination_callback import accepted_answers
from .facts.table import FACT_COLUMNS, read_facts
from .markdown import format_interval, markdown_table
from .models import load_tokenizer, model_to_ask, model_version
from .stage import run_stage


logger = logging.getLogger(__name__)

SAME_WEIGHTS = "`after` {} has the weights of `before`: pass the trained model."
LEAST_KNOWN = 50  # facts, below which hardly any loss could be told from chance
_VERDICTS = {
    "within": "Within the tolerance of {:g}",
    "beyond": "Beyond the tolerance of {:g}",
    "undecided": "Too few facts to tell whether the loss is within the tolerance of {:g}",
}
_PAIRED = {"forgetting_rate": "right before, not now", "induced_hallucination_rate": "right before, hallucinated now"}


class CheckedModel(NamedTuple):
    """A model that is asked, not loaded yet."""

    path: str  # Hub id or folder
    version: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """Its name for readers."""
        return Path(self.path).resolve().name if Path(self.path).is_dir() else self.path

    @property
    def identity(self) -> dict[str, str]:
        """What its answers depend on."""
        template, backend = self.tokenizer.chat_template, getattr(self.tokenizer, "backend_tokenizer", None)
        whole = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return {"version": self.version, "tokenizer": checksum(whole), "chat_template": checksum(template)}


class HowAsked(NamedTuple):
    """How both models are loaded and asked."""

    config: ModelConfig
    bf16: bool | None
    trust_remote_code: bool
    batch_size: int
    seed: int
    chat: bool

    @contextmanager
    def loaded(self, model: CheckedModel) -> Iterator[tuple[PreTrainedModel, str]]:
        """The model, and the hash of its weights, in whatever files they are."""
        with model_to_ask(model.path, self.config, self.bf16, self.trust_remote_code) as (loaded, _):
            yield loaded, on_main_process(lambda: hash_model(loaded))

    @property
    def identity(self) -> dict:
        """What answers depend on."""
        loading = {"dtype": self.config.dtype, "load_in_4bit": self.config.load_in_4bit}
        return {**self._asdict(), "config": loading}


def open_model(argument: str, path: str, trust_remote_code: bool = False) -> CheckedModel:
    """The version and tokenizer of a model, by Hub id or folder; a `ValueError` names the `argument`."""
    try:
        version, tokenizer = model_version(path), load_tokenizer(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}`: {error}") from error
    answer_at_once(tokenizer)
    return CheckedModel(path, version, tokenizer)


def answer_at_once(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a chat template. One that knows `enable_thinking` lets the model answer without thinking."""
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.get_chat_template()
    return tokenizer.chat_template is not None


def known_stage(base: CheckedModel, facts: Dataset, how: HowAsked, root: Path) -> Path:
    """
    Finds the facts that the base HighlyKnows and asks it one more prompt. They are not chosen by its answers to that
    one: where they are, the base is right on all, and any other model can only be worse. Writes `facts.jsonl`, with
    the column `base_answer`, and `base.json` to a folder below `root` of this model, its settings and the facts. The
    same weights in other files are not asked again.
    """
    settings = replace(PRESETS["quick"], only_highly_known=True, seed=how.seed)
    exemplars, rows = reserve_exemplars(facts, 1, settings.num_shots, how.seed)
    exemplars = {relation: shots for relation, [shots] in exemplars.items()}
    facts = facts.select_columns(FACT_COLUMNS)
    arguments = how.identity | base.identity | {"facts": checksum(facts.to_list()), "slick": asdict(settings)}

    def work(folder: Path) -> None:
        asked, tokenizer = facts.select(rows), base.tokenizer
        with how.loaded(base) as (model, weights):
            content = checksum(arguments | {"version": weights, "ends": eos_ids(model, base.tokenizer)})
            kept = [p.parent for p in root.glob("*/known/base.json") if read_json(p).get("content") == content]
            if kept and PartialState().is_main_process:
                shutil.copytree(kept[0], folder, dirs_exist_ok=True)
            if kept:
                return
            few = asked.select(range(0, len(asked), -(-len(asked) // 3)))
            answers = ask_few_shot(model, tokenizer, few, exemplars, how.chat, title=None)
            shown = zip(few["question"], few["answer"], answers, strict=True)
            examples = "; ".join(f"{q!r}, expected {right!r}, answered {given!r}" for q, right, given in shown)
            logger.info(f"{base.name}, for example: {examples}")
            options = {"batch_size": how.batch_size, "progress_file": folder / "slick.jsonl"}
            options["prompt_function"] = few_shot_messages if how.chat else few_shot_prompt
            known = annotate_facts(asked, model, tokenizer, settings, **options)
            _, tried = reserve_exemplars(asked, settings.num_prompts, settings.num_shots, settings.seed)
            if len(known) < LEAST_KNOWN:
                raise ValueError(
                    f"`before`: {base.path} HighlyKnows {len(known)} of {len(tried)} facts, and a check needs "
                    f"{LEAST_KNOWN}. Pass more `facts`, in a language and about things that it knows"
                    f"{', or `--chat false`' if how.chat else ''}. For example: {examples}."
                )
            answers = _ask(model, base, known, exemplars, how, folder)
            right = score_hallucinations(answers, accepted_answers(known, "facts"))["accuracy"]
            if right < 0.5:
                raise ValueError(
                    f"`before`: asked once more, {base.path} is right on {right:.2f} of what it HighlyKnows. "
                    f"Its prompt may end where no answer begins, as in {answers[:3]}. Mend its chat template."
                )
        if PartialState().is_main_process:
            write_jsonl(folder / "facts.jsonl", known.add_column("base_answer", answers))
            about = {"exemplars": exemplars, "num_asked": len(tried), "weights": weights, "content": content}
            write_json(folder / "base.json", about)

    folder = root / f"{Path(base.name).name}-{checksum(arguments)[:8]}" / "known"
    return run_stage(folder, arguments, [], work, every_process=True)


def answers_stage(model: CheckedModel, known: Path, how: HowAsked) -> list[str]:
    """What the model answers to the facts of [`known_stage`], under the same prompt; kept beside them."""

    def work(folder: Path) -> None:
        base = read_json(known / "base.json")
        with how.loaded(model) as (loaded, weights):
            if weights == base["weights"]:
                raise ValueError(SAME_WEIGHTS.format(model.path))
            answers = _ask(loaded, model, read_facts(known / "facts.jsonl"), base["exemplars"], how, folder)
        if PartialState().is_main_process:
            write_jsonl(folder / "model_answers.jsonl", answers)

    arguments = how.identity | model.identity
    folder = known.parent / f"{Path(model.name).name}-{checksum(arguments)[:8]}"
    return read_jsonl(run_stage(folder, arguments, [known], work, every_process=True) / "model_answers.jsonl")


def _ask(loaded, model: CheckedModel, facts: Dataset, exemplars: dict, how: HowAsked, folder: Path) -> list[str]:
    options = {"batch_size": how.batch_size, "progress_file": folder / "answers.jsonl", "title": model.name}
    return ask_few_shot(loaded, model.tokenizer, facts, exemplars, how.chat, **options)


def ask_few_shot(
    model, tokenizer, facts: Dataset, exemplars: dict[str, list[tuple[str, str]]], chat: bool, **options
) -> list[str]:
    """
    The answers to facts after solved exemplars of their relation, in one text or, for `chat`, as turns of a
    conversation; `options` are those of `answer_prompts`. A collective.
    """
    prompt_function = few_shot_messages if chat else few_shot_prompt
    pairs = zip(facts["question"], facts["relation"], strict=True)
    prompts = [prompt_function(question, exemplars[relation]) for question, relation in pairs]
    options["max_new_tokens"] = longest_answer(tokenizer, accepted_answers(facts, "facts"))
    return answer_prompts(model, tokenizer, prompts, **options)


def compare_answers(known: Dataset, answers: list[str], tolerance: float, **about: Any) -> dict[str, Any]:
    """
    What `check.json` holds: the metric's scores with intervals, the verdict at a `tolerance` in [0, 1), and the facts
    that were lost, of the `known` ones of [`known_stage`], by the model's `answers`. It also holds what is `about` the
    check: the names `base` and `model`, `num_asked` (of the base), `prompts` and `notes`.
    """
    accepted = accepted_answers(known, "facts")
    columns = {"relations": known["relation"][:], "questions": known["question"][:], "detailed": True}
    scores = score_hallucinations(answers, accepted, baseline_predictions=known["base_answer"][:], **columns)
    examples, tables = scores.pop("examples"), scores.pop("tables")
    changes = [(row["outcome"] == "correct") - (row["baseline_outcome"] == "correct") for row in examples]
    lost = [
        {"fact_id": fact_id, "relation": row["relation"], "question": row["question"], "answer": row["references"][0]}
        | {"base_answer": row["baseline_prediction"], "model_answer": row["prediction"], "outcome": row["outcome"]}
        for fact_id, row, change in zip(known["fact_id"], examples, changes, strict=True)
        if change == -1
    ]
    verdict = judge_loss(changes.count(-1), changes.count(1), len(changes), tolerance)
    return {
        **about,
        "num_known": len(changes),
        "tolerance": tolerance,
        "verdict": verdict.outcome,
        "summary": _summary(verdict, tolerance, len(changes), about["num_asked"]),
        "loss": verdict.loss._asdict(),
        "num_needed": verdict.num_needed,
        "scores": {name: value for name, value in scores.items() if "/" not in name},
        "base_scores": score_hallucinations(known["base_answer"][:], accepted),
        "relations": tables["relation"],
        "lost": lost,
        "environment": describe_environment(),
    }


def _summary(verdict: Verdict, tolerance: float, num_known: int, num_asked: int) -> str:
    loss = f"it lost {format_interval(verdict.loss)} of the accuracy on {num_known:,} known facts"
    text = f"{_VERDICTS[verdict.outcome].format(tolerance)}: {loss}."
    if verdict.outcome != "undecided":
        return text
    if verdict.num_needed is None:
        return f"{text} That is so near to the tolerance that a million would not tell."
    facts = round(verdict.num_needed * num_asked / num_known)
    return f"{text} About {verdict.num_needed:,} known facts would tell, or {facts:,} facts to ask the base."


def render_section(report: dict[str, Any]) -> str:
    """The verdict and the rates, as a section of Markdown for a model card."""
    base, model = (escape_markdown(report[name]) for name in ("base", "model"))

    def cell(scores: dict[str, Any], name: str) -> str:
        ends = [scores[f"{name}{end}"] for end in ("", "_ci_low", "_ci_high")]
        return format_interval(Interval(*ends)) if None not in ends else "-"

    before, after = report["base_scores"], report["scores"]
    rows = [[name.replace("_", " "), cell(before, name), cell(after, name)] for name in (*RATES, "omniscience_index")]
    rows += [[f"{name.replace('_', ' ')} ({what})", "-", cell(after, name)] for name, what in _PAIRED.items()]
    header = ["fraction of the known facts, 95 % interval", f"before ({base})", f"after ({model})"]
    how = [
        f"{base} HighlyKnows {report['num_known']:,} of {report['num_asked']:,} facts: right under each of four",
        f"few-shot prompts ({report['prompts']}). Both answered these under one more, judged by exact match.",
        *report["notes"],
        f"McNemar's test that as many were lost as gained: p = {report['scores']['mcnemar_p_value']:.2g}.",
        f"`trl-selfdistill check`, {report['environment']['date'][:10]}.",
    ]
    return f"## Facts that it forgot\n\n**{report['summary']}**\n\n{markdown_table(header, rows)}\n\n{' '.join(how)}"
