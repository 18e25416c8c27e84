# SPDX-License-Identifier: Apache-2.0
"""
Why does fine-tuning on new facts make a model forget? Three hypotheses as experiments: capacity, behaviour cloning and
interference.

The model is annotated (SLiCK), learns the format on facts that it knows, and is then trained on synthetic facts whose
keys look like real names, or not at all, or to a chosen share. Output, in --output_dir: report.md with the prediction,
rule and verdict of each hypothesis, results.json, and the figures capacity.png, overlap.png and drift.png.
Interrupted, it goes on with the same command.

Configurations: mechanism_default, SmolLM2-135M out of a PyPI package, up to 300 synthetic facts;
mechanism_small_llama, a Llama of a few million parameters that learns the real facts from scratch first, up to 1,000;
mechanism_paper, the paper's size, for GPUs; mechanism_tiny, a test.

    trl-selfdistill mechanism --config mechanism_default

    trl-selfdistill mechanism --config mechanism_small_llama --output_dir outputs/mechanism_small
"""

from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.files import write_json
from trl_selfdistill.studies.arguments import check_shared_config
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.mechanism.report import plot_mechanism, render_mechanism_report, summarise
from trl_selfdistill.studies.mechanism.study import run_mechanism_study
from trl_selfdistill.studies.mechanism.variants import MechanismArguments
from trl_selfdistill.studies.stages import STUDY_ARGUMENTS, prepare_study


def main(study: MechanismArguments, *shared) -> None:
    """Runs the stages in their order and writes the report."""
    *_, config = shared
    check_shared_config(config)
    setup = prepare_study(*shared)
    output = Path(config.output_dir)
    results = run_mechanism_study(study, setup, output / "runs")

    if PartialState().is_main_process:
        text = f"{render_mechanism_report(results, setup.label)}\n{setup.precision}"
        figures = plot_mechanism(results, study, setup.label, output)
        images = "\n".join(f"![{file.stem}]({file.name})" for file in figures)
        (output / "report.md").write_text(f"{text}\n{images}\n", encoding="utf-8")
        write_json(output / "results.json", summarise(results))
        print(f"\n{text}\nReport: {output / 'report.md'}   figures: {', '.join(file.name for file in figures)}\n")


if __name__ == "__main__":
    run_script(main, (MechanismArguments, *STUDY_ARGUMENTS), __doc__)
