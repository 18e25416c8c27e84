# SPDX-License-Identifier: Apache-2.0
"""The metric's Space: answers and references one a line, aliases separated by `|`.

`evaluate.utils.launch_gradio_widget` of evaluate 0.4.6 is written for gradio 3 and fails with later ones.
"""

from pathlib import Path

import evaluate


METRIC = evaluate.load(str(Path(__file__).with_name("hallucination.py")))
EXAMPLES = [["France.\nI don't know\nChile", "France\nNorway\nPeru | Republic of Peru", ""]]


def score(predictions: str, references: str, baseline_predictions: str = "") -> dict:
    """The metric of texts with one answer a line; an empty line is an empty answer."""
    return METRIC.compute(
        predictions=predictions.split("\n"),
        references=[[alias.strip() for alias in line.split("|")] for line in references.split("\n")],
        baseline_predictions=baseline_predictions.split("\n") if baseline_predictions else None,
    )


def build_interface():
    """The page, which shows the metric card below the form."""
    import gradio

    card = Path(__file__).with_name("README.md").read_text(encoding="utf-8").split("---\n", 2)[2]

    def checked(*texts: str) -> dict:
        try:
            return score(*texts)
        except (TypeError, ValueError) as error:
            raise gradio.Error(str(error)) from error

    names = ("Predictions", "References (aliases separated by |)", "Predictions before fine-tuning (may be empty)")
    return gradio.Interface(
        checked,
        [gradio.Textbox(label=name, lines=5) for name in names],
        gradio.JSON(label="Result"),
        examples=EXAMPLES,
        title="Hallucination rate",
        description=METRIC.info.description,
        article=card,
    )


if __name__ == "__main__":
    build_interface().launch()
