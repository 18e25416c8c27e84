# SPDX-License-Identifier: Apache-2.0
"""Entropy-adaptive fine-tuning (EAFT, arXiv 2601.02151), as a rival."""

import math

from trl import SFTTrainer

from ...losses import IGNORE_INDEX


_TOP_K = 20  # the paper's


class EAFTSFTTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose cross-entropy is weighted, token by token, by the entropy of the model's 20 most likely
    tokens over its largest value, ln 20. The weight has no gradient: where the model is sure of another token than the
    label, as of a fact that it knows, it is left alone.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        labels = inputs["labels"][:, 1:]
        is_label = labels != IGNORE_INDEX
        log_probs = outputs.logits[:, :-1][is_label].float().log_softmax(-1)  # (num_label_tokens, vocab_size)
        nll = -log_probs.gather(-1, labels[is_label][:, None])[:, 0]
        top = log_probs.detach().topk(_TOP_K).values.log_softmax(-1)
        weights = -(top.exp() * top).sum(-1) / math.log(_TOP_K)  # (num_label_tokens,)
        loss = (weights * nll).sum() / (is_label.sum() if num_items_in_batch is None else num_items_in_batch)
        # It is of all processes then, over which DDP averages the gradients
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
