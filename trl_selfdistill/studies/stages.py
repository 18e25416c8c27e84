# SPDX-License-Identifier: Apache-2.0
"""The stages of a study, each from a file or folder to another (see `stage`).

facts -> model -> annotated -> mix -> stage1 -> one folder for each run (see `runs`) -> report
"""

import os
import shutil
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig, SFTConfig, get_quantization_config

from ..files import warn_without, write_json, write_jsonl
from ..hub.model_card import CARD_FILE, escape_markdown
from ..slick.slick import PRESETS, annotate_facts
from ..trainers import SelfDistillSFTConfig
from ..trainers.frozen_groups_sft_config import copy_config
from .arguments import FactsArguments, SlickArguments, Stage1Arguments
from .card import write_model_card
from .check import answer_at_once, ask_few_shot
from .fact_accuracy import AccuracyRecord, judge_answers, write_records
from .facts.geonames import geonames_facts, known_place_names
from .facts.table import load_facts, read_facts
from .models import (
    EMBEDDED_MODEL,
    EMBEDDED_MODEL_ID,
    SMALL_LLAMA,
    ModelArguments,
    model_identity,
    model_to_ask,
    save_embedded_model,
)
from .results import BASE_FILE, LEGEND, plot_curves, read_result, render_findings, render_table
from .runs import RunFacts, StudySetup, Variant, train_variant
from .small_llama import SmallLlamaSettings, pretrain_small_llama
from .stage import run_stage
from .training_mix import MixSettings, build_training_mix, load_mix


FACTS_FILE = "facts.jsonl"
# What the scripts of whole studies parse beside arguments of their own, in the order of `prepare_study`
STUDY_ARGUMENTS = (ModelArguments, FactsArguments, SlickArguments, MixSettings, SmallLlamaSettings, Stage1Arguments)
STUDY_ARGUMENTS += (SelfDistillSFTConfig,)


def prepare_study(
    model_args: ModelArguments,
    facts_args: FactsArguments,
    slick_args: SlickArguments,
    mix_settings: MixSettings,
    small_llama: SmallLlamaSettings,
    stage1_args: Stage1Arguments,
    config: SelfDistillSFTConfig,
) -> StudySetup:
    """
    The stages before the runs of a study, in folders below `config.output_dir`: what the model knows, what it is
    trained on, and the format that it learns first. The arguments are one of each of [`STUDY_ARGUMENTS`].

    Raises:
        ValueError: If the model is quantised and no adapter is trained, or the mix needs facts that SLiCK leaves out.
    """
    if get_quantization_config(model_args) is not None and not model_args.use_peft:
        raise ValueError("`load_in_4bit` and `load_in_8bit` need `use_peft`: only an adapter of them can be trained.")
    if slick_args.slick_only_highly_known and mix_settings.new_facts == "real":
        raise ValueError("`new_facts='real'` are Unknown facts: unset `slick_only_highly_known`, or take 'invented'.")
    output = Path(config.output_dir)
    facts = facts_stage(facts_args, output / "facts")
    model, label = model_stage(model_args.model_name_or_path, output / "model", facts, small_llama)
    annotated = annotate_stage(model, model_args, facts, slick_args, output / "annotated", config)
    mix = mix_stage(annotated, mix_settings, output / "mix", seed=config.seed)
    setup = StudySetup(model, mix, config, model_args, annotated, label)
    setup = setup._replace(base=base_stage(setup, facts, output / "base"))
    start = _stage1_stage(stage1_args, setup, output / "stage1")
    return setup._replace(start=os.fspath(start))


def model_stage(
    name_or_path: str, folder: Path, facts: Path, small_llama: SmallLlamaSettings | None = None
) -> tuple[str, str]:
    """
    What to load a model by, and its name for readers. `embedded`, and `small_llama`, which is trained on the facts
    first, are written to `folder`; what else `name_or_path` is, is loaded by it.
    """

    def pretrain(partial: Path) -> None:
        table = read_facts(facts)
        pretrain_small_llama(table, partial, settings, _place_names(table))

    if name_or_path == EMBEDDED_MODEL:
        run_stage(folder, {"model": EMBEDDED_MODEL}, [], save_embedded_model)
        return os.fspath(folder), EMBEDDED_MODEL_ID.split("/")[-1]
    if name_or_path == SMALL_LLAMA:
        settings = small_llama or SmallLlamaSettings()
        run_stage(folder, {"small_llama": asdict(settings)}, [facts], pretrain)
        return os.fspath(folder), f"small Llama (width {settings.hidden_size}, {settings.num_layers} layers)"
    return name_or_path, name_or_path.rstrip("/").split("/")[-1]


