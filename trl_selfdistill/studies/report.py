# SPDX-License-Identifier: Apache-2.0
"""What the study found: one row for each arm as a table, the findings in words, and a figure of the curves."""

import json
from pathlib import Path
from typing import NamedTuple

from ..hub.markdown import escape_markdown, format_interval
from .fact_accuracy import AccuracyRecord, read_records
from .forgetting import Interval, forgetting, forgetting_difference


# The evaluation before the first of a chain of stages; a first stage has it in its own records
BASE_RECORDS_FILE = "base_accuracy.jsonl"
ARM_LABELS = {"sft": "SFT", "selfdistill": "Self-distillation", "frozen": "Frozen groups"}
# Colours that stay apart for colour-blind readers (Okabe-Ito), and a marker each for print
_ARM_STYLES = {"sft": ("#D55E00", "o"), "selfdistill": ("#0072B2", "s"), "frozen": ("#009E73", "^")}


class ArmResult(NamedTuple):
    """
    What one arm did.

    Args:
        name (`str`): Its folder's name, `sft`, `selfdistill` or `frozen`.
        records (`list[AccuracyRecord]`): Its evaluations, from before the first step to the end.
        training (`dict`): Content of its `training.json`.
        forgetting (`Interval`): Peak minus final held-out accuracy.
        difference (`Interval`, *optional*): Its forgetting minus the baseline's; `None` for the baseline.
        base (`AccuracyRecord`): The evaluation of the base model, before any training of the study.
    """

    name: str
    records: list[AccuracyRecord]
    training: dict
    forgetting: Interval
    difference: Interval | None
    base: AccuracyRecord

    @property
    def title(self) -> str:
        """Its name for readers, as plain text."""
        return ARM_LABELS.get(self.name, self.name)

    @property
    def label(self) -> str:
        """Its name for readers, as Markdown: a folder may have any name."""
        return escape_markdown(self.title)

    def summary(self) -> dict:
        """Its numbers, all rates as fractions in [0, 1], as `results.json` holds them."""
        heldout = [record.accuracy("heldout") for record in self.records]
        return {
            "heldout_before": heldout[0],
            "heldout_peak": max(heldout),
            "heldout_after": heldout[-1],
            "forgetting": self.forgetting._asdict(),
            "forgetting_difference": self.difference and self.difference._asdict(),
            "new_learnt": self.records[-1].accuracy("new"),
            "known_after": self.records[-1].accuracy("known"),
            "num_facts": {name: len(correct) for name, correct in self.records[-1].correct.items()},
            "epochs": [record.epoch for record in self.records],
            "heldout_curve": heldout,
            "new_curve": [record.accuracy("new") for record in self.records],
            **{k: v for k, v in self.training.items() if k != "log_history"},
        }


def load_arms(folders: list[Path], seed: int = 0) -> list[ArmResult]:
    """
    Reads the folders of the arms; the first is the baseline that the others are compared with.

    Raises:
        FileNotFoundError: If a folder holds no finished training stage.
        ValueError: If two folders have the same name, or the arms did not answer the same facts.
    """
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"Arms are told apart by the names of their folders, got {names}. Rename some of them.")
    arms, baseline = [], None
    for folder in folders:
        for file in ("accuracy.jsonl", "training.json"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} holds no finished arm: {file} is missing. Train the arm first.")
        records = read_records(folder / "accuracy.jsonl")
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        difference = baseline and forgetting_difference(records, baseline, seed=seed)
        earlier = folder / BASE_RECORDS_FILE
        base = read_records(earlier)[0] if earlier.is_file() else records[0]
        arms.append(ArmResult(folder.name, records, training, forgetting(records, seed=seed), difference, base))
        baseline = baseline or records
    return arms


def render_table(arms: list[ArmResult]) -> str:
    """The table as Markdown that also reads well in a terminal."""
    header = [
        "arm",
        "held-out before / peak / after",
        "forgetting [95 % CI]",
        f"difference from {arms[0].label} [95 % CI]",
        "new learnt",
        "Known",
        "s / step",
        "trainable parameters",
    ]
    rows = [header, ["---"] * len(header)]
    for arm in arms:
        s = arm.summary()
        share = s["trainable_parameters"] / s["parameters"]
        rows.append(
            [
                arm.label,
                f"{s['heldout_before']:.3f} / {s['heldout_peak']:.3f} / {s['heldout_after']:.3f}",
                format_interval(arm.forgetting),
                format_interval(arm.difference, signed=True) if arm.difference else "-",
                f"{s['new_learnt']:.3f}",
                f"{s['known_after']:.3f}",
                "-" if s["seconds_per_step"] is None else f"{s['seconds_per_step']:.2f}",
                f"{s['trainable_parameters'] / 1e6:.1f} M ({share:.0%})",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows[1] = ["-" * width for width in widths]
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def render_findings(arms: list[ArmResult]) -> str:
    """What the numbers say about each arm against the baseline, in a sentence each."""
    baseline = arms[0].summary()
    lines = []
    for arm in arms[1:]:
        s = arm.summary()
        if arm.difference.excludes_zero():
            verdict = f"forgets clearly {'less' if arm.difference.high < 0 else 'more'} than {arms[0].label}"
        else:
            verdict = f"does not forget clearly more or less than {arms[0].label} (the interval includes 0)"
        lines.append(
            f"- {arm.label} {verdict}: it lost {s['forgetting']['value']:.3f} of held-out accuracy against "
            f"{baseline['forgetting']['value']:.3f}, and learnt {s['new_learnt']:.3f} of the new facts against "
            f"{baseline['new_learnt']:.3f}."
        )
    return "\n".join(lines)


def plot_curves(arms: list[ArmResult], path: Path, title: str) -> None:
    """Two panels over epochs: accuracy on the held-out facts, and on the new facts, one line for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = arms[0].summary()["num_facts"]
    panels = (("heldout", "Known facts never trained on"), ("new", "New facts trained on"))
    for axis, (name, heading) in zip(axes, panels, strict=True):
        for arm in arms:
            colour, marker = _ARM_STYLES.get(arm.name, (None, "D"))
            epochs = [record.epoch for record in arm.records]
            values = [record.accuracy(name) for record in arm.records]
            label = arm.title.replace("$", r"\$")  # between dollars, matplotlib sets formulas
            axis.plot(epochs, values, color=colour, marker=marker, label=label, linewidth=2)
        axis.set(title=f"{heading} (n = {sizes[name]})", xlabel="epochs", ylabel="accuracy (exact match)")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[1].set_ylim(-0.03, 1.03)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
