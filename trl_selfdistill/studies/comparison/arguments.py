# SPDX-License-Identifier: Apache-2.0
"""What the comparison of ways to train on new facts compares."""

import re
from dataclasses import dataclass

from accelerate.utils import compare_versions

from ..arguments import check_different, setting


_ABOVE_0 = ("num_own_answers", "self_anchor_tokens", "lora_rank", "lora_learning_rate", "equal_time")
ADAPTERS = "Adapters"
# Each with the kind of remedy that it is
GROUPS = {"sft": "SFT", "slow": "Lower rate"} | dict.fromkeys(["lora", "corda"], ADAPTERS)
if compare_versions("peft", ">=", "0.21"):
    GROUPS |= dict.fromkeys(["mica", "intruders", "osf"], ADAPTERS)
GROUPS |= dict.fromkeys(["frozen", "l2"], "Parts of the weights")
GROUPS |= dict.fromkeys(["replay", "known_patch"], "Known facts again")
GROUPS |= dict.fromkeys(["stm", "eaft", "asft"], "Other losses")
GROUPS |= {"selfdistill": "Self-distillation", "own_answers": "Own answers"}
GROUPS |= dict.fromkeys(["kl_anchors", "self_anchors"], "KL on anchors")


@dataclass
class ComparisonArguments:
    """Which variants are compared, and their settings."""

    _argument_group_name = "comparison"

    variants: list[str] = setting([*GROUPS], "Variants to train. `sft` gives early stopping, too.")
    seeds: list[int] = setting([0, 1, 2], "Seeds of the training's order, at least 3.")
    settings: list[str] = setting(["0.3/1", "1/0.5"], "Self-distillation: λ/τ, or λ/τ/times the steps.")
    own_answers_settings: list[str] = setting(["0.3/1", "0.7/1/2"], "The same with own answers.")
    anchor_settings: list[str] = setting(
        ["1/0", "1/0.3"], "Anchors with a KL, τ = 1: their weight/λ of the rows, or weight/λ/times the steps."
    )
    num_anchors: list[int] = setting([400], "KL on anchors: numbers of prompts.")
    num_own_answers: int = setting(400, "Own answers: prompts that the start model answers.")
    anchor_facts: str | None = setting(
        None, "Facts whose questions are the prompts, instead of those of the facts in no split."
    )
    self_anchor_tokens: int = setting(16, "Self-samples: longest text, in tokens.")
    mixed: list[str] = setting(["sft"], "Variants, by their folders' names, whose weights are mixed with the start's.")
    mixing_weights: list[float] = setting(
        [0.2, 0.4, 0.6, 0.8],
        "WiSE-FT: shares of the fine-tuned weights, the rest being those of the start, in [0, 1].",
    )
    l2_weights: list[float] = setting([], "L2 to the start: weights beside the one that is matched to the KL there.")
    slower: list[float] = setting([2.0, 4.0, 8.0], "SFT at a rate divided, and with the steps multiplied, by these.")
    lora_rank: int = setting(16, "LoRA, MiCA and CorDA: rank.")
    lora_learning_rate: float = setting(1e-3, "LoRA, MiCA and CorDA: learning rate.")
    equal_time: float | None = setting(
        None, "A second table, in which each variant trains for so many times the processor time of SFT."
    )

    def __post_init__(self):
        if set(self.variants) - {*GROUPS} or "sft" not in self.variants:
            raise ValueError(f"`variants` may hold {', '.join(GROUPS)}, and `sft` must be one, got {self.variants}.")
        check_different("seeds", self.seeds, at_least=3)
        for name in ("variants", "num_anchors", "mixing_weights", "slower"):
            check_different(name, getattr(self, name))
        check_different("l2_weights", self.l2_weights, at_least=0)
        self.parsed = {name: self._parse(name) for name in ("settings", "own_answers_settings", "anchor_settings")}
        for name in (*_ABOVE_0, "slower", "num_anchors", "l2_weights"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, list) else [value], default=1) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if not all(0 <= weight <= 1 for weight in self.mixing_weights):
            raise ValueError(f"`mixing_weights` must be shares in [0, 1], got {self.mixing_weights}.")

    def _parse(self, name: str) -> list[tuple[float, float, float]]:
        """The settings as numbers, the last the times of the steps, 1 if it is not given."""
        pattern = "{0}/{0}(?:/{0})?".format(r"(\d+(?:\.\d+)?)")
        parsed = [re.fullmatch(pattern, setting) for setting in getattr(self, name)]
        if not all(parsed) or any(float(match[3] or 1) == 0 for match in parsed):
            raise ValueError(f"`{name}` are two or three numbers each, as in 0.7/1/2, got {getattr(self, name)}.")
        numbers = [(float(match[1]), float(match[2]), float(match[3] or 1)) for match in parsed]
        check_different(name, [*map(str, numbers)])
        return numbers
