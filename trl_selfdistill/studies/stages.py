# SPDX-License-Identifier: Apache-2.0
"""The stages of the study, each from a file or folder to another (see `stage`).

model -> facts -> annotated -> mix -> stage1 -> one folder for each arm -> report

Every folder tells in `run.json` how it was made; a training stage adds `accuracy.jsonl` and `training.json`.
"""

import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..hub.markdown import escape_markdown
from ..slick.slick import annotate_facts
from .arguments import (
    AdapterArguments,
    EvaluationArguments,
    ModelAndFactsArguments,
    SlickArguments,
    Stage1Arguments,
)
from .card import write_model_card
from .fact_accuracy import accuracy_by_group, predict_facts
from .facts.files import write_rows
from .facts.geonames import geonames_facts, known_place_names
from .facts.table import load_facts, save_facts
from .models import EMBEDDED_MODEL, EMBEDDED_MODEL_ID, load_model_and_tokenizer, save_embedded_model
from .report import load_arms, plot_curves, render_findings, render_table
from .small_llama import ModelKindArguments, SmallLlamaSettings, pretrain_in_one_process
from .stage import explain_full_disk, model_identity, run_stage
from .training_mix import MixSettings, build_training_mix
from .training_stage import copy_config, train_stage


__all__ = [
    "annotate_stage",
    "evaluate_stage",
    "facts_stage",
    "mix_stage",
    "model_stage",
    "report_stage",
    "stage1_stage",
    "start_model_stage",
    "train_stage",
]

FACTS_FILE = "facts.jsonl"
PREDICTIONS_FILE = "predictions.jsonl"
ACCURACY_FILE = "accuracy.json"
GEONAMES = "geonames"


def model_stage(name_or_path: str, folder: Path) -> str:
    """The model to load by: `name_or_path`, or the folder that the embedded model was written to."""
    if name_or_path != EMBEDDED_MODEL:
        return name_or_path
    return os.fspath(run_stage(folder, {"model": EMBEDDED_MODEL}, [], save_embedded_model))


def start_model_stage(
    arguments: ModelAndFactsArguments,
    kind: ModelKindArguments,
    settings: SmallLlamaSettings,
    facts: Path,
    folder: Path,
) -> tuple[str, str]:
    """
    The model to load by, and its name for readers: one that there is, or a small Llama that is trained from scratch on
    the facts, in `folder`.
    """
    if kind.model_kind == "pretrained":
        name = arguments.model_name_or_path
        label = EMBEDDED_MODEL_ID if name == EMBEDDED_MODEL else name
        return model_stage(name, folder), label.rstrip("/").split("/")[-1]
    if arguments.model_name_or_path != EMBEDDED_MODEL:
        raise ValueError(
            f"`model_name_or_path={arguments.model_name_or_path!r}` with `model_kind='small_llama'`, which trains a "
            "model of its own. Add `--model_kind pretrained`, or leave the name out."
        )

    def work(partial: Path) -> None:
        table = load_facts(facts)
        places = known_place_names() if {"P17", "P131"} & set(table["relation"]) else ()
        pretrain_in_one_process(table, partial, settings, places)

    run_stage(folder, {"small_llama": asdict(settings)}, [facts], work)
    return os.fspath(folder), f"small Llama (width {settings.hidden_size}, {settings.num_layers} layers)"


def facts_stage(arguments: ModelAndFactsArguments, folder: Path) -> Path:
    """Writes the facts to ask about to `folder/facts.jsonl`, and returns that file."""

    def work(partial: Path) -> None:
        relations = arguments.fact_relations
        if arguments.facts == GEONAMES:
            facts = geonames_facts(relations, arguments.max_facts_per_relation, arguments.max_facts_per_answer)
        else:
            facts = _limited(load_facts(arguments.facts, arguments.facts_split), arguments)
        save_facts(facts, partial / FACTS_FILE)

    settings = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name != "model_name_or_path"}
    inputs = [arguments.facts] if Path(arguments.facts).exists() else []
    return run_stage(folder, settings, inputs, work) / FACTS_FILE


def _limited(facts: Dataset, arguments: ModelAndFactsArguments) -> Dataset:
    """The facts of the wanted relations, in their order, up to the limits of each relation and answer."""
    relations = arguments.fact_relations or list(dict.fromkeys(facts["relation"]))
    if missing := set(relations) - set(facts["relation"]):
        raise ValueError(
            f"`fact_relations` asks for {', '.join(sorted(missing))}, which {arguments.facts} does not have. It has: "
            f"{', '.join(sorted(set(facts['relation'])))}."
        )
    per_relation, per_answer, kept = {}, {}, []
    for row, (relation, answer) in enumerate(zip(facts["relation"], facts["answer"], strict=True)):
        if relation not in relations:
            continue
        counts = per_relation.get(relation, 0), per_answer.get((relation, answer), 0)
        limits = arguments.max_facts_per_relation, arguments.max_facts_per_answer
        if any(limit is not None and count >= limit for count, limit in zip(counts, limits, strict=True)):
            continue
        per_relation[relation], per_answer[relation, answer] = counts[0] + 1, counts[1] + 1
        kept.append(row)
    return facts.select(kept)