def _place_names(facts: Dataset) -> frozenset[str]:
    """All names of places that are known, if facts are about places."""
    return known_place_names() if {"P17", "P131"} & set(facts["relation"]) else frozenset()


def facts_stage(arguments: FactsArguments, folder: Path) -> Path:
    """Writes the facts to ask about to `folder/facts.jsonl`, and returns that file."""

    def work(partial: Path) -> None:
        write_jsonl(partial / FACTS_FILE, wanted_facts(arguments))

    inputs = [arguments.facts] if Path(arguments.facts).exists() else []
    return run_stage(folder, asdict(arguments), inputs, work) / FACTS_FILE


def wanted_facts(arguments: FactsArguments) -> Dataset:
    """The facts of the wanted relations, in their order, up to the limits of each relation and answer."""
    if arguments.facts == "geonames":
        facts = geonames_facts(arguments.fact_relations)
    else:
        try:
            facts = load_facts(arguments.facts, arguments.facts_split)
        except (OSError, ValueError) as error:
            raise ValueError(f"`facts`: {error}") from error
    table = facts.select_columns(["relation", "answer"]).to_pandas()
    relations = arguments.fact_relations or table["relation"]
    if missing := set(relations) - set(table["relation"]):
        found = ", ".join(sorted(set(table["relation"])))
        raise ValueError(f"`fact_relations`: {arguments.facts} has no {', '.join(sorted(missing))}. It has: {found}.")
    limits = arguments.max_facts_per_relation, arguments.max_facts_per_answer
    if any(limit is not None and limit < 1 for limit in limits):
        raise ValueError(f"`max_facts_per_relation` and `max_facts_per_answer` must be at least 1, got {limits}.")
    table = table[table["relation"].isin(relations)]
    table = table.groupby(["relation", "answer"]).head(arguments.max_facts_per_answer or len(table))
    table = table.groupby("relation").head(arguments.max_facts_per_relation or len(table))
    return facts.select(table.index)


def annotate_stage(
    model: str, model_args: ModelConfig, facts: Path, slick: SlickArguments, folder: Path, run: SFTConfig
) -> Path:
    """
    Asks a model, by Hub id or folder, the facts and writes them with their SLiCK category to `folder/facts.jsonl`,
    which is returned. Of `run` its `bf16`, `seed`, `trust_remote_code` and `model_init_kwargs` (if any) are used.
    """
    settings, init_kwargs = slick.settings(run.seed), getattr(run, "model_init_kwargs", None)

    def work(partial: Path) -> None:
        how = {"batch_size": slick.slick_batch_size, "progress_file": partial / "progress.jsonl"}
        with model_to_ask(model, model_args, run.bf16, run.trust_remote_code, init_kwargs) as asked:
            annotated = annotate_facts(read_facts(facts), *asked, settings, **how)
        if not len(annotated):
            raise ValueError("No fact is HighlyKnown: take another `model_name_or_path`, or `facts` that it knows.")
        if PartialState().is_main_process:
            write_jsonl(partial / FACTS_FILE, annotated)

    identity, inputs = model_identity(model, model_args)
    arguments = {"slick": asdict(settings), "bf16": run.bf16, "batch_size": slick.slick_batch_size, **identity}
    if init_kwargs:
        arguments["model_init_kwargs"] = init_kwargs
    return run_stage(folder, arguments, [facts, *inputs], work, every_process=True) / FACTS_FILE


def mix_stage(annotated: Path, settings: MixSettings, folder: Path, seed: int = 0) -> Path:
    """Writes the splits `known`, `new` and `heldout` of annotated facts as JSONL files to `folder`, and returns it."""

    def work(partial: Path) -> None:
        facts = load_facts(annotated)  # a user may have annotated them
        places = _place_names(facts) if settings.new_facts == "invented" else ()
        for name, split in build_training_mix(facts, settings, seed, exclude=places).items():
            write_jsonl(partial / f"{name}.jsonl", split)

    return run_stage(folder, {"mix": asdict(settings), "seed": seed}, [annotated], work)


