# SPDX-License-Identifier: Apache-2.0
"""
Asks a checkpoint facts without exemplars, greedily, and counts the right answers.

Input: a model and facts, such as a split of build_training_mix.py. Output, in --output_dir: predictions.jsonl (a line
for each fact: fact_id, prediction, correct) and accuracy.json (the share of right answers overall, by relation and,
for annotated facts, by SLiCK category).

    accelerate launch --quiet scripts/evaluate_facts.py --model_name_or_path outputs/study/selfdistill \\
        --facts outputs/study/mix/heldout.jsonl --output_dir outputs/evaluation

    accelerate launch --quiet scripts/evaluate_facts.py --model_name_or_path Qwen/Qwen2.5-1.5B --bf16 \\
        --facts my_facts.csv --method score --output_dir outputs/evaluation
"""

import json

from accelerate import PartialState

from trl_selfdistill.studies.arguments import EvaluationArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.stages import ACCURACY_FILE, evaluate_stage


def main(args: EvaluationArguments) -> None:
    """Writes the predictions and prints the accuracy."""
    folder = evaluate_stage(args)
    if PartialState().is_main_process:
        accuracy = json.loads((folder / ACCURACY_FILE).read_text(encoding="utf-8"))
        rows = {"overall": accuracy.pop("overall")}
        rows |= {f"{column} {name}": row for column, groups in accuracy.items() for name, row in groups.items()}
        for name, row in rows.items():
            print(f"{name}: {row['accuracy']:.3f} of {row['num_facts']} facts")
        print(f"Evaluation: {folder}")


if __name__ == "__main__":
    run_script(main, (EvaluationArguments,), __doc__)
