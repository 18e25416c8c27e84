# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of README and of the site run one after the other, with a tiny model in place of the Hub's; and
the example on TRL alone."""

import json
import re
import runpy
import sys

import pytest
import torch
from answering_model import QUESTIONS, build_answering_model
from datasets import Dataset
from safetensors.torch import load_file
from test_documents import SCRIPTS, TEXTS

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
