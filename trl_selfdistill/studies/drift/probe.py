# SPDX-License-Identifier: Apache-2.0
"""The drift of held-out entities while a model trains, as numbers in the run's log (arXiv 2604.15574, section 5)."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ...parameters.quantised import keep_trainable
from ...slick.process_sharding import on_main_process
from ...slick.prompts import question_prompt
from ...trainers.callback_logging import log_beside_training
from .measurement import measure_drift, read_reference, write_reference
from .prompt_states import check_layers
from .subject_tokens import subject_prompts


class DriftProbeCallback(TrainerCallback):
    """
    Measures during training how far the model has moved from the one that it started as, on questions about entities
    that the training does not show, and logs the means over these facts through the trainer, so that each of its
    reporters (trackio, TensorBoard, ...) gets them:
    - `drift_cosine/layer_<L>/last_subject_token`, `drift_cosine/layer_<L>/last_prompt_token`: cosine distance of the
      hidden states, `1 - cos`; the paper plots those of layers 14 and 28 of 28;
    - `drift_kl`: KL(start ‖ model) of the token after the prompt, in nats;
    - `drift_attention/layer_<L>`, with `attention=True`: the attention that the last prompt token pays to the
      subject's tokens, in [0, 1], mean over the heads.

    Layer `L` is `hidden_states[L]` of transformers: the output of the `L`-th decoder block, after the final norm for
    the last one. It measures before the first step, every `every_steps` steps and after the last one. The training is
    the same with it as without it, bit for bit. (transformers' recorders of hidden states stay on the model and do
    nothing.)

    What the model started as is kept in `<output_dir>/_<prefix>_reference.safetensors` (see
    [`~trl_selfdistill.studies.drift.measurement.write_reference`]; a push to the Hub leaves it out). A resumed run
    goes on with it.

    ```py
    trainer = SelfDistillSFTTrainer(model, args, train_dataset=mix)
    trainer.add_callback(DriftProbeCallback(trainer, held_out_facts, every_steps=50))
    ```

    Under DDP, FSDP and DeepSpeed each process measures a share of the facts. Tested are DDP runs and measurements of
    FSDP2 shards, on two CPU processes; runs under FSDP and DeepSpeed need GPUs and have not been made.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer whose model is measured. Add the callback to it with `trainer.add_callback`.
        facts (`Dataset`):
            Held-out facts, with the columns `question` and `subject`.
        every_steps (`int` or `None`, *optional*, defaults to `50`):
            Optimizer steps between two measurements. With `None` the probe is off: it does nothing at all.
        layers (`Sequence[int]`, *optional*):
            Layers to look at, from 1. Defaults to the middle and the last one.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts in one forward pass, on each process.
        attention (`bool`, *optional*, defaults to `False`):
            Whether to measure the attention, which runs as "eager" meanwhile. Needs attention in every layer.
        prefix (`str`, *optional*, defaults to `"drift"`):
            What the names of the numbers begin with.
        reference (`str` or `os.PathLike`, *optional*):
            Reference file of another start model, for example that of the run before this one, so that the drift goes
            on from there. By default the model's own, as this run begins.
        output_file (`str` or `os.PathLike`, *optional*):
            JSON-lines file of the numbers as well, one line for each measurement, with `step` and `epoch`.
        prompt_function (`Callable[[str], str]`, *optional*):
            Makes the prompt of a question, which it has to contain. Defaults to
            [`~trl_selfdistill.slick.prompts.question_prompt`].

    Raises:
        `ValueError`: If there are no facts, a column is missing, an option is out of range, the model has no such
            layer, or a subject is not found in its prompt. When training starts: if the reference is that of other
            facts or layers.
        `FileNotFoundError`: When training starts, if there is no reference to resume with.
    """

    def __init__(
        self,
        trainer: Trainer,
        facts: Dataset,
        *,
        every_steps: int | None = 50,
        layers: Sequence[int] | None = None,
        batch_size: int = 32,
        attention: bool = False,
        prefix: str = "drift",
        reference: str | os.PathLike | None = None,
        output_file: str | os.PathLike | None = None,
        prompt_function: Callable[[str], str] = question_prompt,
    ):
        self.trainer = trainer
        self.every_steps = every_steps
        if every_steps is None:
            return
        for name, value in (("every_steps", every_steps), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be a whole number from 1.")
        if not prefix or os.path.basename(prefix) != prefix:
            raise ValueError(f"`prefix` is {prefix!r}; it must be the beginning of a name, without a path.")
        missing = {"question", "subject"} - {*facts.column_names}
        if missing:
            raise ValueError(f"`facts` has no column {sorted(missing)}; it has {facts.column_names}.")
        if not len(facts):
            raise ValueError("`facts` is empty; pass at least one held-out fact, or leave the callback out.")
        self.layers = check_layers(trainer.model, layers)
        prompts = [prompt_function(question) for question in facts["question"]]
        self.prompts = subject_prompts(trainer.processing_class, prompts, facts["question"], facts["subject"])
        self.batch_size = batch_size
        self.attention = attention
        self.prefix = prefix
        self.reference_file = None if reference is None else Path(reference)
        self.output_file = None if output_file is None else Path(output_file)
        self._reference = None
        self._measured_step = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.every_steps is None:
            return
        keep_trainable(self.trainer.model)
        path = self.reference_file
        if path is None:
            path = Path(args.output_dir) / f"_{self.prefix}_reference.safetensors"
            if state.global_step == 0:
                with self.trainer.accelerator.autocast():
                    write_reference(path, self._model(), self.prompts, self.layers, self.batch_size)
        self._reference = read_reference(path, self.prompts, self.layers)
        self._measured_step = on_main_process(lambda: self._drop_lines_after(state.global_step))
        if state.global_step == 0:
            self._measure(state)

    def on_step_end(self, args, state, control, **kwargs):
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._measure(state)

    def on_train_end(self, args, state, control, **kwargs):
        # The best model, if that was loaded, is not the one of this step
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.every_steps is not None and state.global_step != self._measured_step and not best:
            self._measure(state)

    def _model(self):
        """The model to call: weights that are sharded are gathered by the wrapper, DDP has no part in this."""
        accelerator, wrapped = self.trainer.accelerator, self.trainer.model_wrapped
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return wrapped
        return accelerator.unwrap_model(wrapped, keep_torch_compile=False)

    def _measure(self, state) -> None:
        # One autocast around all forward passes: each by itself would cast all of the weights anew
        with self.trainer.accelerator.autocast():
            drift = measure_drift(
                self._model(),
                self._reference,
                self.prompts,
                self.layers,
                batch_size=self.batch_size,
                attention=self.attention,
            )
        self._measured_step = state.global_step
        metrics = {f"{self.prefix}_{name}": fmean(values) for name, values in drift.items()}
        if self.output_file is not None and state.is_world_process_zero:
            line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **metrics}
            self._write([*self._lines(), line])
        log_beside_training(self.trainer, metrics)

    def _drop_lines_after(self, step: int) -> int | None:
        """Drops what is measured again, by a new run all, and returns the last step that is left."""
        if self.output_file is None:
            return None
        lines = [line for line in self._lines() if line["step"] <= step > 0]
        self._write(lines)
        return lines[-1]["step"] if lines else None

    def _lines(self) -> list[dict]:
        if not self.output_file.is_file():
            return []
        return [json.loads(line) for line in self.output_file.read_text(encoding="utf-8").splitlines()]

    def _write(self, lines: list[dict]) -> None:
        """Writes the file of numbers, whole or not at all."""
        self.output_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.output_file.with_name(f"{self.output_file.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.output_file)
