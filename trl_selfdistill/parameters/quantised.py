# SPDX-License-Identifier: Apache-2.0
"""Four-bit weights of bitsandbytes that stay as they are, so that a model can be evaluated and go on training."""

import torch


def keep_trainable(model: torch.nn.Module) -> None:
    """
    Keeps bitsandbytes from repacking 4-bit weights in place.

    On CPUs with AVX512-BF16 it does so at the first forward in evaluation mode. The kernel for the new layout has no
    backward, so that adapters below it would get no gradient any more, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
