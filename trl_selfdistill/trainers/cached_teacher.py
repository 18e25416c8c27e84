# SPDX-License-Identifier: Apache-2.0
"""A teacher that has answered before training: its last hidden states come from disk, and the model is gone."""

from bisect import bisect_right

import torch

from ..losses import IGNORE_INDEX, LMHead, ModelSide
from .hidden_state_cache import HiddenStateCache
from .teacher import Teacher
from .teacher_rows import TEACHER_ROWS


class CachedTeacher(Teacher):
    """
    The hidden states that a teacher had, and its LM head: with both the KL is that over the whole vocabulary.

    Args:
        sha256 (`str`): Hash of the teacher's weights, as [`Teacher`] has it.
        lm_head ([`~trl_selfdistill.losses.LMHead`]): Its head, which nothing else may move.
        caches (`list[HiddenStateCache]`): One for each dataset; their rows are numbered through.
    """

    def __init__(self, sha256: str, lm_head: LMHead, caches: list[HiddenStateCache]):
        self.sha256 = sha256
        self._lm_head = lm_head
        self._caches = caches
        self._first_rows = [0]
        for cache in caches:
            self._first_rows.append(self._first_rows[-1] + len(cache.num_tokens))

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        """
        As [`Teacher.targets`]; takes `teacher_rows` out of `inputs`.

        Raises:
            ValueError: If the batch is of a dataset that was not there when the teacher was run, or its labels are not
                those that it was run on.
        """
        if TEACHER_ROWS not in inputs:
            raise ValueError(
                "With `precompute_teacher=True` the teacher has seen the datasets that the trainer was made with, and "
                "this batch is of another one. Pass it as `eval_dataset` when the trainer is made, or leave "
                "`precompute_teacher` unset."
            )
        rows = inputs.pop(TEACHER_ROWS).tolist()
        dataset = bisect_right(self._first_rows, rows[0]) - 1
        hidden_states, labels = self._caches[dataset].read([row - self._first_rows[dataset] for row in rows])
        weight = self._lm_head.weight
        shift_labels = inputs["labels"][:, 1:]
        shift_labels = shift_labels[shift_labels != IGNORE_INDEX]
        if not torch.equal(labels.to(shift_labels), shift_labels):
            raise ValueError(
                "The labels of this batch are not those that the teacher was run on. With `precompute_teacher=True`, "
                "`data_collator` must make the same tokens and labels of a row each time, and keep the rows' order."
            )
        return ModelSide(hidden_states.to(weight.device, weight.dtype), self._lm_head)
