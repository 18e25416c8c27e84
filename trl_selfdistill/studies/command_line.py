# SPDX-License-Identifier: Apache-2.0
"""What all scripts share: flags and YAML into dataclasses, a help that reads well, what is logged, and Ctrl-C."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import disable_progress_bars
from trl import TrlParser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the paragraphs of the description, adds the defaults that there are, and shows each flag once."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action):
        # HfArgumentParser also takes every `--some_flag` as `--some-flag`
        flags = [flag for flag in action.option_strings if "_" in flag] or action.option_strings
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return " ".join([", ".join(flags), value] if action.nargs != 0 else [", ".join(flags)])


def build_parser(
    dataclass_types: Iterable[type], description: str, prog: str | None = None, presets: Iterable[str] = ()
) -> TrlParser:
    """
    A parser of flags and of `--config` files, whose help shows the flags of a script before the many of the training.

    Args:
        dataclass_types (`Iterable[type]`):
            What to parse. The flags of one with an `_argument_group_name` stand under that heading.
        description (`str`):
            The script's docstring.
        prog (`str`, *optional*):
            Name of the script.
        presets (`Iterable[str]`, *optional*):
            What `--preset` may be.
    """
    preset = f" [--preset {{{','.join(presets)}}}]" if presets else ""
    parser = TrlParser(
        dataclass_types,
        prog=prog,
        usage=f"accelerate launch --quiet scripts/%(prog)s{preset} [--config FILE.yaml] [flags]\n\n"
        "Every flag may stand in the YAML file too, without its dashes; flags win.",
        description=description.strip().replace("%", "%%"),
        formatter_class=_HelpFormatter,
    )
    options = parser._optionals
    options.title = "other flags"
    if any(not hasattr(dataclass_type, "_argument_group_name") for dataclass_type in dataclass_types):
        options.title = "training (SFTConfig of TRL and TrainingArguments of transformers)"
    parser._action_groups.remove(options)
    parser._action_groups.append(options)
    return parser


def expand_preset(flags: list[str], presets: dict[str, Path]) -> list[str]:
    """`flags` with the file of `--preset` as their `--config`; that of the first preset if there is neither."""
    if not presets:
        return flags
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=[*presets], default=next(iter(presets)))
    chosen, flags = parser.parse_known_args(flags)
    return flags if "--config" in flags else ["--config", str(presets[chosen.preset]), *flags]


def run_script(
    main: Callable, dataclass_types: Iterable[type], description: str, presets: dict[str, Path] | None = None
) -> None:
    """
    Parses the command line and calls `main` with one instance of each of `dataclass_types`.

    On Ctrl-C the process exits with status 130 and says how to go on.

    Args:
        main (`Callable`): What the script does.
        dataclass_types (`Iterable[type]`): See [`build_parser`].
        description (`str`): The script's docstring.
        presets (`dict[str, Path]`, *optional*):
            `--config` files by the names that `--preset` takes, the default first.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("trl_selfdistill").setLevel(logging.INFO)
    disable_progress_bars()  # those of datasets' small maps; SLiCK, training and evaluation keep theirs
    parser = build_parser(dataclass_types, description, presets=presets or ())
    arguments = parser.parse_args_and_config(expand_preset(sys.argv[1:], presets or {}))
    # Without a training configuration nobody has told accelerate that the processes of the launcher run on CPUs
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        main(*arguments)
        state.destroy_process_group()  # its threads may outlive the interpreter, which then aborts
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. What is done stays: run the same command again to go on.\n")
