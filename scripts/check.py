# SPDX-License-Identifier: Apache-2.0
"""
What did this fine-tune break? Finds the facts that a base model knows, and asks the model that was made from it.

Input: BASE and MODEL (full models or adapters, whoever trained them) and facts. Output, in --output_dir: check.json,
check.md and check.png. What BASE knows is kept in --known_dir: another MODEL costs one pass. A stopped check goes on.
Exit status: 0 if the loss is within --tolerance, 2 if it is beyond, 3 if the facts are too few to tell, 1 for errors.

    trl-selfdistill check --before outputs/quickstart/model --after outputs/quickstart/sft

    trl-selfdistill check --before Qwen/Qwen2.5-1.5B-Instruct --after your-name/my-adapter \\
        --facts known_facts.jsonl --tolerance 0.05 --load_in_4bit
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from trl_selfdistill.files import read_json, warn_without, write_json
from trl_selfdistill.hub.model_card import add_check, escape_markdown
from trl_selfdistill.slick.process_sharding import on_main_process
from trl_selfdistill.slick.slick import PRESETS
from trl_selfdistill.studies.arguments import FactsArguments
from trl_selfdistill.studies.check import (
    SAME_WEIGHTS,
    CheckedModel,
    HowAsked,
    answers_stage,
    compare_answers,
    known_stage,
    open_model,
    render_section,
)
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.facts.table import read_facts
from trl_selfdistill.studies.figures import page_figure
from trl_selfdistill.studies.markdown import markdown_table
from trl_selfdistill.studies.stages import wanted_facts


logger = logging.getLogger("trl_selfdistill.check")

MOST_SHOWN = 50  # of the lost facts, in the report; `check.json` has all
MOST_DRAWN = 40  # relations in the figure, those that lost most
EXIT_STATUS = {"within": 0, "beyond": 2, "undecided": 3}


@dataclass
class CheckArguments:
    """Which models are compared, and how they are asked."""

    _argument_group_name = "check"

    before: str = field(metadata={"help": "BASE, by Hub id or folder: a full model or an adapter."})
    after: str = field(metadata={"help": "MODEL that was made from it, by Hub id or folder: full or an adapter."})
    tolerance: float = field(default=0.02, metadata={"help": "Largest loss of accuracy that is tolerated, in [0, 1)."})
    chat: bool | None = field(
        default=None,
        metadata={"help": "Whether to ask both through their chat templates. By default if BASE has one."},
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights, or `auto`."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Whether to load both in 4 bit."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to ask in bf16 autocast. By default where the device computes bf16 natively."},
    )
    batch_size: int = field(default=64, metadata={"help": "Sequences in one forward pass."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of exemplars."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code of the models."})
    known_dir: str = field(default="outputs/known", metadata={"help": "Folder that keeps what each BASE knows."})
    update_card: bool = field(default=False, metadata={"help": "Whether to add the result to MODEL's README.md."})
    output_dir: str = field(default="outputs/check", metadata={"help": "Folder of the report."})

    def __post_init__(self):
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"`tolerance` is {self.tolerance}; it must be a fraction in [0, 1), such as 0.02.")
        dtypes = ("auto", "float32", "bfloat16", "float16")
        if self.batch_size < 1 or self.dtype not in dtypes:
            raise ValueError(
                f"`batch_size` must be 1 or more and `dtype` one of {', '.join(dtypes)}, got {self.batch_size} and "
                f"{self.dtype!r}."
            )
        for name in ("known_dir", "output_dir"):
            if Path(getattr(self, name)).exists() and not Path(getattr(self, name)).is_dir():
                raise ValueError(f"`{name}` must be a folder, got the file {getattr(self, name)}.")
        if self.update_card and not Path(self.after).is_dir():
            raise ValueError(f"`update_card` needs a folder as `after`, got {self.after!r}. Paste check.md instead.")


@dataclass
class CheckedFacts(FactsArguments):
    """Of geonames the quickstart's limits, unless others are set: few facts with the same answer."""

    def __post_init__(self):
        super().__post_init__()
        if self.facts == "geonames" and self.max_facts_per_relation is self.max_facts_per_answer is None:
            self.max_facts_per_relation, self.max_facts_per_answer = 1000, 14


def main(args: CheckArguments, facts_args: CheckedFacts) -> int:
    """Asks, writes the report, prints its summary and returns the exit status."""
    base, model = (open_model(side, getattr(args, side), args.trust_remote_code) for side in ("before", "after"))
    if base.version == model.version:
        raise ValueError(SAME_WEIGHTS.format(args.after))
    chat = choose_chat(base, model, args.chat)
    config = ModelConfig(dtype=args.dtype, load_in_4bit=args.load_in_4bit)
    how = HowAsked(config, args.bf16, args.trust_remote_code, args.batch_size, args.seed, chat)
    facts = without_small_relations(wanted_facts(facts_args))
    known = known_stage(base, facts, how, Path(args.known_dir))
    answers = answers_stage(model, known, how)

    def report() -> str:
        num_asked = read_json(known / "base.json")["num_asked"]
        about = {"base": base.name, "model": model.name, "num_asked": num_asked}
        about |= {"prompts": "chat" if chat else "text", "notes": compare_tokenizers(base, model, chat)}
        content = compare_answers(read_facts(known / "facts.jsonl"), answers, args.tolerance, **about)
        print(content["summary"])
        write_report(content, Path(args.output_dir))
        if args.update_card:
            with warn_without(Path(args.after) / "README.md"):
                add_check(Path(args.after), render_section(content))
        print(f"Report: {Path(args.output_dir) / 'check.md'}")
        return content["verdict"]

    return EXIT_STATUS[on_main_process(report)]


