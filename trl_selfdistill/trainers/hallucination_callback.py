# SPDX-License-Identifier: Apache-2.0
"""How often a model hallucinates while it trains: it answers sets of questions, on all processes at once."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..hallucination.metric import RATES, check_references, score_hallucinations
from ..slick.generation import answer_prompts, evaluation_mode
from ..slick.prompts import answer_completion, question_prompt


def accepted_answers(facts: Iterable[dict], name: str) -> list[list[str]]:
    """
    For each row the texts that count as its answer: `answer` and `aliases` (a list), if any. A `ValueError` that names
    the argument `name` if there is no row, or one that a model could never answer.
    """
    rows = []
    for fact in facts:
        if not isinstance(fact.get("question"), str):
            raise ValueError(f"`{name}` has a row without a text as `question`: {fact}.")
        if isinstance(fact.get("aliases"), str):
            raise ValueError(f"`{name}` has a text as `aliases`. Make each a list of texts.")
        rows.append([fact.get("answer"), *(fact.get("aliases") or [])])
    try:
        for form in chain.from_iterable(check_references(rows)):
            answer_completion(form)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}`: {error}") from error
    return rows


def log_beside_training(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Sends `metrics` to the trainer's reporters and into its log history, and leaves the training's own log alone."""
    should_log = trainer.control.should_log
    with evaluation_mode(trainer.model):  # in which `log` leaves the pending training metrics alone
        trainer.log(dict(metrics))
    # The step's own log may be still to come, and any log takes back the order for it
    trainer.control.should_log = should_log


