# SPDX-License-Identifier: Apache-2.0
"""What all scripts share: flags and YAML into dataclasses, what is logged, and Ctrl-C."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser
from yaml import YAMLError

from ..files import shipped
from .precision import choose_precision


logger = logging.getLogger(__name__)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the paragraphs of the description, and adds the defaults."""


class ScriptParser(TrlParser):
    """Chooses the precision where neither a flag nor the YAML file sets it, before TRL would."""

    precision: tuple[int, str] | None = None  # level and message, for the log
    usage_status = 2  # the exit status for wrong input

    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(self.usage_status, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        for flag in (word.partition("=")[0] for word in args or () if word.startswith("--")):
            if not any(name.startswith(flag) for name in (*self._option_string_actions, "--config")):
                self._refuse(flag)  # before argparse misses what it stands for
        namespace, others = super().parse_known_args(args, namespace)
        if hasattr(namespace, "bf16"):
            self.precision = choose_precision(namespace)
        return namespace, others

    def set_defaults_with_config(self, **kwargs):
        for name, value in kwargs.items():
            action = self._option_string_actions.get(f"--{name}")
            if isinstance(value, list | dict) and action and action.type in (int, float) and action.nargs is None:
                self.error(f"argument --{name}: expected one number, got {value!r}")
        for flag in super().set_defaults_with_config(**kwargs)[:1]:
            self._refuse(flag)
        return []

    def _refuse(self, flag: str) -> None:
        known = [*self._option_string_actions, "--config", "--num_processes"]
        near = [name for name in known if flag[2:] in name] or get_close_matches(flag, known, 1)
        self.error(f"unrecognized argument {flag}" + (f", did you mean {near[0]}?" if near else ""))


def _show_error(prog: str, kind: type, error: BaseException, trace: TracebackType) -> None:
    """Without a traceback what the file system says and what this package raises, which names what to change."""
    source = Path(traceback.extract_tb(trace)[-1].filename).resolve()
    is_own = any(source.is_relative_to(folder) for folder in (Path(__file__).parents[1], shipped("scripts").resolve()))
    if issubclass(kind, OSError) or (issubclass(kind, ValueError | ImportError) and is_own):
        sys.stderr.write(f"{prog}: error: {error}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def run_script(main: Callable, dataclass_types: Iterable[type], description: str, usage_status: int = 2) -> None:
    """
    Parses the command line and calls `main` with one instance of each of `dataclass_types`, whose
    `_argument_group_name` are the headings of the help below its `description`. The exit status is what `main` returns
    (nothing is 0), 130 on Ctrl-C, which says how to go on, 1 after an error about the input, without a traceback, and
    `usage_status` for flags that cannot be.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("trl_selfdistill").setLevel(logging.INFO)
    disable_progress_bars()  # those of datasets' small maps; SLiCK and training keep theirs
    if not sys.stderr.isatty():
        disable_progress_bar()  # those of loading and saving, which a file would hold in all their states
    usage = "%(prog)s [--config FILE.yaml] [flags]\n\nEvery flag may stand in the YAML file too, without its dashes; "
    parser = ScriptParser(
        dataclass_types,
        prog=" ".join(os.environ.get("TRL_SELFDISTILL_COMMAND", "").split()[:2]) or None,
        usage=usage + "flags win.",
        description=description.strip(),
        formatter_class=_HelpFormatter,
    )
    parser.usage_status = usage_status
    sys.excepthook = partial(_show_error, parser.prog)
    try:
        arguments = parser.parse_args_and_config()
    except (OSError, ValueError, YAMLError) as error:  # of a dataclass, about the values, or of the configuration
        parser.error(str(error))
    # Without a training configuration nobody has told accelerate that the processes of the launcher run on CPUs: not
    # told, it takes each of several for the only one
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    if not state.is_main_process:
        logging.getLogger("trl_selfdistill").setLevel(logging.ERROR)  # the main one says it once
    if parser.precision is not None:
        logger.log(*parser.precision)
    try:
        status = main(*arguments)
        state.destroy_process_group()  # its threads may outlive the interpreter, which then aborts
        if status and state.is_main_process:  # of the others the launcher would say that they failed, too
            sys.exit(status)
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. What is done stays: run the same command again to go on.\n")