def choose_chat(base: CheckedModel, model: CheckedModel, chat: bool | None) -> bool:
    """Whether both are asked through their chat templates: as told, or else if the base has one."""
    chat = base.tokenizer.chat_template is not None if chat is None else chat
    for side in (base, model):
        if chat and side.tokenizer.chat_template is None:
            raise ValueError(
                f"{side.path} has no chat template, and both models are asked alike. Pass `--chat false` for text "
                "prompts, or save the template with its tokenizer."
            )
    return chat


def compare_tokenizers(base: CheckedModel, model: CheckedModel, chat: bool) -> list[str]:
    """What a reader must know about how the two were asked."""
    notes, (ours, theirs) = [], (side.identity for side in (base, model))
    if ours["tokenizer"] != theirs["tokenizer"]:
        notes.append("Their tokenizers differ, and each was asked with its own.")
    if chat and ours["chat_template"] != theirs["chat_template"]:
        notes.append("Their chat templates differ, and each was asked through its own.")
    return notes


def without_small_relations(facts: Dataset) -> Dataset:
    """The facts of relations that have exemplars to spare: for the prompts that choose facts, and for the last one."""
    sizes, needed = Counter(facts["relation"]), 2 * PRESETS["quick"].num_shots + 1
    small = sorted(relation for relation, size in sizes.items() if size < needed)
    if small:
        logger.warning(f"Left out, as they have fewer than {needed} facts: {', '.join(small)}.")
    if len(small) == len(sizes):
        raise ValueError(f"`facts`: no relation has {needed} facts or more. Add facts.")
    return facts.filter(lambda relation: relation not in small, input_columns="relation") if small else facts


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `check.json`, `check.md` and `check.png` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "check.json", report)
    header = ["relation", "facts", "accuracy before", "after", "forgetting rate"]
    rows = []
    for name, scores in report["relations"].items():
        rates = [scores[key] for key in ("baseline_accuracy", "accuracy", "forgetting_rate")]
        shown = ["-" if rate is None else f"{rate:.3f}" for rate in rates]
        rows.append([escape_markdown(name), str(scores["num_predictions"]), *shown])
    columns = ("question", "answer", "base_answer", "model_answer")
    lost = [[escape_markdown(row[column]) for column in columns] for row in report["lost"][:MOST_SHOWN]]
    shown = f", the first {MOST_SHOWN}" if len(report["lost"]) > MOST_SHOWN else ""
    figure = folder / "check.png"
    figure.unlink(missing_ok=True)
    with warn_without(figure):
        plot_relations(report, figure)
    parts = [
        f"# {escape_markdown(report['model'])}: what it kept of what {escape_markdown(report['base'])} knows",
        render_section(report),
        f"## By relation\n\n{markdown_table(header, rows)}",
        *(["![Accuracy before and after, by relation](check.png)"] if figure.is_file() else []),
        f"## Lost facts ({len(report['lost'])}{shown})",
        markdown_table(["question", "right answer", "before", "after"], lost) if lost else "None.",
    ]
    (folder / "check.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def plot_relations(report: dict[str, Any], path: Path) -> None:
    """A line for each relation from the accuracy before to that after, with its interval; most was lost at the top."""
    relations = sorted(report["relations"].items(), key=lambda item: -item[1]["net_change"])[-MOST_DRAWN:]
    with page_figure(path, 1 + 0.25 * len(relations)) as figure:
        axis = figure.subplots()
        for y, (_, scores) in enumerate(relations):
            before, after = scores["baseline_accuracy"], scores["accuracy"]
            axis.plot([before, after], [y, y], color="0.7", marker="", zorder=1)
            ends = [[after - scores["accuracy_ci_low"]], [scores["accuracy_ci_high"] - after]]
            axis.errorbar([after], [y], xerr=ends, fmt="s", color="C4", label=None if y else "after")
            axis.plot([before], [y], "o", color="C0", label=None if y else "before")
        names = [f"{name} ({scores['num_predictions']})" for name, scores in relations]
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="share of the known facts that are answered right", xlim=(-0.02, 1.02))
        figure.legend(loc="outside upper right", ncols=2)


if __name__ == "__main__":
    run_script(main, (CheckArguments, CheckedFacts), __doc__, usage_status=1)
