# SPDX-License-Identifier: Apache-2.0
"""What is computed from a model's LM head at the label positions, and whether it is what the model computes itself."""

import functools

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..losses import CEKLOutput, LMHead, ModelSide, linear_ce_kl
from ..parameters.structure import base_causal_lm
from ..slick.generation import evaluation_mode
from .sft_internals import LabelStates


_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere; Muse Glimmer; Falcon-H1
# Gemma; RecurrentGemma and xLSTM, whose names TRL does not know
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_TOKENS = range(3, 11)  # to compare logits on: any will do


def lm_head_of(model: PreTrainedModel) -> LMHead:
    """
    The LM head of a causal language model with the logit post-processing of its architecture, read from its config
    under the names that TRL's `add_fused_lm_head` knows. FSDP2 shards stay shards: `linear_ce_kl` gathers them.
    """
    config = model.config.get_text_config()
    scales, softcaps = ([getattr(config, name, None) for name in names] for names in (_SCALES, _SOFTCAPS))
    logit_scale = next((scale for scale in scales if scale is not None), 1.0)
    if getattr(config, "logits_scaling", None) is not None:
        # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
        logit_scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    head = model.get_output_embeddings()
    return LMHead(head.weight, head.bias, logit_scale, next(filter(None, softcaps), None))


def label_hidden_states(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The last hidden states of a model at the label positions of a batch, `(num_label_tokens, hidden_size)`.
    [`add_label_head_forward`] was called on the model, which may be wrapped; `labels` are among the inputs.
    """
    return model(**inputs, label_head=_hidden_states)


def student_ce_kl(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], teacher: ModelSide | None, **options
) -> tuple[CEKLOutput, torch.Tensor | None]:
    """
    [`~trl_selfdistill.losses.linear_ce_kl`], which takes `options`, of the student on a batch, and the MoE
    load-balancing loss, if router logits were asked for. Model and inputs are as for [`label_hidden_states`],
    `teacher` is what [`Teacher.targets`] returned for these inputs; `None` with `kl_weight=0`.
    """
    return model(**inputs, label_head=functools.partial(_ce_kl, teacher=teacher, **options))


def _hidden_states(model: PreTrainedModel, states: LabelStates) -> torch.Tensor:
    return states.hidden_states


@torch.compiler.disable  # torch 2.11 loses fields of the named tuples made in compiled code
def _ce_kl(model: PreTrainedModel, states: LabelStates, teacher: ModelSide | None, **options):
    if teacher is not None and len(states.hidden_states) != len(teacher.hidden_states):
        raise ValueError(
            f"The student has {len(states.hidden_states)} label positions in a batch, the teacher "
            f"{len(teacher.hidden_states)}. A prompt-learning adapter shifts them: pass a `teacher_model` with it too."
        )
    lm_head = lm_head_of(model)
    device = lm_head.weight.device  # with `device_map`, the backbone may end on another device than the head
    student_side, teacher_side = (states.hidden_states.to(device), lm_head), (None, None)
    if teacher is not None:
        teacher_side = teacher.hidden_states.to(device), teacher.lm_head.map_tensors(lambda tensor: tensor.to(device))
    return linear_ce_kl(*student_side, *teacher_side, states.shift_labels.to(device), **options), states.aux_loss


def check_label_head(model: torch.nn.Module, accelerator: Accelerator, name: str) -> None:
    """
    Compares the model's own logits of eight tokens, in the accelerator's precision, with those that the loss is
    computed from. A `ValueError` that names the trainer's argument `name` if they differ. [`add_label_head_forward`]
    was called on the model, which is on its device and, under FSDP and DeepSpeed, sharded. A collective.
    """
    family = base_causal_lm(accelerator.unwrap_model(model, keep_torch_compile=False))
    refusal = (
        f"`{name}` is a {type(family).__name__}, which does more to its last hidden states than project, scale and "
        "cap them, so that the CE and KL computed from its LM head would be wrong (those of `SFTTrainer` are, too). "
        "Take a model of another family, or `kl_weight=0` and a `compute_loss_func`, which gets the model's logits."
    )
    if family.config.is_encoder_decoder or family.get_output_embeddings() is None:
        raise ValueError(f"{refusal} It has an encoder, or no output embeddings.")
    device = family.get_input_embeddings().weight.device
    ids = torch.tensor([_TOKENS], device=device) % family.config.get_text_config().vocab_size
    with evaluation_mode(model), accelerator.autocast():
        expected = model(input_ids=ids, use_cache=False).logits
        logits, epsilon = model(input_ids=ids, labels=ids, use_cache=False, label_head=_head_logits)
    expected = expected[0, -1 - len(logits) : -1].to(logits)  # without virtual tokens of prompt learning
    if expected.shape != logits.shape:
        raise ValueError(f"{refusal} It has {expected.size(-1)} logits for a head of {logits.size(-1)} tokens.")
    largest = expected.nan_to_num(posinf=0, neginf=0).abs().max()
    tolerance = max(1e-3, 4 * epsilon) * largest.item()
    if not torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True):
        difference = (logits - expected).abs().max()
        raise ValueError(f"{refusal} On eight tokens they are off by {difference:.2g}, the largest is {largest:.2g}.")


def _head_logits(model: PreTrainedModel, states: LabelStates) -> tuple[torch.Tensor, float]:
    """The logits at the label positions, and the precision of the coarsest number on the way to them."""
    head = lm_head_of(model).map_tensors(lambda x: x.full_tensor() if isinstance(x, DTensor) else x)
    device, hidden_states = head.weight.device, states.hidden_states.to(head.weight.device)
    dtypes = {hidden_states.dtype, head.weight.dtype}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return head.logits(hidden_states), max(torch.finfo(dtype).eps for dtype in dtypes)