def annotate_stage(
    model: str,
    facts: Path,
    slick: SlickArguments,
    folder: Path,
    bf16: bool = False,
    seed: int = 0,
    load_in_4bit: bool = False,
) -> Path:
    """Asks `model` the facts and writes them with their SLiCK category to `folder/facts.jsonl`; returns that file."""
    settings = slick.settings(seed)

    def work(partial: Path) -> None:
        language_model, tokenizer = load_model_and_tokenizer(model, load_in_4bit=load_in_4bit)
        language_model.to(PartialState().device)
        with torch.autocast(language_model.device.type, torch.bfloat16, enabled=bf16):
            annotated = annotate_facts(
                load_facts(facts),
                language_model,
                tokenizer,
                settings,
                batch_size=slick.slick_batch_size,
                progress_file=partial / "progress.jsonl",
            )
        if PartialState().is_main_process:
            save_facts(annotated, partial / FACTS_FILE)

    name, inputs = model_identity(model)
    arguments = {"slick": asdict(settings), "bf16": bf16, "batch_size": slick.slick_batch_size, **name}
    if load_in_4bit:
        arguments["load_in_4bit"] = True
    return run_stage(folder, arguments, [facts, *inputs], work, every_process=True) / FACTS_FILE


def mix_stage(annotated: Path, settings: MixSettings, folder: Path, seed: int = 0) -> Path:
    """Writes the splits `known`, `new` and `heldout` as JSONL files to `folder`, and returns it."""

    def work(partial: Path) -> None:
        facts = load_facts(annotated)
        has_places = settings.new_facts == "invented" and {"P17", "P131"} & set(facts["relation"])
        places = known_place_names() if has_places else ()
        for name, split in build_training_mix(facts, settings, seed, exclude=places).items():
            save_facts(split, partial / f"{name}.jsonl")

    return run_stage(folder, {"mix": asdict(settings), "seed": seed}, [annotated], work)


def stage1_stage(
    arguments: Stage1Arguments,
    config: SFTConfig,
    model: str,
    mix: Path,
    folder: Path,
    adapter: AdapterArguments | None = None,
) -> Path:
    """Teaches `model` the format on the Known facts of `mix`: the start of every run, and the teacher."""
    changes = {
        "num_train_epochs": arguments.stage1_num_train_epochs,
        "learning_rate": arguments.stage1_learning_rate,
        "per_device_train_batch_size": arguments.stage1_batch_size,
    }
    stage1 = copy_config(SFTConfig, config, **changes)
    return train_stage(SFTTrainer, stage1, model, mix, ("known",), folder, adapter=adapter)


def evaluate_stage(arguments: EvaluationArguments) -> Path:
    """
    Asks a model facts and writes `predictions.jsonl` (a line for each fact) and `accuracy.json` (overall, by relation
    and, for annotated facts, by SLiCK category) to `arguments.output_dir`, which it returns.
    """
    model = arguments.model_name_or_path

    def work(partial: Path) -> None:
        facts = load_facts(arguments.facts, arguments.facts_split)
        language_model, tokenizer = load_model_and_tokenizer(model, load_in_4bit=arguments.load_in_4bit)
        language_model.to(PartialState().device)
        with torch.autocast(language_model.device.type, torch.bfloat16, enabled=arguments.bf16):
            predictions = predict_facts(
                language_model,
                tokenizer,
                facts,
                method=arguments.method,
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
            )
        if not PartialState().is_main_process:
            return
        write_rows(predictions, partial / PREDICTIONS_FILE)
        accuracy = json.dumps(accuracy_by_group(facts, predictions), indent=2, ensure_ascii=False)
        (partial / ACCURACY_FILE).write_text(accuracy + "\n", encoding="utf-8")

    name, inputs = model_identity(model)
    settings = {k: v for k, v in asdict(arguments).items() if k not in ("model_name_or_path", "output_dir")}
    if not arguments.load_in_4bit:  # evaluations from before there was the choice stay done
        del settings["load_in_4bit"]
    if Path(arguments.facts).exists():
        inputs = [arguments.facts, *inputs]
    return run_stage(Path(arguments.output_dir), {**settings, **name}, inputs, work, every_process=True)


def report_stage(folders: list[Path], output: Path) -> str:
    """
    Compares finished arms, the first being the baseline, and returns the table and its findings as text.

    Writes `report.md`, `curves.png` and `results.json` to `output`, and a model card with the figure into each folder.
    """
    arms = load_arms(folders)
    output.mkdir(parents=True, exist_ok=True)
    origin = escape_markdown(arms[0].training["origin"] or "a local model")
    new_facts = arms[0].training["mix"]["mix"]["new_facts"]
    text = f"{render_table(arms)}\n\n{render_findings(arms)}\n"
    results = json.dumps({arm.name: arm.summary() for arm in arms}, indent=2, ensure_ascii=False)
    heading = f"# {origin}: what fine-tuning made it forget"
    with explain_full_disk("report", output):
        plot_curves(
            arms, output / "curves.png", f"{origin.split('/')[-1]}: training on known and {new_facts} new facts"
        )
        (output / "results.json").write_text(results + "\n", encoding="utf-8")
        (output / "report.md").write_text(f"{heading}\n\n{text}\n![Curves](curves.png)\n", encoding="utf-8")
        for arm, folder in zip(arms, folders, strict=True):
            shutil.copyfile(output / "curves.png", folder / "curves.png")
            write_model_card(arm, arms, folder)
    return text
