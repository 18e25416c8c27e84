# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of README and of the site run one after the other, with a tiny model in place of the Hub's."""

import json
import re

import pytest
from answering_model import QUESTIONS, build_answering_model
from datasets import Dataset
from test_documents import TEXTS

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
    write_jsonl("my_facts.jsonl", ROWS)
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


def test_pages_have_blocks():
    assert {"docs/index.md", "docs/trainers.md", "docs/adapters.md", "docs/slick.md"} <= {*PAGES}
