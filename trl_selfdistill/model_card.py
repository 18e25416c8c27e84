# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint of the study: what it was trained on, what it learnt and what it forgot."""

import json
import shlex
from importlib.resources import files
from pathlib import Path, PurePath, PureWindowsPath

from huggingface_hub import ModelCard, ModelCardData

from .models import EMBEDDED_MODEL_ID
from .report import ArmResult, escape_markdown, render_findings, render_table
from .stage import RUN_FILE


_METHODS = {
    "SFTTrainer": "Plain supervised fine-tuning: the cross-entropy of the answers (`SFTTrainer`).",
    "SelfDistillSFTTrainer": (
        "Self-distillation: `CE + λ τ² KL(teacher ‖ student)` at the label positions, where the teacher is a frozen "
        "snapshot of the model that training started from (`SelfDistillSFTTrainer`)."
    ),
    "FrozenGroupsSFTTrainer": (
        "Supervised fine-tuning of a part of the parameters, the others are frozen (`FrozenGroupsSFTTrainer`)."
    ),
}
_TAGS = {
    "SFTTrainer": "sft",
    "SelfDistillSFTTrainer": "self-distill-sft",
    "FrozenGroupsSFTTrainer": "frozen-groups-sft",
}
# The licence of a fine-tuned model is that of its base; where it is not known here, the card leaves it to the
# publisher
_LICENSES = {EMBEDDED_MODEL_ID: "apache-2.0"}


def write_model_card(arm: ArmResult, arms: list[ArmResult], folder: Path) -> Path:
    """
    Writes `README.md` into an arm's `folder` and returns its path.

    Args:
        arm ([`ArmResult`]): The arm whose checkpoint `folder` holds.
        arms (`list[ArmResult]`): All arms of the table, the baseline first; `[arm]` before there are others.
        folder (`Path`): The checkpoint, with its `run.json`, and `curves.png` if there is one.
    """
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    base_model = arm.training["origin"]
    trainer = arm.training["trainer"] if arm.training["settings"].get("kl_weight") != 0 else "SFTTrainer"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        license=_LICENSES.get(base_model),
        library_name="transformers",
        pipeline_tag="text-generation",
        language="en",
        tags=["trl", _TAGS[trainer], "trl-selfdistill", "hallucination", "factual-forgetting", "arxiv:2604.15574"],
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    card = ModelCard.from_template(
        data,
        template_path=str(files("trl_selfdistill") / "templates" / "model_card_template.md"),
        origin=escape_markdown(base_model) if base_model else None,
        arm=arm.label,
        table=render_table(arms),
        findings=render_findings(arms),
        has_figure=(folder / "curves.png").is_file(),
        method=_METHODS[trainer],
        settings={escape_markdown(k): escape_markdown(v) for k, v in arm.training["settings"].items()},
        splits=arm.training["splits"],
        num_facts=arm.summary()["num_facts"],
        new_facts=arm.training["mix"]["mix"]["new_facts"],
        command=_portable(run["command"]),
        environment=escape_markdown(f"{run['date'][:10]}, {run['machine']}. {versions}."),
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _portable(command: str) -> str:
    """The command without what only this machine has: of absolute paths, their last part. One line, for a fence."""
    words = []
    for word in shlex.split(command):
        flag, equals, value = word.rpartition("=")
        if PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith(("~", "..")):
            value = PureWindowsPath(value).name  # takes both kinds of slashes
        words.append(shlex.quote(" ".join(f"{flag}{equals}{value}".split())))
    return " ".join(["accelerate", "launch", *words] if words[0].endswith(".py") else words)
