# SPDX-License-Identifier: Apache-2.0
"""
What did this fine-tune break? Finds the facts that a base model knows, and asks the model that was made from it.

Input: BASE and MODEL (full models or adapters, whoever trained them) and facts. Output, in --output_dir: check.json,
check.md and check.png. What BASE knows is kept in --known_dir: another MODEL costs one pass. A stopped check goes on.
Exit status: 0 if the loss is within --tolerance, 2 if it is beyond, 3 if the facts are too few to tell, 1 for errors.

    trl-selfdistill check --before outputs/quickstart/model --after outputs/quickstart/sft

    trl-selfdistill check --before Qwen/Qwen2.5-1.5B-Instruct --after your-name/my-adapter \\
        --facts my_facts.jsonl --tolerance 0.05 --load_in_4bit
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig

from trl_selfdistill.files import read_json, warn_without
from trl_selfdistill.hub.model_card import add_check
from trl_selfdistill.slick.process_sharding import on_main_process
from trl_selfdistill.studies.arguments import FactsArguments
from trl_selfdistill.studies.check import (
    HowAsked,
    answers_stage,
    choose_chat,
    compare_tokenizers,
    known_stage,
    open_model,
    without_small_relations,
)
from trl_selfdistill.studies.check_report import compare_answers, render_section, write_report
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.facts.table import read_facts
from trl_selfdistill.studies.stages import wanted_facts


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
    base, model = (open_model(path, args.trust_remote_code) for path in (args.before, args.after))
    if base.version == model.version:
        raise ValueError(f"`after` {args.after} has the weights of `before` {args.before}: pass the trained model.")
    chat = choose_chat(base, model, args.chat)
    config = ModelConfig(dtype=args.dtype, load_in_4bit=args.load_in_4bit)
    how = HowAsked(config, args.bf16, args.trust_remote_code, args.batch_size, args.seed, chat)
    facts = without_small_relations(wanted_facts(facts_args))
    known = known_stage(base, facts, how, Path(args.known_dir))
    answers = answers_stage(model, known, how)

    def report() -> str:
        num_asked = read_json(known / "exemplars.json")["num_asked"]
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


if __name__ == "__main__":
    run_script(main, (CheckArguments, CheckedFacts), __doc__, usage_status=1)
