# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# dependencies = ["trl[peft]>=1.15,<2", "trackio"]
# ///
"""
The method of arXiv 2604.15574 on TRL alone, in the form of TRL's examples: supervised fine-tuning with a KL to the
model before training, so that new facts do not break old ones. `trl_selfdistill.SelfDistillSFTTrainer` computes the
same loss with one forward pass of the student instead of two, without the logits in memory, under FSDP and DeepSpeed,
and takes an adapter, a cache or a snapshot for the teacher.

    accelerate launch docs/examples/sft_self_distill.py \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name my_examples.jsonl --kl_weight 0.3 \\
        --learning_rate 5e-5 --report_to trackio --output_dir Qwen2.5-0.5B-new-facts
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser


@dataclass
class SelfDistillConfig(SFTConfig):
    """`loss = CE + kl_weight * temperature**2 * KL(teacher ‖ student)`, both over the tokens with a label."""

    kl_weight: float = 0.3
    temperature: float = 1.0


class SelfDistillTrainer(SFTTrainer):
    """`SFTTrainer` with a KL to the model as it was loaded."""

    def __init__(self, model: str, args: SelfDistillConfig, **kwargs):
        super().__init__(model, args, **kwargs)
        teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ce_loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ce_loss, *outputs = ce_loss if return_outputs else [ce_loss]

        student_logits = model(**asked).logits[:, :-1][labels != -100] / self.args.temperature
        with torch.no_grad():
            teacher_logits = self.teacher(**asked).logits[:, :-1][labels != -100] / self.args.temperature
        student_log_probs, teacher_log_probs = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
        # The denominator of the CE: the labels of the whole batch, over micro-batches and processes
        kl = kl / ((labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            kl = kl * self.accelerator.num_processes
        loss = ce_loss + self.args.kl_weight * self.args.temperature**2 * kl
        return (loss, *outputs) if return_outputs else loss


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SelfDistillConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    dataset = load_dataset("json", data_files=script_args.dataset_name, split="train")
    trainer = SelfDistillTrainer(model_args.model_name_or_path, training_args, train_dataset=dataset)
    trainer.train()
    trainer.save_model(training_args.output_dir)
