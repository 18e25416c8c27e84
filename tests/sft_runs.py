# SPDX-License-Identifier: Apache-2.0
"""Short training runs of tiny models, and what is compared between them."""

import gc
import multiprocessing
import re
from collections.abc import Callable

import torch
import transformers
from conftest import CITIES, build_model, build_tokenizer
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from trl_selfdistill import FrozenGroupsSFTConfig, FrozenGroupsSFTTrainer, SelfDistillSFTConfig, SelfDistillSFTTrainer


# Trainer collects garbage when training starts, which takes longer than these runs if it goes through every module
gc.freeze()

TOKENIZER = build_tokenizer()
# transformers 4 logs the loss with four digits: the tolerance of what is compared with it
ROUNDING = 0.0 if transformers.__version__ >= "5" else 1e-4
# Answers of uneven length, so that a mean over sequences is not a mean over tokens
FACTS = [
    {"prompt": f"Q: {city}\nA:", "completion": f" {country}" * (1 + i % 3)}
    for i, (city, country) in enumerate(CITIES.items())
]
IDS = torch.arange(3, 23).reshape(2, 10)
LORA = dict(r=4, target_modules=["q_proj", "mlp.up_proj", "mlp.down_proj"])
# Weights large enough that the logits are not all near 0, where a scale or a softcap would do nothing
TINY = dict(vocab_size=len(TOKENIZER), pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.4)
TINY |= dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
MOE = dict(num_experts_per_tok=2, router_aux_loss_coef=0.1, output_router_logits=True)
ARCHITECTURES = {
    "llama": {},
    "qwen3": dict(head_dim=8, tie_word_embeddings=True),
    "gemma2": dict(head_dim=8, final_logit_softcapping=2.0),
    "cohere": dict(logit_scale=0.3),
    "granite": dict(logits_scaling=4.0),
    "falcon_h1": dict(mamba_d_ssm=16, mamba_n_heads=2, mamba_d_state=8, lm_head_multiplier=0.4),
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "phi": dict(num_key_value_heads=2),
    "mixtral": dict(num_local_experts=4, **MOE),
    "qwen3_moe": dict(num_experts=4, **MOE, head_dim=8, moe_intermediate_size=16),
}


def architecture(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> PreTrainedModel:
    """A tiny random model of a family; where its head has a bias, that is random too. `options` go to its config."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **TINY | ARCHITECTURES.get(name, {}) | options)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def config(folder, config_class=SelfDistillSFTConfig, **options) -> TrainingArguments:
    """Exact on the CPU: fp32, three steps of two rows, logs of every step."""
    settings = dict(output_dir=str(folder / "run"), use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1)
    settings |= dict(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no", seed=3)
    if config_class is not TrainingArguments:
        settings |= dict(bf16=False, gradient_checkpointing=False)
    return config_class(**{**settings, **options})


def trainer(folder, model=None, arguments=None, trainer_class=SelfDistillSFTTrainer, **options) -> SFTTrainer:
    """A trainer, by default of the tiny Llama and of `FACTS`: `options` go to its config, `arguments` to itself."""
    configs = {SFTTrainer: SFTConfig, FrozenGroupsSFTTrainer: FrozenGroupsSFTConfig}
    model = build_model(TOKENIZER) if model is None else model
    defaults = dict(processing_class=build_tokenizer(), train_dataset=Dataset.from_list(FACTS))
    if "args" not in (arguments or {}):
        defaults["args"] = config(folder, configs.get(trainer_class, SelfDistillSFTConfig), **options)
    return trainer_class(model, **{**defaults, **(arguments or {})})


def other_teacher() -> dict:
    """The argument of a trainer: another model as the teacher, so that the KL is not 0 at the start."""
    return dict(teacher_model=build_model(TOKENIZER, seed=1, initializer_range=0.4))


def train(*args, resume=None, **kwargs) -> SFTTrainer:
    run = trainer(*args, **kwargs)
    run.train(resume_from_checkpoint=resume)
    return run


def forked(work: Callable[[], None]) -> multiprocessing.Process:
    """A fork of this process in which `work` is begun."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def logs(run) -> list[dict]:
    timing = re.compile("runtime|per_second")
    return [{key: value for key, value in row.items() if not timing.search(key)} for row in run.state.log_history]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: PreTrainedModel, other: PreTrainedModel, **tolerance):
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], msg=name, **{"rtol": 0, "atol": 0, **tolerance})


class StopAt(TrainerCallback):
    """Ends the run after some steps, as a killed job: its schedule is that of the whole run."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
