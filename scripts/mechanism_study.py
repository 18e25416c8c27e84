# SPDX-License-Identifier: Apache-2.0
"""
Why does fine-tuning on new facts make a model forget? Three hypotheses as experiments: capacity, behaviour cloning and
interference.

The model is annotated (SLiCK), learns the format on facts that it knows, and is then trained on synthetic facts whose
keys look like real names, or not at all, or to a chosen share. Output, in --output_dir: report.md with the prediction,
rule and verdict of each hypothesis, results.json, and the figures capacity.png, overlap.png, drift.png and
tradeoff.png. Interrupted, it goes on with the same command.

--preset default: SmolLM2-135M out of a PyPI package, up to 1,000 facts. small_llama: a Llama of a few million
parameters that learns the real facts from scratch first, up to 100,000. paper: the paper's size, for GPUs. tiny: a
test.

    accelerate launch --quiet scripts/mechanism_study.py --preset default

    accelerate launch --quiet scripts/mechanism_study.py --preset small_llama --output_dir outputs/mechanism_small
"""

import json
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill import SelfDistillSFTConfig
from trl_selfdistill.studies.arguments import ModelAndFactsArguments, SlickArguments, Stage1Arguments
from trl_selfdistill.studies.checks import check_shared_config
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.mechanism.conditions import MechanismArguments
from trl_selfdistill.studies.mechanism.plots import plot_mechanism
from trl_selfdistill.studies.mechanism.report import render_mechanism_report, summarise
from trl_selfdistill.studies.mechanism.study import MechanismInputs, run_mechanism_study
from trl_selfdistill.studies.small_llama import ModelKindArguments, SmallLlamaSettings
from trl_selfdistill.studies.stages import annotate_stage, facts_stage, mix_stage, stage1_stage, start_model_stage
from trl_selfdistill.studies.training_mix import MixSettings


CONFIGS = Path(__file__).parent / "configs"
PRESETS = {name: CONFIGS / f"mechanism_{name}.yaml" for name in ("default", "small_llama", "paper", "tiny")}


def main(
    study: MechanismArguments,
    facts_args: ModelAndFactsArguments,
    kind: ModelKindArguments,
    slick_args: SlickArguments,
    mix_settings: MixSettings,
    small_llama: SmallLlamaSettings,
    stage1_args: Stage1Arguments,
    config: SelfDistillSFTConfig,
) -> None:
    """Runs the stages in their order and writes the report."""
    check_shared_config(config)
    output = Path(config.output_dir)

    # 1. The model, what it knows, and the facts to keep
    facts = facts_stage(facts_args, output / "facts")
    model, label = start_model_stage(facts_args, kind, small_llama, facts, output / "model")
    annotated = annotate_stage(model, facts, slick_args, output / "annotated", config.bf16, config.seed)
    mix = mix_stage(annotated, mix_settings, output / "mix", seed=config.seed)

    # 2. Format learning on Known facts: the start of every run
    stage1 = stage1_stage(stage1_args, config, model, mix, output / "stage1")

    # 3. The runs
    inputs = MechanismInputs(str(stage1), annotated, mix, config)
    results = run_mechanism_study(study, inputs, output / "runs")

    # 4. The report
    if PartialState().is_main_process:
        text = render_mechanism_report(results, label)
        figures = plot_mechanism(results, study, label, output)
        images = "\n".join(f"![{file.stem}]({file.name})" for file in figures)
        (output / "report.md").write_text(f"{text}\n{images}\n", encoding="utf-8")
        summary = json.dumps(summarise(results), indent=2, ensure_ascii=False)
        (output / "results.json").write_text(summary + "\n", encoding="utf-8")
        print(f"\n{text}\nReport: {output / 'report.md'}   figures: {', '.join(file.name for file in figures)}\n")


if __name__ == "__main__":
    types = (MechanismArguments, ModelAndFactsArguments, ModelKindArguments, SlickArguments, MixSettings)
    run_script(main, (*types, SmallLlamaSettings, Stage1Arguments, SelfDistillSFTConfig), __doc__, PRESETS)
