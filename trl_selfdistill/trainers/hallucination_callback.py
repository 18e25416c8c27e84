# SPDX-License-Identifier: Apache-2.0
"""How often a model hallucinates while it trains: it answers sets of questions, on all processes at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..hallucination.metric import RATES, score_hallucinations
from ..slick.generation import evaluation_mode, predict_answers
from ..slick.prompts import question_prompt


def log_beside_training(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Sends `metrics` to the trainer's reporters and into its log history, and leaves the training's own log alone."""
    should_log = trainer.control.should_log
    with evaluation_mode(trainer.model):  # in which `log` leaves the pending training metrics alone
        trainer.log(dict(metrics))
    # The step's own log may be still to come, and any log takes back the order for it
    trainer.control.should_log = should_log


def predict_answers_in_parallel(
    model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], **settings
) -> list[str]:
    """
    The greedy answers to `prompts`. A collective: call it on every process. Each answers a share of the prompts, and
    all get all answers.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model, without a DDP or DeepSpeed wrapper.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence[str]`): The prompts, the same on every process.
        settings: Other arguments of [`~trl_selfdistill.slick.generation.predict_answers`].
    """
    # Padded to as many prompts for each process: with sharded weights, every forward pass is a collective
    with PartialState().split_between_processes(list(range(len(prompts))), apply_padding=True) as rows:
        answers = predict_answers(model, tokenizer, [prompts[i] for i in rows], **settings)
        answered = dict(gather_object([(i, answer) for i, [answer] in zip(rows, answers, strict=True)]))
    return [answered[i] for i in range(len(prompts))]


@contextmanager
def kept_casts(model: torch.nn.Module) -> Iterator[None]:
    """
    Inside, on a CPU, autocast casts frozen weights once, as it does those that are trained, and not in each forward
    pass, of which generation makes one a token. Without gradients only.
    """
    frozen = [
        p for p in model.parameters() if p.device.type == "cpu" and p.is_floating_point() and not p.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad = True  # autocast keeps the casts of these alone
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def answers_in_training(trainer: Trainer, prompts: Sequence[str], **settings) -> list[str]:
    """
    The greedy answers of a trainer's model, in its precision. A collective.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer. Under DDP, FSDP2 and ZeRO-3 each process asks a share.
        prompts (`Sequence[str]`): The prompts, the same on every process.
        settings: Other arguments of [`~trl_selfdistill.slick.generation.predict_answers`].
    """
    accelerator = trainer.accelerator
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    settings["synced_gpus"] = sharded and accelerator.num_processes > 1
    model = accelerator.unwrap_model(trainer.model_wrapped)
    # One around all forward passes: each by itself would cast all of the weights
    with accelerator.autocast(), kept_casts(model):
        return predict_answers_in_parallel(model, trainer.processing_class, prompts, **settings)


class HallucinationEvalCallback(TrainerCallback):
    """
    Lets the model answer sets of questions during training, and logs of each set `eval_<set>_accuracy`,
    `eval_<set>_hallucination_rate`, `eval_<set>_abstention_rate` (fractions that add up to 1) and
    `eval_<set>_forgetting` (the highest accuracy of the run so far minus the present one).

    It runs before the first step, and with each evaluation of the trainer; with `eval_strategy="no"`, at the end of
    each epoch instead. The peak is read from the log history, also of a resumed run. The values are part of the
    trainer's evaluation, so that transformers can keep the best checkpoint by them and stop early:

    ```py
    args = SFTConfig(..., eval_strategy="epoch", save_strategy="best", load_best_model_at_end=True,
                     metric_for_best_model="heldout_accuracy")
    trainer = SelfDistillSFTTrainer(model, args, ..., eval_dataset=eval_dataset)
    trainer.add_callback(HallucinationEvalCallback(trainer, {"heldout": heldout, "new": new}))
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))  # after the callback that it reads from
    ```

    Under DDP, FSDP2 and ZeRO-3 each process answers a share of the questions. FSDP1 is not supported.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer to add the callback to, with `trainer.add_callback`.
        eval_sets (`dict[str, Dataset]`):
            By name, tables with the columns `question`, `answer` and, if there are any, `aliases` (lists of texts).
        prompt_function (`Callable[[str], str]`, *optional*):
            Makes the prompt of a question. Defaults to [`~trl_selfdistill.slick.prompts.question_prompt`].
        batch_size (`int`, *optional*, defaults to `64`): Questions generated at once, on each process.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer, in tokens.
        answer_rules (`dict`, *optional*):
            Options of [`~trl_selfdistill.hallucination.answer_outcome.AnswerJudge`], such as `{"match": "contains"}`.

    Raises:
        ValueError: If the `aliases` of a set are not lists. When training starts, if an `EarlyStoppingCallback` was
            added before this callback.
    """

    def __init__(
        self,
        trainer: Trainer,
        eval_sets: dict[str, Dataset],
        *,
        prompt_function: Callable[[str], str] = question_prompt,
        batch_size: int = 64,
        max_new_tokens: int = 32,
        answer_rules: dict | None = None,
    ):
        self.trainer = trainer
        self.eval_sets = eval_sets
        self.prompt_function = prompt_function
        self.settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self.answer_rules = answer_rules or {}
        for name, rows in eval_sets.items():
            if "aliases" in rows.column_names and any(isinstance(aliases, str) for aliases in rows["aliases"]):
                raise ValueError(f"`eval_sets[{name!r}]` has a text as `aliases`. Make each a list of texts.")

    def on_train_begin(self, args, state, control, **kwargs):
        callbacks = self.trainer.callback_handler.callbacks
        if any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError(
                "EarlyStoppingCallback was added before HallucinationEvalCallback, so that it would not see its "
                "metrics. Add it after this one, with `trainer.add_callback`."
            )
        accuracies = {f"eval_{name}_accuracy" for name in self.eval_sets}
        if not args.eval_on_start and not any(accuracies & log.keys() for log in state.log_history):
            self._ask(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "no":
            self._ask(state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        # A dict of evaluation datasets brings one event for each: the first stands for all
        datasets = self.trainer.eval_dataset
        later = list(datasets)[1:] if isinstance(datasets, dict) else []
        if not any(f"eval_{name}_runtime" in metrics for name in later):
            metrics.update(self._ask(state))

    def _ask(self, state) -> dict[str, float]:
        metrics = {}
        for name, rows in self.eval_sets.items():
            aliases = rows["aliases"] if "aliases" in rows.column_names else [[]] * len(rows)
            references = [[answer, *(forms or [])] for answer, forms in zip(rows["answer"], aliases, strict=True)]
            prompts = [self.prompt_function(question) for question in rows["question"]]
            answers = answers_in_training(self.trainer, prompts, **self.settings)
            scores = score_hallucinations(answers, references, **self.answer_rules)
            metrics |= {f"eval_{name}_{rate}": scores[rate] for rate in RATES}
            accuracies = [log.get(f"eval_{name}_accuracy", 0.0) for log in (*state.log_history, metrics)]
            metrics[f"eval_{name}_forgetting"] = max(accuracies) - scores["accuracy"]
        if metrics:
            log_beside_training(self.trainer, metrics)
        return metrics
