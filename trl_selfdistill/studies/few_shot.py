# SPDX-License-Identifier: Apache-2.0
"""Facts asked so that a model need not have learnt a format: after solved exemplars, as text or as a conversation."""

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..slick.answering import answer_prompts
from ..slick.prompts import few_shot_messages, few_shot_prompt
from ..slick.slick import longest_answer


def answer_at_once(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is a chat template. One that knows `enable_thinking` lets the model answer without thinking."""
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = "{% set enable_thinking = false %}" + tokenizer.get_chat_template()
    return tokenizer.chat_template is not None


def few_shot_prompts(facts: Dataset, exemplars: dict[str, list[tuple[str, str]]], chat: bool) -> list:
    """
    The prompts of facts.

    Args:
        facts (`Dataset`): The facts.
        exemplars (`dict[str, list[tuple[str, str]]]`): Solved questions and their answers, by relation.
        chat (`bool`): Whether to make conversations, with the exemplars as turns, in place of texts.
    """
    prompt_function = few_shot_messages if chat else few_shot_prompt
    pairs = zip(facts["question"], facts["relation"], strict=True)
    return [prompt_function(question, exemplars[relation]) for question, relation in pairs]


def ask_few_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Dataset, exemplars: dict, chat: bool, **options
) -> list[str]:
    """
    The greedy answers to [`few_shot_prompts`]. A collective, as
    [`~trl_selfdistill.slick.answering.answer_prompts`], which takes the `options`.
    """
    accepted = [[answer, *aliases] for answer, aliases in zip(facts["answer"], facts["aliases"], strict=True)]
    options["max_new_tokens"] = longest_answer(tokenizer, accepted)
    return answer_prompts(model, tokenizer, few_shot_prompts(facts, exemplars, chat), **options)
