# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint of the study: what it was trained on, what it learnt and what it forgot."""

import html
import json
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .models import EMBEDDED_MODEL_ID
from .report import ArmResult, render_findings, render_table
from .stage import RUN_FILE


_METHODS = {
    "sft": "Plain supervised fine-tuning (cross-entropy of the answers) in both stages. This is the baseline.",
    "selfdistill": (
        "Stage 2 minimises `CE + λ τ² KL(teacher ‖ student)` at the label positions, where the teacher is the frozen "
        "model of stage 1 (`SelfDistillSFTTrainer`)."
    ),
    "frozen": "Stage 2 trains a part of the parameters only, the others are frozen (`FrozenGroupsSFTTrainer`).",
}
# The licence of a fine-tuned model is that of its base; where it is not known here, the card leaves it to the
# publisher
_LICENSES = {EMBEDDED_MODEL_ID: "apache-2.0"}
_TAGS = {"sft": "sft", "selfdistill": "self-distill-sft", "frozen": "frozen-groups-sft"}


def write_model_card(arm: ArmResult, arms: list[ArmResult], folder: Path) -> Path:
    """
    Writes `README.md` into an arm's `folder` and returns its path.

    Args:
        arm ([`ArmResult`]): The arm whose checkpoint `folder` holds.
        arms (`list[ArmResult]`): All arms of the table, the baseline first.
        folder (`Path`): The checkpoint, with its `run.json`.
    """
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    base_model = arm.training["origin"]
    new_facts = arm.training["mix"]["mix"]["new_facts"]
    origin = base_model or "a local model"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        license=_LICENSES.get(base_model),
        library_name="transformers",
        pipeline_tag="text-generation",
        language="en",
        tags=["trl", _TAGS[arm.name], "trl-selfdistill", "hallucination", "factual-forgetting", "arxiv:2604.15574"],
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    card = ModelCard.from_template(
        data,
        template_path=str(files("trl_selfdistill") / "templates" / "model_card_template.md"),
        model_name=f"{origin.split('/')[-1]}: {arm.label}",
        intro=(
            f"`{origin}` fine-tuned on new facts with **{arm.label}**, as one arm of the quickstart study of "
            "trl-selfdistill: how much of what a model knows does fine-tuning on new facts break (arXiv 2604.15574)?"
        ),
        table=render_table(arms),
        findings=render_findings(arms),
        method=_METHODS[arm.name],
        settings={html.escape(k): _cell(v) for k, v in arm.training["settings"].items()},
        num_facts=arm.summary()["num_facts"],
        new_facts=new_facts,
        command=run["command"],
        environment=f"{run['date'][:10]}, {run['machine']}. {versions}.",
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _cell(value: object) -> str:
    """A value for a Markdown table: nothing in it can end the cell or become HTML."""
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return html.escape(text).replace("|", "\\|").replace("\n", " ")
