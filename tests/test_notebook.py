# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom in a kernel, on the toy study's model and facts."""

import re

import nbformat
from nbclient import NotebookClient
from toy_study import SCRIPTS


def test_the_notebook_runs(toy_study, tmp_path):
    notebook = nbformat.read(SCRIPTS.parent / "docs/examples/quickstart.ipynb", as_version=4)
    assert len(notebook.cells) <= 15 and not any(cell.get("outputs") for cell in notebook.cells)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += f"""
MODEL, FACTS = {str(toy_study.model)!r}, {{"facts": {str(toy_study.facts)!r}}}
MIX = {{"num_known": 10, "num_new": 20, "num_heldout": 40, "max_answer_share": 0.3}}
TRAINING |= {{"num_train_epochs": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 8}}"""
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    *_, results, card = notebook.cells
    rows = re.findall(r"\n(\S+)((?: +[01]\.\d{3}){3} \[.+)", results.outputs[0].data["text/plain"])
    assert [label for label, _ in rows] == ["SFT", "Self-distillation"] and rows[0][1] != rows[1][1]
    text = card.outputs[0].data["text/markdown"]
    assert "`SelfDistillSFTTrainer`" in text and "Trained in a notebook" in text
