# SPDX-License-Identifier: Apache-2.0
"""
SLiCK: asks a model facts with several few-shot prompts, and finds out how well it knows each of them.

Input: a model and facts. The columns of the facts are relation, subject, question (or template) and answer; aliases
is optional. Output, in --output_dir: facts/facts.jsonl, the facts as they were read, and annotated/facts.jsonl, the
facts with the columns p_correct_greedy, p_correct_sampled, p_any_sample_correct and slick_category, without those that
served as exemplars in the prompts. Interrupted, it goes on with the same command.

    trl-selfdistill annotate --output_dir outputs/study \\
        --model_name_or_path embedded --fact_relations P17 P36 --max_facts_per_relation 500

    trl-selfdistill annotate --output_dir outputs/study \\
        --model_name_or_path Qwen/Qwen2.5-1.5B --facts my_facts.csv --slick_preset gekhman2024
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.studies.arguments import FactsArguments, SlickArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.facts.table import read_facts
from trl_selfdistill.studies.models import ModelArguments
from trl_selfdistill.studies.stages import annotate_stage, facts_stage, model_stage


@dataclass
class AnnotationArguments:
    """What the annotation needs beside the model, the facts and SLiCK's settings."""

    _argument_group_name = "run"

    output_dir: str = field(default="outputs/study", metadata={"help": "Folder of `facts` and `annotated`."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Whether to ask in bf16 autocast. By default where the device computes bf16 natively."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the exemplars and of the samples."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether to run code of the checkpoint."})


def main(
    args: AnnotationArguments, model_args: ModelArguments, facts_args: FactsArguments, slick_args: SlickArguments
) -> None:
    """Writes the annotated facts and prints how many are in each category."""
    output = Path(args.output_dir)
    facts = facts_stage(facts_args, output / "facts")
    model, _ = model_stage(model_args.model_name_or_path, output / "model", facts)
    annotated = annotate_stage(model, model_args, facts, slick_args, output / "annotated", args)
    if PartialState().is_main_process:
        categories = Counter(read_facts(annotated)["slick_category"])
        print(", ".join(f"{category}: {count}" for category, count in categories.most_common()))
        print(f"Annotated facts: {annotated}")


if __name__ == "__main__":
    run_script(main, (AnnotationArguments, ModelArguments, FactsArguments, SlickArguments), __doc__)
