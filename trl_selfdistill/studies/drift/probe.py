# SPDX-License-Identifier: Apache-2.0
"""The drift of held-out entities while a model trains, in the run's log (arXiv 2604.15574, section 5)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from ...files import read_jsonl, write_jsonl
from ...parameters.structure import keep_trainable
from ...slick.process_sharding import on_main_process
from ...trainers.hallucination_callback import log_beside_training
from .prompt_states import PromptStates, check_layers, drift, prompt_states
from .subject_tokens import subject_prompts


class DriftProbeCallback(TrainerCallback):
    """
    Measures how far the model has moved from its start, on questions about entities that the training does not show:
    before the first step, every `every_steps` steps and after the last one. It logs these means over the facts:
    - `drift_cosine/layer_<L>/<position>`: cosine distance of the hidden states, `1 - cos`, at the `last_subject_token`
      and the `last_prompt_token`; the paper plots layers 14 and 28 of 28;
    - `drift_kl`: KL(start ‖ model) of the token after the prompt, in nats.

    Training is bitwise the same with and without it. The states of the start are kept for a resumed run in
    `<output_dir>/_drift_reference.safetensors`, which a push to the Hub leaves out.

    ```py
    trainer = SelfDistillSFTTrainer(model, args, train_dataset=mix)
    trainer.add_callback(DriftProbeCallback(trainer, held_out_facts, every_steps=50))
    ```

    Args:
        trainer ([`~trl.SFTTrainer`]): The trainer whose model is measured.
        facts (`Dataset`): Held-out facts, with the columns `question` and `subject`.
        every_steps (`int`, *optional*, defaults to `50`): Optimizer steps between two measurements.
        layers (`Sequence[int]`, *optional*):
            Decoder blocks to measure, from 1; the last one after the final norm. Defaults to the middle and the last.
        output_file (`str` or `os.PathLike`, *optional*):
            JSON-lines file that also gets the numbers, one line per measurement with `step` and `epoch`.

    Raises:
        `ValueError`: If there are no facts, an option is out of range, or a subject is not in its question. When
            training resumes, if the kept states are of other facts or layers; `FileNotFoundError` if they are missing.
    """

    def __init__(
        self,
        trainer: Trainer,
        facts: Dataset,
        *,
        every_steps: int = 50,
        layers: Sequence[int] | None = None,
        output_file: str | os.PathLike | None = None,
    ):
        if every_steps < 1:
            raise ValueError(f"`every_steps` must be at least 1, got {every_steps}.")
        if not len(facts):
            raise ValueError("`facts` is empty; pass at least one held-out fact.")
        self.trainer = trainer
        self.every_steps = every_steps
        self.prompts = subject_prompts(trainer.processing_class, facts["question"], facts["subject"])
        self.layers = check_layers(trainer.model, layers)
        self.measured = json.dumps([self.prompts, self.layers])
        self.output_file = None if output_file is None else Path(output_file)

    def on_train_begin(self, args, state, control, **kwargs):
        keep_trainable(self.trainer.model)
        path = Path(args.output_dir) / "_drift_reference.safetensors"
        if state.global_step == 0:
            self.start, measured = self._states(), {"measured": self.measured}
            on_main_process(lambda: save_file(self.start._asdict(), path, metadata=measured))
            self._measure(state)
        else:
            self.start = self._read_start(path)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every_steps == 0:
            self._measure(state)

    def on_train_end(self, args, state, control, **kwargs):
        # The best model, if it was loaded, is not that of the last step
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if state.global_step % self.every_steps and not best:
            self._measure(state)

    def _states(self) -> PromptStates:
        accelerator, model = self.trainer.accelerator, self.trainer.model_wrapped
        # The wrapper gathers sharded weights; that of DDP or `torch.compile` is not needed
        if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            model = accelerator.unwrap_model(model, keep_torch_compile=False)
        # One autocast around all forward passes: each by itself would cast all weights anew
        with accelerator.autocast():
            return prompt_states(model, self.prompts, self.layers)

    def _read_start(self, path: Path) -> PromptStates:
        with safe_open(path, framework="pt") as file:
            if file.metadata()["measured"] != self.measured:
                raise ValueError(f"{path} is of other facts, layers or prompts. Resume with those of the first run.")
        return PromptStates(**load_file(path))

    def _measure(self, state) -> None:
        values = drift(self.start, self._states(), self.layers)
        metrics = {f"drift_{name}": fmean(values) for name, values in values.items()}
        if self.output_file is not None and state.is_world_process_zero:
            lines = read_jsonl(self.output_file) if self.output_file.is_file() else []
            # A resumed run measures again what came after its checkpoint, a new run everything
            lines = [line for line in lines if line["step"] < state.global_step]
            line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **metrics}
            write_jsonl(self.output_file, [*lines, line])
        log_beside_training(self.trainer, metrics)
