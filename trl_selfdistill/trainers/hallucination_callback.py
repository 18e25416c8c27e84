# SPDX-License-Identifier: Apache-2.0
"""How often a model hallucinates while it trains: it answers sets of questions, on all processes at once.

The values are added to those of the trainer's own evaluation, so that what transformers does with an evaluation
(`metric_for_best_model`, `load_best_model_at_end`, `save_strategy="best"`, `EarlyStoppingCallback`) works with them.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer, TrainerCallback

from ..hallucination.answer_outcome import AnswerJudge
from ..hallucination.metric import RATES, score_hallucinations
from ..slick.generation import predict_answers
from ..slick.prompts import question_prompt
from .callback_logging import log_beside_training


def predict_answers_in_parallel(
    model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, synced_gpus: bool = False, **settings
) -> list[str]:
    """
    The greedy answer to each prompt, each process answering its share. A collective: call it on every process.

    Args:
        model ([`~transformers.PreTrainedModel`]): Causal language model, without a DDP or DeepSpeed wrapper.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence[str]`): The prompts, the same on every process.
        synced_gpus (`bool`, *optional*, defaults to `False`): Whether the processes share the weights.
        settings: Further settings of [`~trl_selfdistill.slick.generation.predict_answers`].

    Returns:
        `list[str]`: The answers in the order of the prompts, on every process.
    """
    # Padded to as many prompts for each process: with sharded weights, every forward pass is a collective
    with PartialState().split_between_processes(list(range(len(prompts))), apply_padding=True) as rows:
        share = [prompts[i] for i in rows]
        answers = predict_answers(model, tokenizer, share, synced_gpus=synced_gpus, **settings)
        answered = dict(gather_object([(i, answer) for i, [answer] in zip(rows, answers, strict=True)]))
    return [answered[i] for i in range(len(prompts))]


def _unsharded_root(model_wrapped, accelerator: Accelerator):
    """FSDP1 keeps some weights (embeddings, LM head) in its root, which `generate` of the inner model bypasses."""
    if accelerator.distributed_type == DistributedType.FSDP and isinstance(model_wrapped, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model_wrapped, recurse=False, writeback=False)
    return nullcontext()


class HallucinationEvalCallback(TrainerCallback):
    """
    Lets the model answer sets of questions during training, and logs of each set `eval_<set>_accuracy`,
    `eval_<set>_hallucination_rate`, `eval_<set>_abstention_rate` (fractions that add up to 1) and
    `eval_<set>_forgetting` (the highest accuracy of the run so far minus the present one).

    It runs before the first step, and with each evaluation of the trainer; with `eval_strategy="no"`, at the end of
    each epoch instead. The peak is read from the trainer's log history: a resumed run goes on with it.

    To keep the best checkpoint and stop early, use what transformers has:

    ```py
    args = SFTConfig(..., eval_strategy="epoch", save_strategy="best", load_best_model_at_end=True,
                     metric_for_best_model="heldout_accuracy")
    trainer = SelfDistillSFTTrainer(model, args, ..., eval_dataset=eval_dataset)
    trainer.add_callback(HallucinationEvalCallback(trainer, {"heldout": heldout, "new": new}))
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))  # after the callback that it reads from
    ```

    Under DDP, FSDP and ZeRO-3 each process answers a share of the questions; the main one scores. ZeRO-3 gathers each
    layer as it is needed, which is slow and takes no memory for a whole copy. Tested are DDP runs and generation from
    FSDP2 shards, on two CPU processes; runs under FSDP1 and ZeRO-3 have not been made.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose model is evaluated. Add the callback to it with `trainer.add_callback`.
        eval_sets (`dict[str, Dataset]`):
            By name, tables with the columns `question`, `answer` and, if there are any, `aliases` (lists of strings).
            With no set, the callback does nothing.
        prompt_function (`Callable[[str], str]`, *optional*):
            Makes the prompt of a question. The answer is the first line of what the model writes. Defaults to
            [`~trl_selfdistill.slick.prompts.question_prompt`].
        batch_size (`int`, *optional*, defaults to `64`): Questions generated at once, on each process.
        max_new_tokens (`int`, *optional*, defaults to `32`): Longest answer, in tokens.
        answer_rules (`dict`, *optional*):
            Options of [`~trl_selfdistill.hallucination.answer_outcome.AnswerJudge`], for example
            `{"match": "contains"}`.

    Raises:
        `ValueError`: If a set is empty or lacks a column, or an `EarlyStoppingCallback` was added before this one.
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
        AnswerJudge(**self.answer_rules)  # a wrong rule is an error now, not after the first epoch
        for name, rows in eval_sets.items():
            missing = {"question", "answer"} - set(rows.column_names)
            if missing:
                raise ValueError(f"`eval_sets[{name!r}]` has no column {sorted(missing)}; it has {rows.column_names}")
            if not len(rows):
                raise ValueError(f"`eval_sets[{name!r}]` is empty; leave the set out")

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.eval_sets:
            return
        callbacks = self.trainer.callback_handler.callbacks
        if any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks[: callbacks.index(self)]):
            raise ValueError(
                "EarlyStoppingCallback was added before HallucinationEvalCallback, so that it would not see its "
                "metrics. Add it after this one, with `trainer.add_callback`."
            )
        first = f"eval_{next(iter(self.eval_sets))}_accuracy"
        if not args.eval_on_start and not any(first in log for log in state.log_history):
            self._evaluate(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.eval_sets and args.eval_strategy == "no":
            self._evaluate(state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        # A dict of evaluation datasets brings one event for each: the first stands for all
        datasets = self.trainer.eval_dataset
        later = list(datasets)[1:] if isinstance(datasets, dict) else []
        if self.eval_sets and not any(f"eval_{name}_runtime" in metrics for name in later):
            metrics.update(self._evaluate(state))

    def _evaluate(self, state) -> dict[str, float]:
        metrics = {}
        for name, rows in self.eval_sets.items():
            scores = self._scores(rows)
            metrics |= {f"eval_{name}_{rate}": scores[rate] for rate in RATES}
            accuracy = f"eval_{name}_accuracy"
            peak = max([metrics[accuracy], *(log[accuracy] for log in state.log_history if accuracy in log)])
            metrics[f"eval_{name}_forgetting"] = peak - metrics[accuracy]
        log_beside_training(self.trainer, metrics)
        return metrics

    def _scores(self, rows: Dataset) -> dict[str, float]:
        accelerator = self.trainer.accelerator
        wrapped = self.trainer.model_wrapped
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        # One autocast around all forward passes: each by itself would cast all of the weights anew
        with accelerator.autocast(), _unsharded_root(wrapped, accelerator):
            predictions = predict_answers_in_parallel(
                accelerator.unwrap_model(wrapped),
                self.trainer.processing_class,
                [self.prompt_function(question) for question in rows["question"]],
                synced_gpus=sharded and accelerator.num_processes > 1,
                **self.settings,
            )
        scores = [None]
        if accelerator.is_main_process:
            aliases = rows["aliases"] if "aliases" in rows.column_names else [[]] * len(rows)
            references = [[answer, *(forms or [])] for answer, forms in zip(rows["answer"], aliases, strict=True)]
            scores = [score_hallucinations(predictions, references, resamples=0, **self.answer_rules)]
        return broadcast_object_list(scores)[0]
