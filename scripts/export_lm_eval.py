# SPDX-License-Identifier: Apache-2.0
"""
Writes facts as a task for lm-evaluation-harness, so that they stand beside the skills that it measures.

Input: facts, such as `heldout.jsonl` of a mix or the `facts.jsonl` that `check` keeps. Output, in --output_dir: the
task (TASK.yaml), its questions and its exemplars (JSON lines), and this package's exact match (TASK.py), so that both
find the same accuracy. lm_eval needs nothing else to run it, and the folder may be moved:

    trl-selfdistill export-lm-eval --facts outputs/study/mix/heldout.jsonl --output_dir outputs/lm_eval

    lm_eval --model hf --model_args pretrained=my-model --include_path outputs/lm_eval --tasks facts,gsm8k,ifeval

Without exemplars, as models are asked that were trained on these prompts:

    trl-selfdistill export-lm-eval --facts my_facts.csv --task my_facts --num_fewshot 0
"""

import inspect
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import yaml
from accelerate import PartialState
from datasets import Dataset

from trl_selfdistill.files import write_jsonl
from trl_selfdistill.hallucination.exact_match import exact_match
from trl_selfdistill.slick.prompts import question_prompt
from trl_selfdistill.slick.slick import reserve_exemplars
from trl_selfdistill.studies.arguments import FactsArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.stage import run_stage
from trl_selfdistill.studies.stages import wanted_facts


@dataclass
class ExportArguments:
    """The task that is written."""

    _argument_group_name = "task"

    task: str = field(default="facts", metadata={"help": "Name of the task."})
    num_fewshot: int = field(default=4, metadata={"help": "Solved exemplars before each question, of all relations."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of exemplars."})
    output_dir: str = field(default="outputs/lm_eval", metadata={"help": "Folder of the task."})

    def __post_init__(self):
        if not self.task.isidentifier() or self.num_fewshot < 0:
            raise ValueError(
                f"`task` must be a word and `num_fewshot` at least 0, got {self.task!r} and {self.num_fewshot}."
            )


def main(args: ExportArguments, facts_args: FactsArguments) -> None:
    """Writes the task and prints how to run it."""

    def export(folder: Path) -> None:
        facts, exemplars, rows = wanted_facts(facts_args), {}, None
        if args.num_fewshot:
            exemplars, rows = exemplars_and_rest(facts, args)
        # In turns of one of each relation
        shots = [*chain(*zip(*(shots for [shots] in exemplars.values()), strict=True))][: args.num_fewshot]
        asked = facts if rows is None else facts.select(rows)
        write_jsonl(folder / "questions.jsonl", (with_accepted(fact) for fact in asked))
        write_jsonl(folder / "exemplars.jsonl", ({"question": q, "accepted": [answer]} for q, answer in shots))
        functions = {"custom_dataset": load_task, "process_results": judge_answer}
        longest = max(len(form.encode()) for fact in asked for form in (fact["answer"], *fact["aliases"]))
        text = yaml.safe_dump(task_of(args, len(shots), longest), sort_keys=False, allow_unicode=True)
        text += "".join(f"{key}: !function {args.task}.{function.__name__}\n" for key, function in functions.items())
        (folder / f"{args.task}.yaml").write_text(text, encoding="utf-8")
        sources = inspect.getmodule(exact_match), *functions.values()
        code = "\n\n".join(map(inspect.getsource, sources))
        (folder / f"{args.task}.py").write_text(code, encoding="utf-8")

    if others := {path.stem for path in Path(args.output_dir).glob("*.yaml")} - {args.task}:
        raise ValueError(f"`output_dir`: {args.output_dir} holds the task {min(others)}. Name another folder.")
    inputs = [facts_args.facts] if Path(facts_args.facts).exists() else []
    folder = run_stage(args.output_dir, asdict(args) | asdict(facts_args), inputs, export)
    if PartialState().is_main_process:
        print(f"lm_eval --model hf --model_args pretrained=MODEL --include_path {folder} --tasks {args.task}")


def exemplars_and_rest(facts: Dataset, args: ExportArguments) -> tuple[dict, list[int]]:
    """Exemplars of as many relations as are needed, of those that can spare them, and the rows of all other facts."""
    sizes = Counter(facts["relation"])
    for per_relation in range(1, args.num_fewshot + 1):
        giving = [relation for relation, size in sizes.items() if size > per_relation]
        if len(giving) * per_relation >= args.num_fewshot:
            break
    else:
        raise ValueError(
            f"`num_fewshot={args.num_fewshot}`: {len(facts)} facts of {len(sizes)} relations cannot spare so many "
            "exemplars. Lower it, or give more facts of a relation."
        )
    giving = giving[: -(-args.num_fewshot // per_relation)]
    own = [row for row, relation in enumerate(facts["relation"]) if relation in giving]
    exemplars, left = reserve_exemplars(facts.select(own), 1, per_relation, args.seed)
    reserved = {*own} - {own[row] for row in left}
    return exemplars, [row for row in range(len(facts)) if row not in reserved]


def with_accepted(fact: dict) -> dict:
    """The columns of a fact that a task needs."""
    accepted = [fact["answer"], *fact["aliases"]]
    return {"fact_id": fact["fact_id"], "question": fact["question"], "accepted": accepted}


def load_task(**_) -> dict:
    """The splits of the task, from the files beside this one: lm_eval reads paths from where it is started."""
    import json
    from pathlib import Path

    from datasets import Dataset

    def rows(name: str) -> Dataset:
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        return Dataset.from_list([json.loads(line) for line in text.split("\n") if line])

    return {"test": rows("questions.jsonl"), "fewshot": rows("exemplars.jsonl")}


def judge_answer(doc: dict, results: list[str]) -> dict[str, bool]:
    """Whether the answer to a question is right."""
    return {"exact_match": exact_match(results[0], doc["accepted"])}


def task_of(args: ExportArguments, num_fewshot: int, longest: int) -> dict:
    """The configuration of the task, without its functions. No form of an answer has more bytes than `longest`."""
    return {
        "task": args.task,
        "test_split": "test",
        **({"fewshot_split": "fewshot", "fewshot_config": {"sampler": "first_n"}} if num_fewshot else {}),
        "num_fewshot": num_fewshot,
        "output_type": "generate_until",
        "doc_to_text": question_prompt("{{question}}"),
        "doc_to_target": "accepted",
        "target_delimiter": " ",
        "fewshot_delimiter": "\n",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": max(32, longest + 8)},
        "filter_list": [{"name": "answer", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    }


if __name__ == "__main__":
    run_script(main, (ExportArguments, FactsArguments), __doc__)
