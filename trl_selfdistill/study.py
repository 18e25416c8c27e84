# SPDX-License-Identifier: Apache-2.0
"""The stages of the study, each from a file or folder to another (see `stage`).

model -> facts -> annotated -> mix -> stage1 -> one folder for each arm -> report

Every folder tells in `run.json` how it was made; a training stage adds `accuracy.jsonl` and `training.json`.
"""

import json
import logging
import math
import os
import shutil
import statistics
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .fact_accuracy import FactAccuracyCallback, read_records, write_records
from .facts import load_facts, save_facts
from .geonames import geonames_facts, known_place_names
from .model_card import write_model_card
from .models import EMBEDDED_MODEL, EMBEDDED_MODEL_ID, load_model_and_tokenizer, save_embedded_model
from .report import load_arms, plot_curves, render_findings, render_table
from .slick import annotate_facts
from .stage import RUN_FILE, run_stage
from .study_arguments import ModelAndFactsArguments, SlickArguments
from .training_mix import SPLITS, MixSettings, build_training_mix


logger = logging.getLogger(__name__)

FACTS_FILE = "facts.jsonl"
RECORDS_FILE = "accuracy.jsonl"
TRAINING_FILE = "training.json"
GEONAMES = "geonames"
# What does not change the weights that a training run ends with
_WITHOUT_EFFECT = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "log_level",
    "hub_token",
    "project",
}


def model_stage(name_or_path: str, folder: Path) -> str:
    """The model to load by: `name_or_path`, or the folder that the embedded model was written to."""
    if name_or_path != EMBEDDED_MODEL:
        return name_or_path
    return os.fspath(run_stage(folder, {"model": EMBEDDED_MODEL}, [], save_embedded_model))


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
    model: str, facts: Path, slick: SlickArguments, folder: Path, bf16: bool = False, seed: int = 0
) -> Path:
    """Asks `model` the facts and writes them with their SLiCK category to `folder/facts.jsonl`; returns that file."""
    settings = slick.settings(seed)

    def work(partial: Path) -> None:
        language_model, tokenizer = load_model_and_tokenizer(model)
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
        save_facts(annotated, partial / FACTS_FILE)

    arguments = {
        "slick": asdict(settings),
        "bf16": bf16,
        "batch_size": slick.slick_batch_size,
        **_model_argument(model),
    }
    inputs = [facts, model] if Path(model).is_dir() else [facts]
    return run_stage(folder, arguments, inputs, work) / FACTS_FILE


def mix_stage(annotated: Path, settings: MixSettings, folder: Path, seed: int = 0) -> Path:
    """Writes the splits `known`, `new` and `heldout` as JSONL files to `folder`, and returns it."""

    def work(partial: Path) -> None:
        facts = load_facts(annotated)
        places = known_place_names() if {"P17", "P131"} & set(facts["relation"]) else ()
        for name, split in build_training_mix(facts, settings, seed, exclude=places).items():
            save_facts(split, partial / f"{name}.jsonl")

    return run_stage(folder, {"mix": asdict(settings), "seed": seed}, [annotated], work)


def load_mix(folder: Path) -> dict[str, Dataset]:
    """The splits of a mix by name."""
    return {name: load_facts(Path(folder) / f"{name}.jsonl") for name in SPLITS}


def train_stage(
    trainer_class: type[Trainer],
    config: TrainingArguments,
    model: str,
    mix: Path,
    splits: tuple[str, ...],
    folder: Path,
    records_from: Path | None = None,
) -> Path:
    """
    Trains `model` on the mix's `splits`, evaluating every split each epoch; a killed run goes on from its last
    checkpoint.

    Args:
        trainer_class (`type[Trainer]`):
            `SFTTrainer` or a subclass of it.
        config ([`~transformers.TrainingArguments`]):
            Its configuration. `output_dir` is set to `folder`.
        model (`str`):
            Hub id or folder of the model to start from.
        mix (`Path`):
            Folder of [`mix_stage`].
        splits (`tuple[str, ...]`):
            Splits to train on.
        folder (`Path`):
            Where the checkpoint goes, with `accuracy.jsonl` and `training.json`.
        records_from (`Path`, *optional*):
            Folder of an earlier training stage that `model` comes from; its last evaluation is the first of this one.
    """
    effective = {k: v for k, v in config.to_dict().items() if k not in _WITHOUT_EFFECT}
    arguments = {
        "trainer": trainer_class.__name__,
        "splits": list(splits),
        "config": effective,
        **_model_argument(model),
    }
    inputs = [mix, model] if Path(model).is_dir() else [mix]

    def work(partial: Path) -> None:
        trainer, seconds = _train(trainer_class, config, model, load_mix(mix), splits, partial, records_from)
        if trainer.is_world_process_zero():
            about = {"origin": _origin(model), "mix": _run_arguments(mix), "seconds_per_step": seconds}
            _write_training_file(trainer, partial, about)
            for path in partial.glob("checkpoint-*"):  # they hold the optimizer; the model is saved
                shutil.rmtree(path)

    return run_stage(folder, json.loads(json.dumps(arguments, default=str)), inputs, work, every_process=True)


