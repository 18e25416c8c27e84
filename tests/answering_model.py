# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama that was taught to answer, so that its answers end and its probabilities lie between 0 and 1."""

from functools import lru_cache

import torch
from conftest import CITIES, build_model, build_tokenizer

from trl_selfdistill.slick.prompts import few_shot_prompt, question_prompt


QUESTIONS = {f"Which country is {city} located in?": country for city, country in CITIES.items()}
TOWNS = ["Turin", "Nagoya", "Tromso", "Cusco", "Linz", "Nice", "Kobe", "Hamar", "Arequipa", "Pau", "Wels", "Bodo"]
EXEMPLARS = list(QUESTIONS.items())[:3]


def towns_prompts() -> list[str]:
    """Few-shot prompts with the same exemplars about towns that the model never saw: its answers are unsure."""
    return [few_shot_prompt(f"Which country is {town} located in?", EXEMPLARS) for town in TOWNS]


def teach(model, tokenizer, num_steps: int):
    """Trains the model on the questions, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    lines = [f"{question_prompt(question)} {answer}" for question, answer in QUESTIONS.items()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(num_steps):
        # Lines in a row end with newlines, the last with EOS: both are terminators.
        order = torch.randperm(len(lines), generator=generator)[:4].tolist()
        end = [tokenizer.eos_token_id] if step % 2 else tokenizer("\n")["input_ids"]
        input_ids = torch.tensor([tokenizer("\n".join(lines[i] for i in order))["input_ids"] + end])
        logits = model.eval()(input_ids=input_ids).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], input_ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@lru_cache(maxsize=1)
def _weights() -> dict[str, torch.Tensor]:
    tokenizer = build_tokenizer()
    return teach(build_model(tokenizer, hidden_size=32, intermediate_size=64), tokenizer, num_steps=120).state_dict()


def build_answering_model(tokenizer):
    """A fresh copy of the model, in evaluation mode."""
    model = build_model(tokenizer, hidden_size=32, intermediate_size=64)
    model.load_state_dict(_weights())
    return model.eval()
