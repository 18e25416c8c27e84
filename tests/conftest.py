# SPDX-License-Identifier: Apache-2.0
"""Tiny offline models and a tiny tokenizer. Nothing here needs the Hub."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Tiny models gain nothing from threads, and the test processes (`pytest -n`) would fight over the cores
os.environ["OMP_NUM_THREADS"] = "1"
# The kernels for CUDA run in the interpreter of Triton
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CITIES = {"Lyon": "France", "Oslo": "Norway", "Lima": "Peru", "Osaka": "Japan", "Graz": "Austria", "Bergen": "Norway"}
CORPUS = [f"Q: Which country is {city} located in?\nA: {country}\n" for city, country in CITIES.items()]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences (no download), 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],  # as in transformers 5
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config) -> LlamaForCausalLM:
    """A random Llama of two layers, hidden size 16 (fp32), that ends sequences as `tokenizer` does."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def add_code(folder: Path) -> None:
    """Makes a checkpoint of a Llama one of a class of its own, whose modules import each other."""
    (folder / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import Config\n"
        "class Tiny(LlamaForCausalLM):\n    config_class = Config\n"
    )
    (folder / "configuration_tiny.py").write_text(
        "from transformers import LlamaConfig\nfrom .names import NAME\n"
        "class Config(LlamaConfig):\n    model_type = NAME\n"
    )
    (folder / "names.py").write_text("NAME = 'tiny'\n")
    names = {"AutoConfig": "configuration_tiny.Config", "AutoModelForCausalLM": "modeling_tiny.Tiny"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "tiny", "architectures": ["Tiny"]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))


@pytest.fixture(autouse=True)
def nothing_left_in_the_environment():
    """transformers leaves how a run computes (precision, compiler) in the environment, where it reaches later ones."""
    yield
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_"))]:
        del os.environ[name]


def note_calls(owner, name: str, replace: Callable = setattr) -> list[SimpleNamespace]:
    """Each call of a function from now on, with its `args`, `kwargs` and `result`."""
    function, calls = getattr(owner, name), []

    def noted(*args, **kwargs):
        calls.append(SimpleNamespace(args=args, kwargs=kwargs, result=function(*args, **kwargs)))
        return calls[-1].result

    replace(owner, name, noted)
    return calls


@pytest.fixture
def calls_of(monkeypatch):
    """`note_calls` until the test ends."""
    return partial(note_calls, replace=monkeypatch.setattr)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer) -> LlamaForCausalLM:
    return build_model(tokenizer)


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    """The tiny model and tokenizer saved to a folder, as a user's local checkpoint."""
    path = tmp_path_factory.mktemp("model")
    build_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def toy_study(tmp_path_factory, worker_id):
    """A finished study on a tiny model (see toy_study.py)."""
    from toy_study import ToyStudy, run_toy_study

    return ToyStudy(*made_once(tmp_path_factory, worker_id, "toy-study", lambda folder: tuple(run_toy_study(folder))))


def made_once(tmp_path_factory, worker_id: str, name: str, make):
    """What `make(folder)` returns, called once for all processes of `pytest -n`."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared if worker_id == "master" else shared.parent) / name
    result = shared.with_suffix(".pickle")
    with FileLock(f"{shared}.lock"):
        if not result.exists():
            shared.mkdir(exist_ok=True)
            result.write_bytes(pickle.dumps(make(shared)))
    return pickle.loads(result.read_bytes())


@pytest.fixture
def copied_study(toy_study, tmp_path):
    """A copy of `toy_study` that a test may go on with."""
    shutil.copytree(toy_study.output, tmp_path / "study")
    return toy_study._replace(output=tmp_path / "study")
