# SPDX-License-Identifier: Apache-2.0
"""What the runs of a study leave in their folders, and the quickstart's report on them: table, findings and curves."""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ..files import read_json, read_jsonl
from ..hallucination.intervals import Interval, mean_interval
from ..hub.model_card import escape_markdown
from .fact_accuracy import AccuracyRecord, forgetting, read_records
from .figures import label_ends, page_figure
from .markdown import format_interval, markdown_table


RECORDS_FILE = "accuracy.jsonl"
TRAINING_FILE = "training.json"
DRIFT_FILE = "drift.jsonl"
BASE_FILE = "base.jsonl"
LEGEND = """\
Held-out facts were known and are never trained on: forgetting is the peak of their accuracy minus its end,
hallucinated and abstained are shares of them at the end. Known facts were known and are trained on.
Intervals are over facts."""
VARIANT_LABELS = {"sft": "SFT", "selfdistill": "Self-distillation", "frozen": "Frozen groups"}


class VariantResult(NamedTuple):
    """
    What a run of a variant left in its folder.

    Args:
        name (`str`): The folder's name.
        records (`list[AccuracyRecord]`): The run's evaluations, from before the first step to the end.
        training (`dict`): Content of `training.json`: settings, cost, the trainer's log.
        drift (`list[dict]`, *optional*): Lines of `drift.jsonl`, empty without a drift probe.
        base (`AccuracyRecord`, *optional*): What the model of the study answers to the held-out facts, untrained.
    """

    name: str
    records: list[AccuracyRecord]
    training: dict
    drift: list[dict] = []
    base: AccuracyRecord | None = None

    @property
    def title(self) -> str:
        """Its name for readers, as plain text."""
        return VARIANT_LABELS.get(self.name, self.name)

    @property
    def label(self) -> str:
        """Its name for readers, as Markdown: a folder may have any name."""
        return escape_markdown(self.title)

    @property
    def before(self) -> AccuracyRecord | None:
        """
        The evaluation of the model that the run started from, `None` if that had not learnt the format of the
        questions in a run of its own: its answers tell little about what it knew.
        """
        return self.records[0] if self.training["started_from"] else None

    def forgetting(self) -> Interval:
        """Peak minus final held-out accuracy (see [`~trl_selfdistill.studies.fact_accuracy.forgetting`])."""
        return mean_interval(forgetting(self.records))

    def forgetting_difference(self, baseline: "VariantResult") -> Interval:
        """Its forgetting minus that of `baseline`, fact by fact, which must be the same: below 0, it forgets less."""
        if self.records[0].answers["heldout"].keys() != baseline.records[0].answers["heldout"].keys():
            raise ValueError(f"{self.name} and {baseline.name} were asked different held-out facts: train on one mix.")
        return mean_interval(forgetting(self.records) - forgetting(baseline.records))

    def summary(self) -> dict:
        """Its numbers, all rates as fractions in [0, 1], as `results.json` holds them."""
        heldout = [record.accuracy("heldout") for record in self.records]
        hallucinated, abstained = (self.records[-1].outcomes("heldout", o) for o in ("hallucinated", "abstained"))
        known = hallucinated[:0] if self.before is None else hallucinated[self.before.outcomes("heldout") > 0]
        return {
            "heldout_before": heldout[0],
            "heldout_peak": max(heldout),
            "heldout_after": heldout[-1],
            "forgetting": self.forgetting()._asdict(),
            "new_learnt": self.records[-1].accuracy("new"),
            "known_after": self.records[-1].accuracy("known"),
            "hallucination_rate": float(hallucinated.mean()),
            "abstention_rate": float(abstained.mean()),
            "induced_hallucination_rate": float(known.mean()) if known.size else None,  # of what was right before
            "num_facts": {name: len(answers) for name, answers in self.records[-1].answers.items()},
            "epochs": [record.epoch for record in self.records],
            "heldout_curve": heldout,
            "new_curve": [record.accuracy("new") for record in self.records],
            **{k: v for k, v in self.training.items() if k != "log_history"},
        }