def answers_in_training(trainer: Trainer, prompts: Sequence[str], batch_size: int = 64, **settings) -> list[str]:
    """[`answer_prompts`] of a trainer's model in its precision, under DDP, FSDP2 and ZeRO-3 too. A collective."""
    accelerator = trainer.accelerator
    settings["batch_size"] = min(batch_size, -(-len(prompts) // accelerator.num_processes))  # a share for each
    model = accelerator.unwrap_model(trainer.model_wrapped)
    with accelerator.autocast():  # one around all forward passes: each by itself would cast all of the weights
        return answer_prompts(model, trainer.processing_class, prompts, title=None, **settings)


class HallucinationEvalCallback(TrainerCallback):
    """
    Lets the model answer sets of questions during training, and logs of each set `eval_<set>_accuracy`,
    `eval_<set>_hallucination_rate`, `eval_<set>_abstention_rate` (fractions that add up to 1) and
    `eval_<set>_forgetting` (the highest accuracy of the run so far, resumed or not, minus the present one).

    It runs before the first step, and with each evaluation of the trainer or, with `eval_strategy="no"`, at the end of
    each epoch. Under DDP, FSDP2 and ZeRO-3, not FSDP1, each process answers a share of the questions. The values are
    part of the trainer's evaluation: transformers can keep the best checkpoint by them and stop early:

    ```py
    args = SFTConfig(..., eval_strategy="epoch", save_strategy="best", load_best_model_at_end=True,
                     metric_for_best_model="heldout_accuracy")
    trainer = SelfDistillSFTTrainer(model, args, ..., eval_dataset=eval_dataset)
    trainer.add_callback(HallucinationEvalCallback(trainer, {"heldout": heldout, "new": new}))
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))  # after the callback that it reads from
    ```

    Args:
        trainer ([`~transformers.Trainer`]): The trainer to add the callback to, with `trainer.add_callback`.
        eval_sets (`dict[str, Dataset | list[dict]]`):
            By name, rows with `question`, `answer` and, if there are any, `aliases` (a list of texts).
        prompt_function (`Callable[[str], str | list[dict]]`, *optional*):
            Makes the prompt of a question, a text or a conversation in the form of the training data. Defaults to
            [`~trl_selfdistill.slick.prompts.question_prompt`].
        batch_size (`int`, *optional*, defaults to `64`): Questions generated at once, on each process.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer, in tokens.
        answer_rules (`dict`, *optional*):
            Options of [`~trl_selfdistill.hallucination.answer_outcome.AnswerJudge`], such as `{"match": "contains"}`.
        alphas (`Sequence[float]`, *optional*):
            Shares of the trained weights, such as `(0.4, 0.6, 0.8)`. At the end the sets are also asked with weights
            between those that this callback was made with, copied to the CPU, and the trained ones. The curve, logged
            as `eval_<set>_accuracy_alpha_0.4`, is for [`~trl_selfdistill.hub.interpolation.interpolate`].

    Raises:
        ValueError: If a set is empty, or a row has no question, no list as `aliases`, or a line break in an answer; if
            an alpha is not in [0, 1], or weights are to be mixed that are an adapter's or sharded.
    """

    def __init__(
        self,
        trainer: Trainer,
        eval_sets: dict[str, Dataset | list[dict]],
        *,
        prompt_function: Callable[[str], str | list[dict]] = question_prompt,
        batch_size: int = 64,
        max_new_tokens: int = 32,
        answer_rules: dict | None = None,
        alphas: Sequence[float] = (),
    ):
        if not isinstance(eval_sets, dict):
            raise TypeError(f"`eval_sets` is a {type(eval_sets).__name__}; it must be a dict of datasets by name")
        self.trainer = trainer
        self.eval_sets = eval_sets
        self.accepted = {name: accepted_answers(rows, f"eval_sets[{name!r}]") for name, rows in eval_sets.items()}
        self.prompts = {name: [prompt_function(row["question"]) for row in rows] for name, rows in eval_sets.items()}
        self.settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self.answer_rules = answer_rules or {}
        self.alphas, self._start = alphas, {}
        if not all(0 <= alpha <= 1 for alpha in alphas):
            raise ValueError(f"`alphas` are shares of the trained weights in [0, 1], got {alphas}.")
        if alphas:
            is_whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
            if hasattr(trainer.model, "peft_config") or not is_whole:
                raise ValueError("`alphas` mixes weights of a whole, full model. Leave it out, and interpolate later.")
            trained = ((name, p) for name, p in trainer.model.named_parameters() if p.requires_grad)
            self._start = {name: p.detach().to("cpu", copy=True) for name, p in trained}

    def on_train_begin(self, args, state, control, **kwargs):
        accuracies = {f"eval_{name}_accuracy" for name in self.eval_sets}
        if not args.eval_on_start and not any(accuracies & log.keys() for log in state.log_history):
            self._ask(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "no":
            self._ask(state)

    def on_train_end(self, args, state, control, model=None, **kwargs):  # with the best weights, if they are wanted
        if self.alphas:
            curve = self._curve(dict(model.named_parameters()))
            log_beside_training(self.trainer, curve)
            self.trainer.accelerator.print(curve)  # the progress bar, which shows what is logged, is closed by now

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        # A dict of evaluation datasets brings one event for each: the first stands for all
        datasets = self.trainer.eval_dataset
        later = list(datasets)[1:] if isinstance(datasets, dict) else []
        if not any(f"eval_{name}_runtime" in metrics for name in later):
            metrics.update(self._ask(state))

    @torch.no_grad()
    def _curve(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, float]:
        end = {name: parameters[name].detach().to("cpu", copy=True) for name in self._start}
        accuracies = {}
        for alpha in self.alphas:
            for name, start in self._start.items():
                parameters[name].copy_(torch.lerp(start.float(), end[name].float(), alpha))
            for name in self.eval_sets:
                accuracies[f"eval_{name}_accuracy_alpha_{alpha:g}"] = self._scores(name)["accuracy"]
        for name, trained in end.items():
            parameters[name].copy_(trained)
        return accuracies

    def _scores(self, name: str) -> dict[str, float]:
        answers = answers_in_training(self.trainer, self.prompts[name], **self.settings)
        return score_hallucinations(answers, self.accepted[name], **self.answer_rules)

    def _ask(self, state) -> dict[str, float]:
        metrics = {}
        for name in self.eval_sets:
            scores = self._scores(name)
            metrics |= {f"eval_{name}_{rate}": scores[rate] for rate in RATES}
            accuracies = [log.get(f"eval_{name}_accuracy", 0.0) for log in (*state.log_history, metrics)]
            metrics[f"eval_{name}_forgetting"] = max(accuracies) - scores["accuracy"]
        if metrics:
            log_beside_training(self.trainer, metrics)
        return metrics
