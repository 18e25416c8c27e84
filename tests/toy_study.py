# SPDX-License-Identifier: Apache-2.0
"""A study in miniature: toy facts of two relations, and a tiny Llama that was taught most of them."""

import io
import random
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset
from fact_rows import facts_from_rows
from transformers import DataCollatorForSeq2Seq

from trl_selfdistill.files import write_jsonl
from trl_selfdistill.studies.small_llama import _tokenized


VARIANTS = ("sft", "selfdistill", "frozen")
SCRIPTS = Path(__file__).parents[1] / "scripts"
TEMPLATES = {relation: f"Which {relation} is {{subject}} located in?" for relation in ("country", "river")}
COUNTRIES, RIVERS = ("France", "Norway", "Peru", "Japan", "Austria"), ("Rhone", "Glomma", "Rimac", "Yodo", "Mur")
ANSWERS = {"country": COUNTRIES, "river": RIVERS}
NUM_FACTS, NUM_TAUGHT = 40, 34  # of each relation; what was not taught is Unknown, but for lucky guesses
_HEADS = ("Ba", "Do", "Fe", "Gu", "Ki", "Lo", "Ma", "Ne", "Pu", "Ro")
_TAILS = ("bran", "dost", "gel", "kim", "lund", "mar", "nik", "pol", "ras", "sten")

# A conversation in the form of the text prompts, with a blank before an answer, as Llama 2's
AS_TEXT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] + '\nA:' }}"
    "{% else %}{{ ' ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)

# Flags of scripts/run_study.py for a study of seconds, the same weights bit for bit at every run
STUDY_FLAGS = """
    --slick_num_prompts 2 --slick_num_shots 2 --num_known 10 --num_new 20 --num_heldout 40 --max_answer_share 0.3
    --num_train_epochs 2 --learning_rate 1e-2 --per_device_train_batch_size 8 --stage1_learning_rate 1e-3
    --save_strategy epoch --save_total_limit 1 --bf16 false --use_cpu --report_to none --logging_steps 2
    --gradient_checkpointing false --dataloader_pin_memory false --disable_tqdm true
""".split()


def toy_facts(num_facts: int = NUM_FACTS) -> Dataset:
    """The facts of one relation after the other, 50 at most; every fifth of a relation has the same answer."""
    names = [head + tail for head in _HEADS for tail in _TAILS]
    random.Random(0).shuffle(names)
    rows = []
    for relation, template in TEMPLATES.items():
        for i in range(num_facts):
            answer = ANSWERS[relation][i % 5]
            rows.append({"relation": relation, "subject": names.pop(), "template": template, "answer": answer})
    return facts_from_rows(rows)


def taught_model(facts: Dataset, num_taught: int, num_steps: int, most_shown: int = 3) -> tuple:
    """
    A model and its tokenizer, trained on documents of one to `most_shown` facts of a relation, the first `num_taught`
    of each: it answers them zero-shot and few-shot.
    """
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(facts["subject"][:])  # a name of one token is learnt in seconds
    model = build_model(tokenizer, hidden_size=32, intermediate_size=64, num_attention_heads=4, initializer_range=0.1)
    generator, collate = random.Random(0), DataCollatorForSeq2Seq(tokenizer)
    pairs = {relation: [] for relation in TEMPLATES}
    for fact in facts:
        if len(pairs[fact["relation"]]) < num_taught:
            pairs[fact["relation"]].append((fact["question"], fact["answer"]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, num_steps)
    for step in range(num_steps):
        sizes = [1 + (i + step) % most_shown for i in range(8)]
        shown = [generator.sample(pairs[generator.choice([*TEMPLATES])], size) for size in sizes]
        model(**collate([_tokenized(document, tokenizer) for document in shown])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, tokenizer


class ToyStudy(NamedTuple):
    """A finished run of scripts/run_study.py; tests copy what they change."""

    model: Path
    facts: Path
    output: Path
    stdout: str

    def flags(self, output: Path) -> list[str]:
        """Flags that run the same study in another folder."""
        paths = ["--model_name_or_path", self.model, "--facts", self.facts, "--output_dir", output]
        return [*map(str, paths), *STUDY_FLAGS]


def run_toy_study(root: Path) -> ToyStudy:
    """Trains the toy model and runs the whole study on it, as a user would."""
    study = ToyStudy(root / "toy-model", root / "facts.jsonl", root / "study", "")
    write_jsonl(study.facts, toy_facts())
    for part in taught_model(toy_facts(), NUM_TAUGHT, num_steps=200):
        part.save_pretrained(study.model)
    with redirect_stdout(io.StringIO()) as stdout:
        run_script("run_study.py", *study.flags(study.output))
    return study._replace(stdout=stdout.getvalue())


def run_script(name: str, *flags) -> None:
    """Runs a script in this process."""
    argv, sys.argv = sys.argv, [str(SCRIPTS / name), *map(str, flags)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv


def runs_of(folder: Path) -> dict[str, bytes]:
    """The `run.json` of each stage in a folder, which every run of the stage writes anew."""
    runs = {path.parent: path.read_bytes() for path in folder.glob("*/run.json")}
    return {stage.name: run for stage, run in runs.items() if stage.suffix != ".partial"}


def rerun(study: ToyStudy, *flags) -> set[str]:
    """Runs the study again in this process; returns the stages that were run."""
    before = runs_of(study.output)
    run_script("run_study.py", *study.flags(study.output), *flags)
    after = runs_of(study.output)
    return {name for name in after if before.get(name) != after[name]}
