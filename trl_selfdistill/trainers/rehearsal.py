# SPDX-License-Identifier: Apache-2.0
"""Pseudo-rehearsal: the model answers prompts before training, and its own answers are trained on among the new rows.

No labels are needed. With the KL to the teacher it protects what the prompts ask for, where the new data never look.
Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal" (1995).
"""

import hashlib
import json
from pathlib import Path

from accelerate import Accelerator, DistributedType
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..losses import IGNORE_INDEX
from ..slick.generation import evaluation_mode, generate_tokens, generation_config
from ..slick.process_sharding import map_in_parallel, on_main_process
from .dataset_files import load_splits
from .model_identity import hash_model
from .sft_internals import tokenizer_of
from .teacher import refuse_empty_ranks


logger = logging.get_logger(__name__)

# In `output_dir`: a run that resumes takes the answers from there. `_*` is not pushed to the Hub
REHEARSAL_FILE = "_rehearsal.json"


def rehearse(trainer, prompts: Dataset | None) -> Dataset:
    """
    What the trainer's model answers to each prompt, greedily, as training rows of tokens. A collective: the processes
    share the prompts.

    Args:
        trainer ([`SelfDistillSFTTrainer`]): Before its teacher is made.
        prompts (`Dataset`, *optional*): With a column `prompt`, texts or conversations; other columns are not looked
            at. Defaults to the dataset of `args.rehearsal_dataset_name`.

    Returns:
        `Dataset` with `input_ids` (prompt and answer) and `labels` (the answer, `-100` at the prompt's tokens), in the
        order of `prompts`, without those whose answer was not over after `args.rehearsal_max_new_tokens` or was empty.

    Raises:
        ValueError: If there is no column `prompt`, no row, or no answer that ends, or the model is sharded.
    """
    _refuse_sharded(trainer.accelerator)
    model, tokenizer, args = trainer.model, tokenizer_of(trainer), trainer.args
    max_new_tokens = args.rehearsal_max_new_tokens
    token_ids = _tokenize(tokenizer, _load(args.rehearsal_dataset_name) if prompts is None else prompts)
    stop_ids = _stop_ids(model, tokenizer)
    stops = args.rehearsal_stop_strings
    given = [hash_model(model), token_ids, stop_ids, stops, max_new_tokens]
    key = hashlib.sha256(json.dumps(given).encode()).hexdigest()
    file = Path(args.output_dir) / REHEARSAL_FILE
    answers = on_main_process(lambda: _read(file, key))
    if answers is None:
        with trainer.accelerator.autocast():
            answers = _answer(model, tokenizer, token_ids, stop_ids, args)
        on_main_process(lambda: _write(file, key, answers))
    ended = [_ended(answer, tokenizer, stop_ids, stops or ()) for answer in answers]
    rows = [
        {"input_ids": ids + answer, "labels": [IGNORE_INDEX] * len(ids) + answer}
        for ids, answer in zip(token_ids, ended, strict=True)
        if answer is not None
    ]
    left_out = len(answers) - len(rows)
    if not rows:
        raise ValueError(
            f"`rehearsal_dataset`: none of the model's {len(answers)} answers has an end within "
            f"`rehearsal_max_new_tokens={max_new_tokens}`, or all are empty. Raise it, set "
            "`rehearsal_stop_strings`, or give prompts in the form that the model was trained to answer."
        )
    if left_out:
        logger.warning(
            f"`rehearsal_dataset`: {left_out} of the model's {len(answers)} answers are left out, as they are empty "
            f"or not over after `rehearsal_max_new_tokens={max_new_tokens}`."
        )
    return Dataset.from_list(rows)


def _refuse_sharded(accelerator: Accelerator) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        refuse_empty_ranks(accelerator)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "`rehearsal_dataset` is answered by the model before it is sharded, which DeepSpeed ZeRO-3 has done "
            "already. Use ZeRO-2 or FSDP, or add the model's answers to `train_dataset` yourself."
        )


def _load(name: str) -> Dataset:
    splits = load_splits(name)
    if "train" not in splits:
        raise ValueError(f"`rehearsal_dataset_name={name!r}` has no split `train`; it has {', '.join(splits)}.")
    return splits["train"]


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Dataset) -> list[list[int]]:
    if not isinstance(prompts, Dataset) or "prompt" not in prompts.column_names:
        is_dataset = isinstance(prompts, Dataset)
        found = f"the columns {prompts.column_names}" if is_dataset else f"a {type(prompts).__name__}"
        raise ValueError(f"`rehearsal_dataset` must be a `datasets.Dataset` with a column `prompt`, got {found}.")
    if len(prompts) == 0:
        raise ValueError("`rehearsal_dataset` has no rows. Give some prompts, or leave it out.")
    if isinstance(prompts[0]["prompt"], str):
        return tokenizer(list(prompts["prompt"]))["input_ids"]
    conversations = list(prompts["prompt"])
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)["input_ids"]


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *configured] if token is not None})


def _answer(model, tokenizer, token_ids, stop_ids, args) -> list[list[int]]:
    config = generation_config(None, 1.0, None, args.rehearsal_max_new_tokens, stop_ids)
    config.stop_strings = args.rehearsal_stop_strings
    batch_size = args.per_device_eval_batch_size
    # Prompts of like length share a batch (little padding); the longest come first, so that memory runs out at once
    order = sorted(range(len(token_ids)), key=lambda i: (-len(token_ids[i]), i))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    with evaluation_mode(model):
        written = map_in_parallel(
            lambda batch: generate_tokens(model, [token_ids[i] for i in batch], config, tokenizer=tokenizer), batches
        )
    answers: list[list[int]] = [[] for _ in token_ids]
    for batch, texts in zip(batches, written, strict=True):
        for i, answer in zip(batch, texts, strict=True):
            answers[i] = answer
    return answers


def _ended(answer: list[int], tokenizer, stop_ids: list[int], stop_strings: list[str]) -> list[int] | None:
    """The answer with the token that ends it; up to a stop string, with the end of sequence. `None` without an end."""
    for end in range(1, len(answer) + 1) if stop_strings else ():
        text = tokenizer.decode(answer[:end], skip_special_tokens=True)
        starts = [text.index(string) for string in stop_strings if string in text]
        if starts:  # within a token that has a part of the answer too, it cannot be cut off
            kept = answer[: end - 1]
            whole = tokenizer.decode(kept, skip_special_tokens=True) == text[: min(starts)]
            return [*kept, tokenizer.eos_token_id] if kept and whole else None
    return answer if len(answer) > 1 and answer[-1] in stop_ids else None


def _read(file: Path, key: str) -> list[list[int]] | None:
    """The answers of an earlier start of this run, `None` if there are none, or of another model or other prompts."""
    if not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["answers"] if kept["sha256"] == key else None


def _write(file: Path, key: str, answers: list[list[int]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")  # a run killed here leaves no half of a file under the name
    partial.write_text(json.dumps({"sha256": key, "answers": answers}), encoding="utf-8")
    partial.replace(file)
