# SPDX-License-Identifier: Apache-2.0
"""The hallucination metric for `evaluate`: a thin shim over `trl_selfdistill.hallucination.score_hallucinations`."""

import datasets
import evaluate

from trl_selfdistill.hallucination import score_hallucinations
from trl_selfdistill.hallucination.metric import check_references, check_texts


_DESCRIPTION = """\
A hallucination is a wrong answer given as if it were right. Each answer to a question of fact is correct (it matches
the reference or an alias but for case, punctuation and articles), abstained ("I don't know", in eighteen languages) or
hallucinated. With the answers from before fine-tuning it tells what fine-tuning broke (forgetting, induced
hallucinations) and what it taught.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): The model's answers.
    references (`list`): For each the accepted answer, or a list of it and its aliases; the two may be mixed.
    baseline_predictions (`list[str]`, *optional*): What the model answered before fine-tuning.
    categories (`list[str]`, *optional*): SLiCK categories: HighlyKnown, MaybeKnown, WeaklyKnown or Unknown.
    relations (`list[str]`, *optional*): Another group of each fact, for example its relation.
    questions (`list[str]`, *optional*): The questions, shown with `detailed`.
    match (`str`, defaults to `"exact"`): `"contains"` looks for the reference among the words of the answer.
    squad (`bool`, defaults to `False`): Normalise as SQuAD's script does, to the letter.
    strip_accents (`bool`, defaults to `False`): "São Tomé" is "Sao Tome".
    exact_numbers (`bool`, defaults to `False`): "17.89" is not "1789"; for SQuAD's script it is.
    abstention_patterns (`list[str]`, *optional*): Regular expressions in place of the list of the package.
    detailed (`bool`, defaults to `False`): Whether to add `tables` and `examples`.

Returns:
    A flat dict of fractions in [0, 1], each with the ends of its 95 % interval, `<name>_ci_low` and `<name>_ci_high`;
    `None` for a share of nothing.
    `hallucination_rate`, `accuracy`, `abstention_rate`, `f1`, `num_predictions`, `omniscience_index` (in [-1, 1]),
    `correct_given_attempted`, `f_score` (without an interval); with a baseline `baseline_accuracy`,
    `forgetting_rate`, `induced_hallucination_rate`, `acquisition_rate`, `net_change` (in [-1, 1]), `mcnemar_p_value`;
    with categories `factual_stability`, `factual_plasticity`; with groups `category/<name>/<rate>` and
    `relation/<name>/<rate>`.

Examples:
    >>> import evaluate
    >>> from trl_selfdistill.files import shipped
    >>> hallucination = evaluate.load(str(shipped("evaluate_metrics/hallucination")))
    >>> predictions = ["France.", "I don't know", "Chile", "Japan"]
    >>> references = ["France", "Norway", ["Peru", "Republic of Peru"], "Japan"]
    >>> scores = hallucination.compute(predictions=predictions, references=references)
    >>> scores["hallucination_rate"], scores["accuracy"], scores["abstention_rate"]
    (0.25, 0.5, 0.25)

    What fine-tuning broke, and what it taught:

    >>> before = ["France", "Norway", "Peru", "China"]
    >>> scores = hallucination.compute(
    ...     predictions=predictions, references=references, baseline_predictions=before
    ... )
    >>> round(scores["forgetting_rate"], 2), round(scores["induced_hallucination_rate"], 2), scores["acquisition_rate"]
    (0.67, 0.33, 1.0)
"""

_CITATION = """\
@article{finetuning_hallucinations_2026,
    title = {Why Fine-Tuning Encourages Hallucinations and How to Fix It},
    journal = {arXiv preprint arXiv:2604.15574},
    year = {2026},
    url = {https://arxiv.org/abs/2604.15574}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Hallucination(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2604.15574", "https://arxiv.org/abs/2405.05904"],
        )

    def add(self, *, prediction=None, reference=None, **columns):
        """Adds one answer. See `add_batch`."""
        row = {"predictions": prediction, "references": reference} | columns  # `evaluate.combine` names the columns
        self.add_batch(**{name: [value] for name, value in row.items()})

    def add_batch(self, *, predictions=None, references=None, **columns):
        """Adds answers, after checking all of them: a batch with a bad row adds nothing."""
        # Arrow would silently write a list among strings as its text, "['Peru']": strings become lists here
        predictions, references = check_texts(predictions, "predictions"), check_references(references)
        if len(predictions) != len(references):
            raise ValueError(f"`references` has {len(references)} rows and `predictions` {len(predictions)}")
        super().add_batch(predictions=predictions, references=references, **columns)  # which refuses other columns

    def compute(self, *, predictions=None, references=None, **options):
        """Scores the answers given here, or else those that were added."""
        if predictions is None and references is None and self.writer is None:
            raise ValueError("Nothing to score: pass `predictions` and `references`, or call `add_batch` first.")
        return super().compute(predictions=predictions, references=references, **options)

    def _compute(self, predictions, references, **options):
        return score_hallucinations(predictions, references, **options)
