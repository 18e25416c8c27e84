# SPDX-License-Identifier: Apache-2.0
"""The teacher of a student with an adapter: the same base model, with a frozen second adapter or with none."""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import is_peft_available, logging

from ..files import written_whole
from ..losses import ModelSide
from ..parameters.hashes import digest, hash_config, hash_model, hash_tensors
from ..slick.generation import evaluation_mode
from .label_head import label_hidden_states
from .sft_internals import use_adapter
from .teachers import Teacher, frozen_head


if is_peft_available():
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME


logger = logging.get_logger(__name__)

TEACHER_ADAPTER = "self_distill_teacher"


class AdapterTeacher(Teacher):
    """
    The student as it is now, without a second base model in memory. Where the student's adapter is a fresh LoRA, the
    teacher is the base with its adapters disabled, and `adapter_name` is `None`; else it is a frozen copy of the
    adapter, which is added to the student under that name and never saved with it.
    """

    def __init__(self, model: torch.nn.Module):
        if TEACHER_ADAPTER in model.peft_config:  # of an earlier run with the same model
            model.delete_adapter(TEACHER_ADAPTER)
        self.adapter_name = None if is_fresh(model) else TEACHER_ADAPTER
        self.sha256 = self._base_sha256 = hash_model(model, adapters=False)
        if self.adapter_name is not None:
            add_frozen_copy(model)
            self._take_state(model)

    def _take_state(self, model: torch.nn.Module) -> None:
        state = get_peft_model_state_dict(model, adapter_name=TEACHER_ADAPTER, save_embedding_layers=False)
        # On the CPU, as the model may be sharded when it is to be kept
        self._state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        self.sha256 = self._digest(model.peft_config[TEACHER_ADAPTER], self._state)

    def _digest(self, config, state: dict[str, torch.Tensor]) -> str:
        return digest({"base": self._base_sha256, "config": hash_config(config), **hash_tensors(state)})

    def targets(self, student: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> ModelSide:
        with self.as_model(student) as model, evaluation_mode(student):
            return ModelSide(label_hidden_states(student, inputs), frozen_head(model))

    @contextmanager
    def as_model(self, student: torch.nn.Module) -> Iterator[torch.nn.Module]:
        model = extract_model_from_parallel(student, keep_torch_compile=False)
        with _same_trainable(model), use_adapter(model, self.adapter_name):
            yield model

    def keep(self, folder: Path) -> None:
        if self.adapter_name is not None:
            with written_whole(folder / SAFETENSORS_WEIGHTS_NAME) as partial:
                save_file(self._state, partial)

    def restore(self, student: torch.nn.Module, folder: Path, saved: dict | None) -> None:
        file = folder / SAFETENSORS_WEIGHTS_NAME
        state = load_file(file) if file.is_file() else {}
        if saved is None or self._digest(student.active_peft_config, state) != saved["sha256"]:
            return
        if self.adapter_name is None:
            add_frozen_copy(student)
            self.adapter_name = TEACHER_ADAPTER
        set_peft_model_state_dict(student, state, TEACHER_ADAPTER)
        self._take_state(student)

    def release(self, student: torch.nn.Module) -> None:
        if self.adapter_name is not None:
            student.delete_adapter(TEACHER_ADAPTER)


def fits_adapter_teacher(model: torch.nn.Module) -> bool:
    """
    Whether the teacher of `model` can be an adapter in it: a PEFT model with one active adapter of a kind of which it
    can hold two, and nothing else to train. A warning where the teacher of a PEFT model is a copy of the whole.
    """
    if not is_peft_model(model):
        return False
    config, adapters = model.active_peft_config, model.active_adapters
    trained = (name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad)
    fits = (
        len(adapters) == 1
        and not (config.is_prompt_learning or config.is_adaption_prompt or getattr(config, "target_parameters", None))
        and getattr(config, "bias", "none") == "none"
        and all(adapters[0] in parts for parts in trained)  # with another adapter the others would still be read
    )
    if not fits:
        logger.warning(
            "The teacher is a copy of the whole model. To hold its adapter twice, nothing beside it must be trained "
            "(`bias`), and it must be the only active one, and not add tokens or have `target_parameters`."
        )
    return fits


def is_fresh(model: torch.nn.Module) -> bool:
    """Whether the active adapter is a LoRA of linear layers and nothing else, and changes nothing: every B is zero."""
    [adapter] = model.active_adapters
    for name, parameter in model.named_parameters():
        before, found, _ = f"{name}.".partition(f".{adapter}.")
        kind = before.rpartition(".")[2]
        if found and kind != "lora_A" and (kind != "lora_B" or parameter.count_nonzero()):
            return False
    return True


@contextmanager
def _same_trainable(model: torch.nn.Module) -> Iterator[None]:
    """PEFT makes the adapter that it activates trainable, and freezes the others: this undoes it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def add_frozen_copy(model: torch.nn.Module) -> None:
    """Adds a frozen copy of the active adapter as `TEACHER_ADAPTER`, which `save_pretrained` leaves out."""
    [student] = model.active_adapters
    config = copy.deepcopy(model.peft_config[student])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and OLoRA would take their part out of the base once more
    config.inference_mode = True
    # Its initialisation is overwritten: the run goes on as without it
    with _same_trainable(model), torch.random.fork_rng():
        model.add_adapter(TEACHER_ADAPTER, config)
        model.set_adapter(student)
    # Each tensor in its dtype (TRL casts a quantised model's to bf16), and those that modules share by all their names
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        if TEACHER_ADAPTER in name:
            tensor.data = tensors[name.replace(TEACHER_ADAPTER, student)].detach().clone()

    def save_pretrained(self, save_directory, safe_serialization=True, selected_adapters=None, *args, **kwargs):
        # Those that there are then: the user may add and delete adapters
        names = selected_adapters or [name for name in self.peft_config if name != TEACHER_ADAPTER]
        type(self).save_pretrained(self, save_directory, safe_serialization, names, *args, **kwargs)

    model.save_pretrained = types.MethodType(save_pretrained, model)
