# SPDX-License-Identifier: Apache-2.0
"""In which precision a program computes: what its device does natively, unless it is told otherwise."""

import logging
import os
import platform
from argparse import Namespace
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_torch_bf16_gpu_available

from .stage import run_arguments


def has_native_bf16(device_type: str) -> bool:
    """
    Whether a device (`"cpu"`, `"cuda"`, ...) multiplies bf16 itself. CUDA does from compute capability 8.0 on; MPS not
    everywhere, so that it counts as none. On a CPU oneDNN says so, but says yes on AVX-512 where it emulates, too.
    """
    if device_type == "cpu":
        has_instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        has_instructions = has_instructions or platform.machine() not in ("x86_64", "AMD64")
        is_built = torch.backends.mkldnn.is_available()
        return is_built and torch.ops.mkldnn._is_mkldnn_bf16_supported() and has_instructions
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type != "mps" and is_torch_bf16_gpu_available()


def choose_precision(arguments: Namespace) -> tuple[int, str]:
    """
    Sets `bf16` where it is not set, and `use_cpu` without an accelerator, and returns what to log: level and message.

    The folder `output_dir` keeps the precision that it began with, so that what is compared was computed alike, on
    whichever machine the study goes on.
    """
    on_cpu = vars(arguments).get("use_cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    on_cpu = on_cpu or not torch.accelerator.is_available()
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator().type
    if hasattr(arguments, "use_cpu"):
        arguments.use_cpu = on_cpu
    native, fp16 = has_native_bf16(device), vars(arguments).get("fp16")  # `None`: only bf16 can be asked for
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if arguments.bf16 is not None or fp16:
        chosen, reason = "bf16" if arguments.bf16 else "fp16" if fp16 else "no", "as asked for"
    elif launched == "bf16" or (launched != "no" and fp16 is not None):
        chosen, reason = launched, f"as accelerate launch was told with --mixed_precision {launched}"
    elif (recorded := _recorded_bf16(arguments.output_dir)) is not None:
        chosen, reason = "bf16" if recorded else "no", f"like what {arguments.output_dir} holds"
    else:
        chosen, reason = "bf16" if native else "no", f"the fastest that this device ({device}) computes natively"
    arguments.bf16 = chosen == "bf16"
    if chosen == "fp16":
        arguments.fp16 = True
    if launched != "no":  # transformers would follow it in spite of `bf16=False`
        os.environ["ACCELERATE_MIXED_PRECISION"] = chosen
    name = "fp32" if chosen == "no" else f"{chosen} autocast"
    message = f"Precision: {name}, {reason}. --bf16 true or false overrules it."
    weights = vars(arguments).get("dtype")
    if weights not in (None, "auto", "float32"):
        message += f" Weights: {weights}, as asked for with --dtype."
    if native or not (arguments.bf16 or weights == "bfloat16"):
        return logging.INFO, message
    emulation = "emulates bf16: with AVX2 alone, a CPU was measured to take 10 times as long for a step as in fp32"
    return logging.WARNING, f"{message} This device ({device}) {emulation}."


def _recorded_bf16(folder: str | None) -> bool | None:
    """Whether the stages in `folder`, or the one that wrote it, were run in bf16; `None` if there are none."""
    folder = Path(folder or "trainer_output")  # transformers' default
    for stage in (folder, f"{folder}.partial", folder / "annotated", folder / "annotated.partial"):
        arguments = run_arguments(stage)
        recorded = arguments.get("bf16", arguments.get("config", {}).get("bf16"))
        if recorded is not None:
            return recorded
    return None
