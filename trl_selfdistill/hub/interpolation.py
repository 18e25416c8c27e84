# SPDX-License-Identifier: Apache-2.0
"""
Weights between those of a model before and after fine-tuning, as a checkpoint (WiSE-FT, Wortsman et al., arXiv
2109.01903): the less of the fine-tuning, the less is forgotten, and the less is learnt.
"""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import read_json, written_whole
from .model_card import base_model_of, hub_id, read_record, update_model_card
from .publishing import MODEL_FILES


_ADAPTER_CONFIG = "adapter_config.json"
_FILES = {*MODEL_FILES, "*.py"} - {"README.md", "model_card.json", "curves.png", "accuracy.json*"}
_FILES -= {"base_accuracy.jsonl", "parameter_groups.json"}  # of the fine-tuned weights


def interpolate(
    end: str | os.PathLike, alpha: float, output_dir: str | os.PathLike, start: str | os.PathLike | None = None
) -> Path:
    """
    Writes a checkpoint with the weights `(1 - alpha) * start + alpha * end` and its card, and returns `output_dir`.

    Full models are interpolated file by file, computed in fp32 and stored in the dtype and files of `end`. Of a LoRA
    adapter, which starts from nothing, the share `alpha` stays of what it adds to its base model. Two adapters are
    for PEFT's `add_weighted_adapter`.

    Args:
        end (`str` or `os.PathLike`): Folder or Hub id of the fine-tuned model or adapter.
        alpha (`float`): Share of the fine-tuned weights, in [0, 1].
        output_dir (`str` or `os.PathLike`): Folder of the checkpoint; a new or an empty one.
        start (`str` or `os.PathLike`, *optional*): Folder or Hub id of the full model before fine-tuning.

    Raises:
        ValueError: If `alpha` is not in [0, 1], `output_dir` is not empty, `start` is no full model or missing,
            weights differ in name or shape or are quantised, or an adapter is no plain LoRA.
    """
    output = Path(output_dir).expanduser().resolve()
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is the share of the fine-tuned weights and must be in [0, 1], got {alpha!r}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output_dir`: {output} is not an empty folder. Choose a new one.")
    folder, first = _folder(end), None if start is None else _folder(start)
    is_adapter = (folder / _ADAPTER_CONFIG).is_file()
    if is_adapter:
        _check_adapter(read_json(folder / _ADAPTER_CONFIG))
    if is_adapter and first is not None:
        raise ValueError(
            f"`start` must be unset for an adapter, got {start!r}. PEFT's `add_weighted_adapter` mixes two."
        )
    if not is_adapter and (first is None or (first / _ADAPTER_CONFIG).is_file()):
        raise ValueError(f"`start` must be a full model, as `end` is, got {start!r}. Merge the adapter first.")
    with written_whole(output) as partial:
        partial.mkdir()
        for path in {path for pattern in _FILES for path in folder.glob(pattern) if path.suffix != ".safetensors"}:
            (partial / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, partial / path.relative_to(folder))
        _write_weights(folder, first, float(alpha), partial)
        training = read_record(folder).get("training") or {"is_adapter": is_adapter, **base_model_of(os.fspath(end))}
        training["interpolation"] = {"alpha": float(alpha), "start": hub_id(start)}
        update_model_card(partial, training=training)
    return output


def _folder(name: str | os.PathLike) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if hub_id(name) is None:
        raise ValueError(f"{os.fspath(name)!r} is neither a folder nor the id of a model on the Hub.")
    return Path(snapshot_download(os.fspath(name), allow_patterns=[*_FILES]))


def _names(folder: Path) -> dict[str, Path]:
    """The tensors in the `*.safetensors` files of a folder, and the file of each."""
    names = {}
    for path in sorted(folder.glob("*model*.safetensors")):
        with safe_open(path, "pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    if not names:
        raise ValueError(f"{folder} holds no weights (model*.safetensors). Save it with `save_pretrained`.")
    return names


def _write_weights(end: Path, start: Path | None, alpha: float, output: Path) -> None:
    """Writes the files of `end` with interpolated tensors, of which those of one file are in memory."""
    names, earlier = _names(end), {} if start is None else _names(start)
    # Of tied embeddings, some versions of transformers save both names and some one
    different = {*names} - {*earlier} | ({*earlier} - {*names} - {"lm_head.weight"})
    if start is not None and different:
        raise ValueError(
            f"{len(different)} tensors are in `start` or `end` only, such as {min(different)}. Save both alike."
        )
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in {*names.values(), *earlier.values()}}
        for path in dict.fromkeys(names.values()):
            tensors = {}
            for name in files[path].keys():
                after = files[path].get_tensor(name)
                if start is None:
                    tensors[name] = _scaled(name, after, alpha)
                else:
                    tensors[name] = _between(name, files[earlier[name]].get_tensor(name), after, alpha)
            save_file(tensors, output / path.name, files[path].metadata())


def _between(name: str, before: torch.Tensor, after: torch.Tensor, alpha: float) -> torch.Tensor:
    if before.shape != after.shape:
        shapes = f"{tuple(before.shape)} in `start` and {tuple(after.shape)} in `end`"
        raise ValueError(f"{name} is of shape {shapes}. Pass two checkpoints of one model.")
    if before.dtype == after.dtype and torch.equal(before, after):
        return after
    if not all(tensor.is_floating_point() and tensor.itemsize > 1 for tensor in (before, after)):
        raise ValueError(f"{name} is quantised ({after.dtype}): interpolate dequantised models, or adapters.")
    return torch.lerp(before.float(), after.float(), alpha).to(after.dtype)


def _scaled(name: str, tensor: torch.Tensor, alpha: float) -> torch.Tensor:
    """Of B A, which a LoRA adapter adds, B times `alpha`. With adapted embeddings PEFT saves the base layer, too."""
    if "lora_B" in name or "lora_embedding_B" in name:
        return (alpha * tensor.float()).to(tensor.dtype)
    if "lora_A" in name or "lora_embedding_A" in name or "base_layer" in name:
        return tensor
    raise ValueError(f"{name} is a copy of a module of the base model (`modules_to_save`). Merge the adapter first.")


def _check_adapter(config: dict) -> None:
    kind = "DoRA" if config.get("use_dora") else config["peft_type"]
    if config.get("init_lora_weights") not in (True, False, "gaussian") or config.get("target_parameters"):
        kind = f"{kind} with another `init_lora_weights` or `target_parameters`"  # which change the base model
    if kind != "LORA":
        raise ValueError(f"`end` is an adapter of type {kind}; plain LoRA alone can be interpolated. Merge it.")