def read_result(folder: Path) -> VariantResult:
    """Reads what a finished run left in `folder`; a `FileNotFoundError` if there is none."""
    for file in (RECORDS_FILE, TRAINING_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no finished run: {file} is missing. Train the variant first.")
    drift = read_jsonl(folder / DRIFT_FILE) if (folder / DRIFT_FILE).is_file() else []
    records, training, base = read_records(folder / RECORDS_FILE), read_json(folder / TRAINING_FILE), None
    if (folder / BASE_FILE).is_file():
        [base] = read_records(folder / BASE_FILE)
        same = {fact_id: base.answers["heldout"][fact_id] for fact_id in records[-1].answers["heldout"]}
        base = base._replace(answers={"heldout": same})  # a comparison asks a part of the held-out facts
    return VariantResult(folder.name, records, training, drift, base)


def mean_seconds(results: list[VariantResult], name: str) -> float | None:
    """The mean of what was timed: not in a run that was killed after the last step. `None` if nothing was."""
    seconds = [result.training.get(name) for result in results]
    return fmean(filter(None, seconds)) if any(seconds) else None


def render_table(results: list[VariantResult]) -> str:
    """A Markdown table with a row for each variant. The first is the baseline that the others are compared with."""
    baseline = results[0]
    header = ["variant", "held-out before / peak / after", "forgetting [95 % CI]"]
    header += [f"difference from {baseline.label} [95 % CI]", "hallucinated / abstained"]
    header += ["new learnt", "Known", "s / step", "trainable parameters"]
    differences = [format_interval(other.forgetting_difference(baseline), signed=True) for other in results[1:]]
    rows = []
    for result, difference in zip(results, ["-", *differences], strict=True):
        s = result.summary()
        rows.append(
            [
                result.label,
                f"{s['heldout_before']:.3f} / {s['heldout_peak']:.3f} / {s['heldout_after']:.3f}",
                format_interval(result.forgetting()),
                difference,
                f"{s['hallucination_rate']:.3f} / {s['abstention_rate']:.3f}",
                f"{s['new_learnt']:.3f}",
                f"{s['known_after']:.3f}",
                "-" if s["seconds_per_step"] is None else f"{s['seconds_per_step']:.2f}",
                f"{s['trainable_parameters'] / 1e6:.1f} M ({s['trainable_parameters'] / s['parameters']:.0%})",
            ]
        )
    return markdown_table(header, rows)


def render_findings(results: list[VariantResult]) -> str:
    """What the numbers say about each variant against the baseline, in a sentence each."""
    baseline = results[0].summary()
    lines = []
    for result in results[1:]:
        s, difference = result.summary(), result.forgetting_difference(results[0])
        if difference.low > 0 or difference.high < 0:
            verdict = f"forgets clearly {'less' if difference.high < 0 else 'more'} than {results[0].label}"
        else:
            verdict = f"does not forget clearly more or less than {results[0].label} (the interval includes 0)"
        lines.append(
            f"- {result.label} {verdict}: it lost {s['forgetting']['value']:.3f} of held-out accuracy against "
            f"{baseline['forgetting']['value']:.3f}, and learnt {s['new_learnt']:.3f} of the new facts against "
            f"{baseline['new_learnt']:.3f}."
        )
    return "\n".join(lines)


def plot_curves(results: list[VariantResult], path: Path) -> None:
    """Draws two panels over epochs: accuracy on the held-out facts, and on the new facts, a line for each variant."""
    panels = {"heldout": "Known facts never trained on", "new": "New facts trained on"}
    with page_figure(path) as figure:
        axes = figure.subplots(1, 2)
        for axis, (name, heading) in zip(axes, panels.items(), strict=True):
            for result in results:
                values = [record.accuracy(name) for record in result.records]
                axis.plot([record.epoch for record in result.records], values, label=result.title)
            axis.set(title=f"{heading} (n = {len(results[0].records[-1].answers[name])})", xlabel="epochs")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("accuracy (exact match)")
        label_ends(axes[0])
        model = (results[0].training["base_model"] or "A local model").split("/")[-1]
        figure.suptitle(f"{model}: training on known and {results[0].training['mix']['mix']['new_facts']} new facts")
