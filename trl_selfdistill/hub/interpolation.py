# SPDX-License-Identifier: Apache-2.0
"""Weights between those before and after fine-tuning, as a checkpoint (WiSE-FT, Wortsman et al., arXiv 2109.01903)."""

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..files import read_json, write_json, written_whole
from .model_card import base_model_of, hub_id, read_record, update_model_card
from .publishing import MODEL_FILES


_ADAPTER_CONFIG = "adapter_config.json"
_FILES = {*MODEL_FILES, "*.py"}
# Settings of a LoRA that adds `lora_alpha / r` times B A to its base model, and does nothing else
_PLAIN_LORA = {"peft_type": ["LORA"], "bias": ["none", None], "use_dora": [False, None], "modules_to_save": [None, []]}
_PLAIN_LORA |= {"trainable_token_indices": [None], "init_lora_weights": [True, False, "gaussian"]}


def interpolate(
    end: str | os.PathLike, alpha: float, output_dir: str | os.PathLike, start: str | os.PathLike | None = None
) -> Path:
    """
    Writes a checkpoint with the weights `(1 - alpha) * start + alpha * end` and its card, and returns `output_dir`.

    Full models are interpolated file by file, computed in fp32 and stored in the dtype and files of `end`. A LoRA
    adapter, which started from nothing, keeps its weights and gets `alpha` times its `lora_alpha`.

    Args:
        end (`str` or `os.PathLike`): Folder or Hub id of the fine-tuned model or adapter.
        alpha (`float`): Share of the fine-tuned weights, in [0, 1].
        output_dir (`str` or `os.PathLike`): Folder of the checkpoint; a new or an empty one.
        start (`str` or `os.PathLike`, *optional*): The same of the model before fine-tuning; `None` for an adapter.

    Raises:
        ValueError: If `alpha` is not in [0, 1], `output_dir` is not empty, an adapter meets a full model, weights
            differ in name or shape or are quantised, or an adapter is more than LoRA.
    """
    output = Path(output_dir).expanduser().resolve()
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is the share of the fine-tuned weights and must be in [0, 1], got {alpha!r}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output_dir`: {output} is not an empty folder. Choose a new one.")
    folder = _folder(end)
    names = _names(folder)
    adapter = read_json(folder / _ADAPTER_CONFIG) if (folder / _ADAPTER_CONFIG).is_file() else None
    first = None if start is None else _folder(start)
    if bool(adapter) == bool(first) or (first and (first / _ADAPTER_CONFIG).is_file()):
        kind = "left out, as `end` is an adapter" if adapter else "a full model, as `end` is"
        raise ValueError(f"`start` must be {kind}, got {start!r}. Pass that one, or merge an adapter first.")
    with written_whole(output) as partial:
        partial.mkdir()
        for path in {path for pattern in _FILES for path in folder.glob(pattern)}:
            if adapter or path.suffix != ".safetensors":
                (partial / path.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, partial / path.relative_to(folder))
        if adapter:
            write_json(partial / _ADAPTER_CONFIG, _scaled(adapter, alpha))
        else:
            _write_weights(names, _names(first), float(alpha), partial)
        training = read_record(folder).get("training") or base_model_of(os.fspath(end)) | {"is_adapter": bool(adapter)}
        training["interpolation"] = {"alpha": float(alpha), "start": hub_id(start)}
        update_model_card(partial, training=training)
    return output


def _folder(name: str | os.PathLike) -> Path:
    try:
        return Path(name if Path(name).is_dir() else snapshot_download(os.fspath(name), allow_patterns=[*_FILES]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(name)!r} is neither a folder nor a model that the Hub gives: {error}") from error


def _names(folder: Path) -> dict[str, Path]:
    """The tensors in the `*.safetensors` files of a folder, and the file of each."""
    names = {}
    for path in sorted(folder.glob("*model*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                names |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not whole: {error}. Save or download it again.") from error
    if not names:
        raise ValueError(f"{folder} holds no weights (model*.safetensors). Save it with `save_pretrained`.")
    return names


def _write_weights(names: dict[str, Path], earlier: dict[str, Path], alpha: float, output: Path) -> None:
    """Writes the files of `names` with interpolated tensors, of which those of one file are in memory."""
    # Of tied embeddings, some versions of transformers save both names and some one
    different = {*names} - {*earlier} | ({*earlier} - {*names} - {"lm_head.weight"})
    if different:
        raise ValueError(f"{len(different)} tensors are in one of `start` and `end` only, such as {min(different)}.")
    for path in {*names.values()}:
        tensors = load_file(path)
        for name, after in tensors.items():
            with safe_open(earlier[name], "pt") as file:
                before = file.get_tensor(name)
            if before.shape != after.shape:
                shapes = f"{tuple(before.shape)} in `start` and {tuple(after.shape)} in `end`"
                raise ValueError(f"{name} is of shape {shapes}. Pass two checkpoints of one model.")
            if before.dtype == after.dtype and torch.equal(before, after):
                continue
            if not all(tensor.is_floating_point() and tensor.itemsize > 1 for tensor in (before, after)):
                raise ValueError(f"{name} is quantised ({after.dtype}): interpolate dequantised models, or adapters.")
            tensors[name] = torch.lerp(before.float(), after.float(), alpha).to(after.dtype)
        save_file(tensors, output / path.name, {"format": "pt"})


def _scaled(config: dict, alpha: float) -> dict:
    """The configuration of a LoRA adapter that adds `alpha` times as much to its base model."""
    for name, plain in _PLAIN_LORA.items():
        if config.get(name) not in plain:
            value = f"`{name}` = {config.get(name)!r}"
            raise ValueError(f"`end` is an adapter with {value}; plain LoRA alone can be interpolated. Merge it.")
    patterns = {name: alpha * value for name, value in (config.get("alpha_pattern") or {}).items()}
    return {**config, "lora_alpha": alpha * config["lora_alpha"], "alpha_pattern": patterns}
