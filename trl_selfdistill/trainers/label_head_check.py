# SPDX-License-Identifier: Apache-2.0
"""A model's own logits are those of its last hidden states and its LM head, or the model is refused."""

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..parameters.structure import base_causal_lm
from ..slick.generation import evaluation_mode
from .sft_internals import LabelStates, lm_head_of


_TOKENS = range(3, 11)  # any will do


def check_label_head(model: torch.nn.Module, accelerator: Accelerator, name: str) -> None:
    """
    Compares the model's own logits of eight tokens with those that the loss is computed from. Under FSDP and DeepSpeed
    a collective, for a model that is sharded already.

    Args:
        model (`torch.nn.Module`): A model that [`add_label_head_forward`] was called on, on its device.
        accelerator ([`~accelerate.Accelerator`]): Its mixed precision is used, as in training.
        name (`str`): The trainer's argument that the model is, for the message.

    Raises:
        ValueError: If they differ: the family does more than scale, cap and project its last hidden states.
    """
    family = base_causal_lm(accelerator.unwrap_model(model, keep_torch_compile=False))
    refusal = (
        f"`{name}` is a {type(family).__name__}, which does more to its last hidden states than project, scale and cap "
        "them, so that the CE and KL computed from its LM head would be wrong (those of `SFTTrainer` are, too). Take "
        "a model of another family, or `kl_weight=0` and a `compute_loss_func`, which gets the model's own logits."
    )
    if family.get_output_embeddings() is None:
        raise ValueError(f"{refusal} It has no output embeddings.")
    device = family.get_input_embeddings().weight.device
    ids = torch.tensor([_TOKENS], device=device) % family.config.get_text_config().vocab_size
    with evaluation_mode(model), accelerator.autocast():
        expected = model(input_ids=ids, use_cache=False).logits
        logits, epsilon = model(input_ids=ids, labels=ids, use_cache=False, label_head=_head_logits)
    expected = expected[0, -1 - len(logits) : -1].to(logits)  # without virtual tokens of prompt learning
    largest = expected[expected.isfinite()].abs().max()
    tolerance = max(1e-3, 4 * epsilon) * largest.item()
    if not torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True):
        difference = (logits - expected).abs().max()
        raise ValueError(f"{refusal} On eight tokens they are off by {difference:.2g}, the largest is {largest:.2g}.")


def _head_logits(model: PreTrainedModel, states: LabelStates) -> tuple[torch.Tensor, float]:
    """The logits at the label positions, and the precision of the coarsest number on the way to them."""
    head = lm_head_of(model).map_tensors(
        lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    )
    device, hidden_states = head.weight.device, states.hidden_states.to(head.weight.device)
    dtypes = {hidden_states.dtype, head.weight.dtype}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return head.logits(hidden_states), max(torch.finfo(dtype).eps for dtype in dtypes)
