# SPDX-License-Identifier: Apache-2.0
"""A check: which facts a base model HighlyKnows, what it answers to them, and what a model made from it answers."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from ..files import read_json, read_jsonl, write_json, write_jsonl
from ..slick.answering import answer_prompts
from ..slick.generation import predict_answers
from ..slick.process_sharding import checksum
from ..slick.prompts import few_shot_messages, few_shot_prompt
from ..slick.slick import PRESETS, annotate_facts, longest_answer, reserve_exemplars
from .facts.table import FACT_COLUMNS, read_facts, save_facts
from .models import load_tokenizer, model_to_ask, model_version
from .stage import run_stage


logger = logging.getLogger(__name__)

LEAST_KNOWN = 50  # facts, below which hardly any loss could be told from chance
# A template that knows it shall not let the model think first, which would end an answer before it begins
_NO_THINKING = "{% set enable_thinking = false %}"


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
        return {"model": self.version, "tokenizer": checksum(whole), "chat_template": checksum(template)}


class HowAsked(NamedTuple):
    """How both models are loaded and asked."""

    config: ModelConfig
    bf16: bool | None
    trust_remote_code: bool
    batch_size: int
    seed: int
    chat: bool

    def loaded(self, model: CheckedModel):
        """[`~trl_selfdistill.studies.models.model_to_ask`], of a model."""
        return model_to_ask(model.path, self.config, self.bf16, self.trust_remote_code)

    @property
    def prompt_function(self) -> Callable:
        return few_shot_messages if self.chat else few_shot_prompt

    @property
    def identity(self) -> dict:
        """What answers depend on."""
        loading = {"dtype": self.config.dtype, "load_in_4bit": self.config.load_in_4bit}
        return {**self._asdict(), "config": loading}


def open_model(path: str, trust_remote_code: bool = False) -> CheckedModel:
    """The version and tokenizer of a model, by Hub id or folder."""
    version, tokenizer = model_version(path), load_tokenizer(path, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = _NO_THINKING + tokenizer.get_chat_template()
    return CheckedModel(path, version, tokenizer)


def choose_chat(base: CheckedModel, model: CheckedModel, chat: bool | None) -> bool:
    """Whether both are asked through their chat templates: as told, or else if the base has one."""
    chat = base.tokenizer.chat_template is not None if chat is None else chat
    for side in (base, model):
        if chat and side.tokenizer.chat_template is None:
            raise ValueError(
                f"{side.path} has no chat template, and both models are asked alike. Pass `--chat false` for text "
                "prompts, or save the template with its tokenizer."
            )
    return chat


def compare_tokenizers(base: CheckedModel, model: CheckedModel, chat: bool) -> list[str]:
    """What a reader must know about how the two were asked."""
    notes, (ours, theirs) = [], (side.identity for side in (base, model))
    if ours["tokenizer"] != theirs["tokenizer"]:
        notes.append("Their tokenizers differ, and each was asked with its own.")
    if chat and ours["chat_template"] != theirs["chat_template"]:
        notes.append("Their chat templates differ, and each was asked through its own.")
    return notes


def without_small_relations(facts: Dataset) -> Dataset:
    """The facts of relations that have exemplars to spare: for the prompts that choose facts, and for the last one."""
    sizes, needed = Counter(facts["relation"]), 2 * PRESETS["quick"].num_shots + 1
    small = sorted(relation for relation, size in sizes.items() if size < needed)
    if small:
        logger.warning(f"Left out, as they have fewer than {needed} facts: {', '.join(small)}.")
    if len(small) == len(sizes):
        raise ValueError(f"`facts`: no relation has {needed} facts or more. Add facts.")
    return facts.filter(lambda relation: relation not in small, input_columns="relation") if small else facts


def known_stage(base: CheckedModel, facts: Dataset, how: HowAsked, root: Path) -> Path:
    """
    Finds the facts that the base HighlyKnows and asks it one more prompt. They are not chosen by its answers to that
    one: where they are, the base is right on all, and any other model can only be worse. Writes `facts.jsonl`, with
    the column `base_answer`, and `exemplars.json` to a folder below `root` of this model, its settings and the facts.
    """
    settings = replace(PRESETS["quick"], only_highly_known=True, seed=how.seed)
    exemplars, rows = reserve_exemplars(facts, 1, settings.num_shots, how.seed)
    exemplars = {relation: shots for relation, [shots] in exemplars.items()}
    facts = facts.select_columns(FACT_COLUMNS)

    def work(folder: Path) -> None:
        asked, tokenizer = facts.select(rows), base.tokenizer
        with how.loaded(base) as (model, _):
            few = asked.select(range(0, len(asked), -(-len(asked) // 3)))
            answers = predict_answers(model, tokenizer, _prompts(few, exemplars, how))
            pairs = zip(few["question"], answers, strict=True)
            examples = "; ".join(f"{question!r} {answer!r}" for question, [answer] in pairs)
            if PartialState().is_main_process:
                logger.info(f"{base.name} answers, for example: {examples}")
            options = {"batch_size": how.batch_size, "prompt_function": how.prompt_function}
            known = annotate_facts(asked, model, tokenizer, settings, progress_file=folder / "slick.jsonl", **options)
            if len(known) < LEAST_KNOWN:
                raise ValueError(
                    f"{base.path} HighlyKnows {len(known)} of {len(asked)} facts, and a check needs {LEAST_KNOWN}. "
                    "Pass more facts, in a language and about things that it knows"
                    f"{', or `--chat false`' if how.chat else ''}. Its answers, for example: {examples}"
                )
            answers = _ask(model, base, known, exemplars, how, folder)
        if PartialState().is_main_process:
            save_facts(known.add_column("base_answer", answers), folder / "facts.jsonl")
            _, tried = reserve_exemplars(asked, settings.num_prompts, settings.num_shots, settings.seed)
            write_json(folder / "exemplars.json", {"exemplars": exemplars, "num_asked": len(tried)})

    arguments = how.identity | base.identity | {"facts": checksum(facts.to_list()), "slick": asdict(settings)}
    folder = root / f"{Path(base.name).name}-{checksum(arguments)[:8]}" / "known"
    return run_stage(folder, arguments, [], work, every_process=True)


def answers_stage(model: CheckedModel, known: Path, how: HowAsked) -> list[str]:
    """What the model answers to the facts of [`known_stage`], under the same prompt; kept beside them."""

    def work(folder: Path) -> None:
        with how.loaded(model) as (loaded, _):
            exemplars = read_json(known / "exemplars.json")["exemplars"]
            answers = _ask(loaded, model, read_facts(known / "facts.jsonl"), exemplars, how, folder)
        if PartialState().is_main_process:
            write_jsonl(folder / "model_answers.jsonl", answers)

    arguments = how.identity | model.identity
    folder = known.parent / f"{Path(model.name).name}-{checksum(arguments)[:8]}"
    return read_jsonl(run_stage(folder, arguments, [known], work, every_process=True) / "model_answers.jsonl")


def _prompts(facts: Dataset, exemplars: dict, how: HowAsked) -> list:
    pairs = zip(facts["question"], facts["relation"], strict=True)
    return [how.prompt_function(question, exemplars[relation]) for question, relation in pairs]


def _ask(loaded, model: CheckedModel, facts: Dataset, exemplars: dict, how: HowAsked, folder: Path) -> list[str]:
    accepted = [[answer, *aliases] for answer, aliases in zip(facts["answer"], facts["aliases"], strict=True)]
    options = {"batch_size": how.batch_size, "progress_file": folder / "answers.jsonl", "title": model.name}
    options["max_new_tokens"] = longest_answer(model.tokenizer, accepted)
    return answer_prompts(loaded, model.tokenizer, _prompts(facts, exemplars, how), **options)
