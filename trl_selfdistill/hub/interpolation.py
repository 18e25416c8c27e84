# SPDX-License-Identifier: Apache-2.0
"""
Weights between those of a model before and after fine-tuning, as a checkpoint (WiSE-FT, Wortsman et al., arXiv
2109.01903): the less of the fine-tuning, the less is forgotten, and the less is learnt.
"""

import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import read_json, write_json, written_whole
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

    Full models are interpolated file by file, computed in fp32 and stored in the dtype and files of `end`. LoRA
    adapters are interpolated in what they add to the base model: two of rank r become one of rank 2r.

    Args:
        end (`str` or `os.PathLike`): Folder or Hub id of the fine-tuned model or adapter.
        alpha (`float`): Share of the fine-tuned weights, in [0, 1].
        output_dir (`str` or `os.PathLike`): Folder of the checkpoint; a new or an empty one.
        start (`str` or `os.PathLike`, *optional*): Folder or Hub id of the model or adapter before fine-tuning. For an
            adapter that started from nothing it is left out.

    Raises:
        ValueError: If `alpha` is not in [0, 1], `output_dir` is not empty, an adapter meets a full model, weights
            differ in name or shape or are quantised, or adapters are no LoRA or differ in their settings.
    """
    output = Path(output_dir).expanduser().resolve()
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is the share of the fine-tuned weights and must be in [0, 1], got {alpha!r}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output_dir`: {output} is not an empty folder. Choose a new one.")
    folder, first = _folder(end), None if start is None else _folder(start)
    is_adapter = (folder / _ADAPTER_CONFIG).is_file()
    if (first is None and not is_adapter) or (first and (first / _ADAPTER_CONFIG).is_file() != is_adapter):
        kind = "an adapter, or unset where `end` started from nothing" if is_adapter else "a full model"
        raise ValueError(f"`start` must be {kind}, as `end` is, got {start!r}. Merge the adapter first.")
    with written_whole(output) as partial:
        partial.mkdir()
        for path in {path for pattern in _FILES for path in folder.glob(pattern) if path.suffix != ".safetensors"}:
            (partial / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, partial / path.relative_to(folder))
        if is_adapter:
            config = read_json(folder / _ADAPTER_CONFIG)
            _check_adapters(config, None if first is None else read_json(first / _ADAPTER_CONFIG))
            write_json(partial / _ADAPTER_CONFIG, config if first is None else _with_twice_the_rank(config))
        _write_weights(folder, first, float(alpha), partial, is_adapter)
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


def _write_weights(end: Path, start: Path | None, alpha: float, output: Path, is_adapter: bool) -> None:
    """Writes the files of `end` with interpolated tensors, of which those of one file are in memory."""
    names, earlier = _names(end), {} if start is None else _names(start)
    # Of tied embeddings, some versions of transformers save both names and some one
    different = {*names} - {*earlier} | ({*earlier} - {*names} - {"lm_head.weight"})
    if start is not None and different:
        raise ValueError(f"{len(different)} tensors are in one of `start` and `end` only, such as {min(different)}.")
    mix = _adapter_between if is_adapter else _between
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in {*names.values(), *earlier.values()}}
        for path in dict.fromkeys(names.values()):
            tensors = {}
            for name in files[path].keys():
                after = files[path].get_tensor(name)
                before = files[earlier[name]].get_tensor(name) if earlier else None
                if before is not None and before.shape != after.shape:
                    shapes = f"{tuple(before.shape)} in `start` and {tuple(after.shape)} in `end`"
                    raise ValueError(f"{name} is of shape {shapes}. Pass two checkpoints of one model.")
                tensors[name] = mix(name, before, after, alpha)
            save_file(tensors, output / path.name, files[path].metadata())


def _between(name: str, before: torch.Tensor, after: torch.Tensor, alpha: float) -> torch.Tensor:
    if before.dtype == after.dtype and torch.equal(before, after):
        return after
    if not all(tensor.is_floating_point() and tensor.itemsize > 1 for tensor in (before, after)):
        raise ValueError(f"{name} is quantised ({after.dtype}): interpolate dequantised models, or adapters.")
    return torch.lerp(before.float(), after.float(), alpha).to(after.dtype)


def _adapter_between(name: str, before: torch.Tensor | None, after: torch.Tensor, alpha: float) -> torch.Tensor:
    """Of B A, the A one above the other and the B, scaled, side by side; without a start B scaled alone."""
    if "base_layer" in name:  # of adapted embeddings, which PEFT saves with the adapter
        return after
    if "lora_A" in name or "lora_embedding_A" in name:
        return after if before is None else torch.cat([before.to(after), after])
    if "lora_B" in name or "lora_embedding_B" in name:
        scaled = (alpha * after.float()).to(after.dtype)
        if before is None or after.dim() == 1:  # a bias
            return scaled if before is None else _between(name, before, after, alpha)
        return torch.cat([((1 - alpha) * before.float()).to(after.dtype), scaled], 1)
    if before is None:
        raise ValueError(f"{name} is a copy of a module of the base model (`modules_to_save`): pass a `start`.")
    return _between(name, before, after, alpha)


def _check_adapters(end: dict, start: dict | None) -> None:
    kind = "DoRA" if end.get("use_dora") else end["peft_type"]
    # The others change the base model, or what a second half would be read as
    if end.get("init_lora_weights") not in (True, False, "gaussian") or end.get("target_parameters"):
        kind = f"{kind} with another `init_lora_weights` or `target_parameters`"
    if kind != "LORA":
        raise ValueError(f"`end` is an adapter of type {kind}; plain LoRA alone can be interpolated. Merge it.")
    for name in ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern") if start else ():
        if start.get(name) != end.get(name):
            raise ValueError(f"The adapters differ in `{name}`: {start.get(name)!r} in `start`, {end.get(name)!r}.")


def _with_twice_the_rank(config: dict) -> dict:
    """The configuration of two LoRA adapters in one, with the scaling of each."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    changed = {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
    for name, by in (("rank_pattern", 2), ("alpha_pattern", factor)):
        changed[name] = {pattern: by * value for pattern, value in (config.get(name) or {}).items()}
    return {**config, **changed}
