# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run resumes from: one that was written to its end, and can be read to its end.

Nothing is unpickled here: `trainer_state.json` is JSON, of a safetensors file the header is read, and of what torch
saved the table of contents of the archive.
"""

import errno
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from .training_data_record import check_training_data, describe_training_data, write_training_data


logger = logging.get_logger(__name__)


def last_complete_checkpoint(folder: Path) -> str | None:
    """
    The last checkpoint in `folder` that can be resumed from; `None` without one. A later one that a kill or a full
    disk cut off is passed over, with a warning that says what is wrong with it.
    """
    steps = {}
    for path in sorted(Path(folder).glob("checkpoint-*")):
        if (why := why_not_resumable(path)) is None:
            steps[_state_of(path).global_step] = os.fspath(path)
        else:
            logger.warning(f"{path} is not resumed from: {why}.")
    return steps[max(steps)] if steps else None


def why_not_resumable(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, or cut off in it; `None` if nothing is. Reads headers, not weights."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        _state_of(checkpoint)
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, which is written last: the run ended while it was saved"
    except ValueError as error:
        return f"{TRAINER_STATE_NAME} is cut off ({error})"
    return find_damage(checkpoint)


def find_damage(folder: Path) -> str | None:
    """The first file of a saved model or checkpoint that is missing or cut off, in words; `None` if all are whole."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        for shard in sorted(shards):
            if not (folder / shard).is_file():
                return f"{folder / shard} is missing, and {index.name} names it"
    for file in sorted(folder.rglob("*.safetensors")):  # adapters may be in folders of their own
        try:
            with safe_open(file, "numpy"):  # compares the length in the header with that of the file
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is cut off or damaged ({error})"
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not zipfile.is_zipfile(file):
            return f"{file} is cut off or damaged (its archive has no end)"
    return None


def find_checkpoint(resume_from_checkpoint: str | os.PathLike | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that `Trainer.train(resume_from_checkpoint)` stands for: a folder as given, the last complete one
    in `output_dir` for `True`, none for `None` and `False`.

    Raises:
        ValueError: If there is none, or it cannot be read to its end. The message names the file.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        last = last_complete_checkpoint(Path(output_dir))
        if last is None:
            found = {path.name: why_not_resumable(path) for path in Path(output_dir).glob("checkpoint-*")}
            what = "".join(f" {name}: {why}." for name, why in found.items())
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}).{what} Start the run anew, without "
                "`resume_from_checkpoint`."
            )
        return last
    checkpoint = Path(resume_from_checkpoint)
    if why := why_not_resumable(checkpoint):
        last = last_complete_checkpoint(checkpoint.parent)
        raise ValueError(
            f"Can't find a valid checkpoint at {checkpoint}: {why}. "
            + (f"The last complete one beside it is {last}." if last else "There is no complete one beside it.")
        )
    return os.fspath(checkpoint)


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(os.fspath(checkpoint / TRAINER_STATE_NAME))


class CheckpointMixin:
    """
    Makes a trainer resume exactly or not at all: from a checkpoint that is complete (`resume_from_checkpoint=True`
    takes the last such one), and with the dataset that it was written for. To be put before `Trainer` in the bases.
    """

    _checkpoint: str | None = None  # that training resumed from
    _training_data: dict | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        self._training_data = None
        self._checkpoint = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if self._checkpoint is not None:
            self.check_checkpoint(Path(self._checkpoint))
        return super().train(self._checkpoint, *args, **kwargs)

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Refuses a checkpoint that this run would not be the continuation of. Called before it is loaded."""
        if not self.args.ignore_data_skip:
            check_training_data(self._describe_training_data(), checkpoint)

    def _describe_training_data(self) -> dict | None:
        if self._training_data is None:  # once a run: it reads every token
            self._training_data = describe_training_data(self.train_dataset)
        return self._training_data

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with explain_full_disk(folder):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                # An earlier run may have left a complete one here, which is not while its files are replaced
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                write_training_data(self._describe_training_data(), folder)
            super()._save_checkpoint(model, trial)


@contextmanager
def explain_full_disk(checkpoint: Path) -> Iterator[None]:
    """Turns the errors of a full disk into one that says where it happened and which checkpoint is still good."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_disk_error(error):
            raise
        last = last_complete_checkpoint(checkpoint.parent)
        raise OSError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{checkpoint} could not be written to its end: {error}. Free some space there. "
            + (f"The last complete checkpoint is {last}, which `resume_from_checkpoint=True` takes." if last else ""),
        ) from error


def is_disk_error(error: Exception) -> bool:
    """Whether an error is that of a full disk, a quota or a limit of the size of files."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors reports a failed write as text only, and torch.save that its file is not as long as it should be
    text = str(error)
    is_torch_save = "inline_container" in text and ("unexpected pos" in text or "StreamWriter" in text)
    is_torch_save = is_torch_save or "iostream error" in text
    return getattr(error, "errno", None) in full or is_torch_save or any(f"os error {code}" in text for code in full)