def base_stage(setup: StudySetup, facts: Path, folder: Path) -> Path:
    """
    Asks the model itself the held-out facts as `check` does, after solved facts of their relation, which are not held
    out, and through its chat template if it has one. Writes `base.jsonl` to `folder` and returns it.
    """
    config = setup.config

    def work(partial: Path) -> None:
        heldout = load_mix(setup.mix)["heldout"]
        held_out, solved = {*heldout["fact_id"]}, defaultdict(list)
        for fact in read_facts(facts).shuffle(config.seed):
            if fact["fact_id"] not in held_out:
                solved[fact["relation"]].append((fact["question"], fact["answer"]))
        exemplars = {relation: pairs[: PRESETS["quick"].num_shots] for relation, pairs in solved.items()}
        with setup.to_ask() as (model, tokenizer):
            chat = answer_at_once(tokenizer)
            how = {"progress_file": partial / "progress.jsonl", "title": "The base"}
            answers = judge_answers(heldout, ask_few_shot(model, tokenizer, heldout, exemplars, chat, **how))
        if PartialState().is_main_process:
            prompts = "few-shot chat" if chat else "few-shot"
            write_records(partial / BASE_FILE, [AccuracyRecord(0, 0.0, {"heldout": answers}, prompts)])

    identity, inputs = model_identity(setup.start, setup.model_args)
    arguments = {"bf16": config.bf16, "seed": config.seed, "model_init_kwargs": config.model_init_kwargs, **identity}
    return run_stage(folder, arguments, [setup.mix, *inputs], work, every_process=True) / BASE_FILE


def facts_of_mix(mix: Path, splits: tuple[str, ...] = ("known", "new")) -> RunFacts:
    """All facts of a mix as those that are asked, and those of `splits` to train on."""
    facts = load_mix(mix)
    known, new = (facts[name] if name in splits else facts[name].select([]) for name in ("known", "new"))
    return RunFacts(known, new, facts)


def _stage1_stage(arguments: Stage1Arguments, setup: StudySetup, folder: Path) -> Path:
    """Teaches the model the format on the Known facts of the mix: the start of every run, and the teacher."""
    changes = {"num_train_epochs": 1, "learning_rate": arguments.stage1_learning_rate}
    config = copy_config(setup.config, SFTConfig, per_device_train_batch_size=8, **changes)
    variant, setup = Variant("stage1", "Stage 1"), setup._replace(config=config)
    # The base is not asked before: it has not learnt the format, and what it knows SLiCK has found out
    train_variant(variant, setup, folder, lambda partial: facts_of_mix(setup.mix, ("known",)), before=False)
    return folder


def report_stage(folders: list[Path], output: Path) -> str:
    """
    Compares finished variants, the first being the baseline, and returns the table and its findings as text.

    Writes `report.md`, `curves.png` and `results.json` to `output`, and a model card with the figure into each folder.
    The folders must have different names, and their variants the same facts.
    """
    results = [read_result(folder) for folder in folders]
    baseline, names = results[0], [result.name for result in results]
    if len(set(names)) < len(names):
        raise ValueError(f"Variants are told apart by the names of their folders, got {names}. Rename some of them.")
    precisions = " and ".join(dict.fromkeys(result.training["precision"] for result in results))
    text = f"{render_table(results)}\n\n{render_findings(results)}\n\n{LEGEND} Precision: {precisions}.\n"
    numbers = {result.name: result.summary() | {"forgetting_difference": None} for result in results}
    for result in results[1:]:
        numbers[result.name]["forgetting_difference"] = result.forgetting_difference(baseline)._asdict()
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", numbers)
    model = escape_markdown(baseline.training["base_model"] or "A local model")
    report = f"# {model}: what fine-tuning made it forget\n\n{text}\n![Curves](curves.png)\n"
    (output / "report.md").write_text(report, encoding="utf-8")
    with warn_without(output / "curves.png"):
        plot_curves(results, output / "curves.png")
        for folder in folders:
            shutil.copyfile(output / "curves.png", folder / "curves.png")
    for result, folder in zip(results, folders, strict=True):
        with warn_without(folder / CARD_FILE):
            write_model_card(result, results, folder)
    return text
