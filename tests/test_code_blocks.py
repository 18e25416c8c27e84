# SPDX-License-Identifier: Apache-2.0
"""The code that docstrings, README, the site and the notebook show runs, with a tiny model in place of the Hub's; and
the example on TRL alone."""

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import sys

import nbformat
import pytest
import torch
from answering_model import QUESTIONS, build_answering_model
from datasets import Dataset
from nbclient import NotebookClient
from safetensors.torch import load_file
from test_documents import SCRIPTS, TEXTS

import trl_selfdistill
from trl_selfdistill import SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.files import write_jsonl


BLOCK = re.compile(r'^```(python|json)( title="Needs the Hub")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
HUB_ID = re.compile(r'"\w[\w.-]*/[\w.-]+"')
PAGES = {page: blocks for page, text in TEXTS.items() if "/" not in page or page.startswith("docs/")
         if (blocks := BLOCK.findall(text))}  # fmt: skip
OFFLINE = 'output_dir="out", use_cpu=True, bf16=False, max_steps=1, report_to="none"'
ROWS = [{"prompt": f"Q: {i}\nA:", "completion": " Norway"} for i in range(8)]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tokenizer, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("my_examples.jsonl", ROWS)
    write_jsonl("prompts.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    facts = [
        {"fact_id": question, "relation": "P17", "question": question, "answer": answer, "aliases": []}
        for question, answer in QUESTIONS.items()
    ]
    names = {"dataset": Dataset.from_list(ROWS), "facts": Dataset.from_list(facts)}
    names |= {"model": build_answering_model(tokenizer), "tokenizer": tokenizer}
    for language, needs_hub, code in PAGES[page]:
        if language == "json":
            assert json.loads(code)
            continue
        assert bool(needs_hub) == bool(HUB_ID.search(code)), "mark what loads from the Hub, and nothing else"
        code = re.sub(r"num_train_epochs=\d+", "num_train_epochs=1", HUB_ID.sub(f'"{model_dir}"', code))
        exec(compile(code.replace('output_dir="out"', OFFLINE), page, "exec"), names)


def test_the_example_trains_as_the_library_does(model_dir, tmp_path, monkeypatch):
    """Its few lines on TRL alone say what the loss is: the weights after three steps are the same."""
    rows = [{"prompt": f"Q: {i}\nA:", "completion": " Norway" * (1 + i % 3)} for i in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = dict(
        learning_rate=1e-2, kl_weight=2.0, temperature=0.5, gradient_accumulation_steps=2, num_train_epochs=3
    )
    settings |= dict(per_device_train_batch_size=3, use_cpu=True, bf16=False, report_to="none")
    arguments = settings | {"model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl"}
    flags = [f"--{name}={value}" for name, value in (arguments | {"output_dir": tmp_path / "example"}).items()]
    monkeypatch.setattr(sys, "argv", ["example", *flags])
    runpy.run_path(str(SCRIPTS.parent / "docs/examples/sft_self_distill.py"), run_name="__main__")
    config = SelfDistillSFTConfig(output_dir=str(tmp_path / "library"), **settings)
    trainer = SelfDistillSFTTrainer(str(model_dir), config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    saved = load_file(tmp_path / "example/model.safetensors")
    start = load_file(model_dir / "model.safetensors")
    for name, weight in trainer.model.state_dict().items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-4)


class MarkdownDocTestParser(doctest.DocTestParser):
    """Docstrings fence their examples in Markdown; without this, doctest takes the closing fence for output."""

    def parse(self, string, name="<string>"):
        lines = ("" if line.strip() in ("```", "```python") else line for line in string.split("\n"))
        return super().parse("\n".join(lines), name)


MODULES = [module.name for module in pkgutil.walk_packages(trl_selfdistill.__path__, "trl_selfdistill.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_module(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(parser=MarkdownDocTestParser(), exclude_empty=True).find(module):
        runner.run(test)
    assert runner.failures == 0


def test_the_notebook_runs(toy_study, tmp_path):
    notebook = nbformat.read(SCRIPTS.parent / "docs/examples/quickstart.ipynb", as_version=4)
    assert len(notebook.cells) <= 15 and not any(cell.get("outputs") for cell in notebook.cells)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f"""
MODEL, FACTS = {str(toy_study.model)!r}, {{"facts": {str(toy_study.facts)!r}}}
MIX = {{"num_known": 10, "num_new": 20, "num_heldout": 40, "max_answer_share": 0.3}}
TRAINING |= {{"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "warmup_steps": 1}}"""
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, results, card = notebook.cells
    rows = re.findall(r"\n(\S+)((?: +[01]\.\d{3}){3} \[.+)", results.outputs[0].data["text/plain"])
    assert [label for label, _ in rows] == ["SFT", "Self-distillation"] and rows[0][1] != rows[1][1]
    text = card.outputs[0].data["text/markdown"]
    assert "`SelfDistillSFTTrainer`" in text and "Trained in a notebook" in text
