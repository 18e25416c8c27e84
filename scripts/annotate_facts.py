# SPDX-License-Identifier: Apache-2.0
"""
SLiCK: asks a model facts with several few-shot prompts, and finds out how well it knows each of them.

Input: a model and facts. The columns of the facts are relation, subject, question (or template) and answer; aliases
is optional. Output, in --output_dir: facts/facts.jsonl, the facts as they were read, and annotated/facts.jsonl, the
facts with the columns p_correct_greedy, p_correct_sampled, p_any_sample_correct and slick_category, without those that
served as exemplars in the prompts. Interrupted, it goes on with the same command.

    accelerate launch --quiet scripts/annotate_facts.py --output_dir outputs/study \\
        --fact_relations P17 P36 --max_facts_per_relation 500

    accelerate launch --quiet scripts/annotate_facts.py --output_dir outputs/study \\
        --model_name_or_path Qwen/Qwen2.5-1.5B --bf16 --facts my_facts.csv --slick_preset gekhman2024
"""

from collections import Counter
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.studies.arguments import AnnotationArguments, ModelAndFactsArguments, SlickArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.facts.table import load_facts
from trl_selfdistill.studies.stages import annotate_stage, facts_stage, model_stage


def main(args: AnnotationArguments, facts_args: ModelAndFactsArguments, slick_args: SlickArguments) -> None:
    """Writes the annotated facts and prints how many are in each category."""
    output = Path(args.output_dir)
    model = model_stage(facts_args.model_name_or_path, output / "model")
    facts = facts_stage(facts_args, output / "facts")
    annotated = annotate_stage(
        model, facts, slick_args, output / "annotated", args.bf16, args.seed, load_in_4bit=args.load_in_4bit
    )
    if PartialState().is_main_process:
        categories = Counter(load_facts(annotated)["slick_category"])
        print(", ".join(f"{category}: {count}" for category, count in categories.most_common()))
        print(f"Annotated facts: {annotated}")


if __name__ == "__main__":
    run_script(main, (AnnotationArguments, ModelAndFactsArguments, SlickArguments), __doc__)
