# SPDX-License-Identifier: Apache-2.0
"""
Asks a checkpoint facts without exemplars, greedily, and counts the answers that are right, hallucinated or none.

Input: a model and facts, such as a split of `mix`. Output, in --output_dir: predictions.jsonl (a line for each fact:
fact_id, prediction, outcome) and accuracy.json (accuracy, hallucination rate and abstention rate overall, by relation
and, for annotated facts, by SLiCK category).

    trl-selfdistill evaluate --model_name_or_path outputs/study/selfdistill \\
        --facts outputs/study/mix/heldout.jsonl --output_dir outputs/evaluation

    trl-selfdistill evaluate --model_name_or_path Qwen/Qwen2.5-1.5B \\
        --facts my_facts.csv --batch_size 256 --output_dir outputs/evaluation
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from trl_selfdistill.files import read_json, write_json, write_jsonl
from trl_selfdistill.hallucination import RATES
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.fact_accuracy import ask_facts
from trl_selfdistill.studies.facts.table import load_facts
from trl_selfdistill.studies.models import ModelArguments, model_identity, model_to_ask
from trl_selfdistill.studies.stage import run_stage


@dataclass
class EvaluationArguments:
    """Which facts a checkpoint is asked, and how."""

    _argument_group_name = "evaluation"

    facts: str = field(
        metadata={"help": "Facts: a JSONL or CSV file, such as a split of a mix, a folder, or a dataset on the Hub."}
    )
    facts_split: str = field(default="train", metadata={"help": "Split of a dataset to read the facts from."})
    batch_size: int = field(default=64, metadata={"help": "Sequences in one forward pass."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest answer, in tokens."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to ask in bf16 autocast. By default where the device computes bf16 natively."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code of the checkpoint."})
    output_dir: str = field(
        default="outputs/evaluation", metadata={"help": "Folder of `predictions.jsonl` and `accuracy.json`."}
    )


def main(args: EvaluationArguments, model_args: ModelArguments) -> None:
    """Writes the predictions and prints the accuracy."""

    def evaluate(folder: Path) -> None:
        facts = load_facts(args.facts, args.facts_split)
        how = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
        with model_to_ask(model_args.model_name_or_path, model_args, args.bf16, args.trust_remote_code) as asked:
            answers = ask_facts(*asked, facts, progress_file=folder / "progress.jsonl", **how)
        predictions = [
            {"fact_id": fact_id, "prediction": answer.text, "outcome": answer.outcome}
            for fact_id, answer in answers.items()
        ]
        if PartialState().is_main_process:
            write_jsonl(folder / "predictions.jsonl", predictions)
            write_json(folder / "accuracy.json", accuracy_by_group(facts, predictions))

    identity, inputs = model_identity(model_args.model_name_or_path, model_args)
    settings = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    inputs += [args.facts] if Path(args.facts).exists() else []
    folder = run_stage(Path(args.output_dir), settings | identity, inputs, evaluate, every_process=True)
    if PartialState().is_main_process:
        for column, groups in read_json(folder / "accuracy.json").items():
            for name, row in groups.items():
                group = name if name == column else f"{column} {name}"
                shares = ", ".join(f"{rate.replace('_', ' ')} {row[rate]:.3f}" for rate in RATES)
                print(f"{group}: {shares} of {row['num_facts']} facts")
        print(f"Evaluation: {folder}")


def accuracy_by_group(facts: Dataset, predictions: list[dict]) -> dict[str, dict]:
    """
    The metric's rates `overall`, by `relation` and, where the facts are annotated, by `slick_category`: for each group
    fractions in [0, 1], and `num_facts`.
    """
    outcomes = [prediction["outcome"] for prediction in predictions]
    rates = {rate: [outcome == of_rate for outcome in outcomes] for rate, of_rate in RATES.items()}
    table = facts.to_pandas().assign(overall="overall", num_facts=1, **rates)
    columns = [column for column in ("overall", "relation", "slick_category") if column in table]
    how = dict.fromkeys(RATES, "mean") | {"num_facts": "size"}
    return {column: table.groupby(column).agg(how).to_dict("index") for column in columns}


if __name__ == "__main__":
    run_script(main, (EvaluationArguments, ModelArguments), __doc__)