def _train(
    trainer_class, config, model, mix, splits, folder: Path, records_from: Path | None
) -> tuple[Trainer, float]:
    config.output_dir = os.fspath(folder)
    language_model, tokenizer = load_model_and_tokenizer(model)
    train_dataset = concatenate_datasets([mix[name].select_columns(["prompt", "completion"]) for name in splits])
    trainer = trainer_class(language_model, config, train_dataset=train_dataset, processing_class=tokenizer)
    records_file, timer = folder / RECORDS_FILE, StepTimer()
    checkpoint = get_last_checkpoint(folder)
    if records_from is not None and checkpoint is None and trainer.is_world_process_zero():
        write_records(records_file, [read_records(records_from / RECORDS_FILE)[-1]._replace(step=0, epoch=0.0)])
    trainer.accelerator.wait_for_everyone()
    trainer.add_callback(FactAccuracyCallback(trainer, mix, records_file))
    trainer.add_callback(timer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return trainer, timer.median()


def _write_training_file(trainer: Trainer, folder: Path, about: dict) -> None:
    """`training.json`: what the report and the model card say of a run, beside its accuracy."""
    config = trainer.args
    parameters = list(trainer.model.parameters())
    shown = ("learning_rate", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed", "bf16")
    own = ("kl_weight", "temperature", "trainable_groups", "frozen_groups")
    settings = {name: getattr(config, name) for name in shown + own if getattr(config, name, None) is not None}
    settings["batch_size"] = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    training = {
        **about,
        "trainer": type(trainer).__name__,
        "settings": settings,
        "num_steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "log_history": trainer.state.log_history,
    }
    text = json.dumps(training, indent=2, ensure_ascii=False, default=str)
    (folder / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")


def _model_argument(model: str) -> dict[str, str]:
    # A folder counts by its content, as an input, so that a study may be moved
    return {} if Path(model).is_dir() else {"model": model}


def _run_arguments(folder: str | Path) -> dict:
    path = Path(folder) / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8"))["arguments"] if path.is_file() else {}


def _origin(model: str) -> str | None:
    """The Hub id that a chain of stages started from; `None` if it was a local folder."""
    if not Path(model).is_dir():
        return model
    earlier = Path(model) / TRAINING_FILE
    if earlier.is_file():
        return json.loads(earlier.read_text(encoding="utf-8"))["origin"]
    return EMBEDDED_MODEL_ID if _run_arguments(model).get("model") == EMBEDDED_MODEL else None


def report_stage(folders: list[Path], output: Path) -> str:
    """
    Compares finished arms, the first being the baseline, and returns the table and its findings as text.

    Writes `report.md`, `curves.png` and `results.json` to `output`, and a model card with the figure into each folder.
    """
    arms = load_arms(folders)
    output.mkdir(parents=True, exist_ok=True)
    origin = arms[0].training["origin"] or "a local model"
    new_facts = arms[0].training["mix"]["mix"]["new_facts"]
    plot_curves(arms, output / "curves.png", f"{origin.split('/')[-1]}: stage 2 on known and {new_facts} new facts")
    text = f"{render_table(arms)}\n\n{render_findings(arms)}\n"
    results = json.dumps({arm.name: arm.summary() for arm in arms}, indent=2, ensure_ascii=False)
    (output / "results.json").write_text(results + "\n", encoding="utf-8")
    heading = f"# {origin}: what fine-tuning made it forget"
    (output / "report.md").write_text(f"{heading}\n\n{text}\n![Curves](curves.png)\n", encoding="utf-8")
    for arm, folder in zip(arms, folders, strict=True):
        shutil.copyfile(output / "curves.png", folder / "curves.png")
        write_model_card(arm, arms, folder)
    return text


class StepTimer(TrainerCallback):
    """Measures the seconds of each optimizer step, without evaluation and saving."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)

    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else math.nan
