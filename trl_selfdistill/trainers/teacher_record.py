# SPDX-License-Identifier: Apache-2.0
"""Who the teacher of a run is, kept in each checkpoint: a resumed run goes on with the same one or not at all."""

import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .l2_to_teacher import L2ToTeacher
from .teacher import Teacher


TEACHER_FILE = "teacher.json"
# Of the run's `output_dir`: a teacher that cannot be had from anywhere else, kept once a run. Trainer's push to the
# Hub leaves out names that start with an underscore
TEACHER_FOLDER = "_teacher"


def write_teacher_record(teacher: Teacher | L2ToTeacher, folder: Path, name_or_path: str | None = None) -> None:
    """
    Writes `teacher.json` beside saved weights: the teacher's hash; where it was loaded by name, that name; and for
    `regularizer="l2"` the strength that the run has. A local path stays whole in checkpoints, which are resumed from;
    of what goes to the Hub it is the last part.
    """
    is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
    if name_or_path is not None and not is_checkpoint and Path(name_or_path).is_dir():
        name_or_path = Path(name_or_path).resolve().name
    record = {"sha256": teacher.sha256, "name_or_path": name_or_path}
    if isinstance(teacher, L2ToTeacher):
        record["l2_weight"] = teacher.weight
    (folder / TEACHER_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_teacher_record(teacher: Teacher | L2ToTeacher | None, checkpoint: Path) -> dict:
    """
    Compares the teacher of this run, `None` before its snapshot, with that of the checkpoint that it resumes from, and
    returns the latter's record.

    Raises:
        ValueError: If it is another one, or the checkpoint does not say whose it was.
    """
    file = checkpoint / TEACHER_FILE
    if teacher is None:
        if file.is_file():
            raise ValueError(
                f"{checkpoint} was written with a teacher, and `teacher_snapshot_steps` or `teacher_snapshot_epochs` "
                "would make the student, which has moved on since, the teacher later in this run. Set them as they "
                "were when the run was started, or start a new run."
            )
        return {}
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} has no {TEACHER_FILE}: it was not written with a teacher, so that there is none to go on "
            "with. Resume with `kl_weight=0`, or start a new run from the model in the checkpoint."
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(teacher, L2ToTeacher) != ("l2_weight" in record):
        raise ValueError(
            f"`regularizer` is not the one that {checkpoint} was trained with, which was "
            f"{'l2' if 'l2_weight' in record else 'kl'!r}. Set it to that, or start the run anew."
        )
    if teacher.sha256 != record["sha256"]:
        name = record.get("name_or_path")
        advice = (
            f"The run was started with `teacher_model_name_or_path={name!r}`: name it again, with the weights of then."
            if name
            else "Hand over the model (or `teacher_model`) that the run was started with, not the checkpoint's: "
            "`resume_from_checkpoint` loads the student's weights itself."
        )
        raise ValueError(
            f"The teacher is not the one that {checkpoint} was trained with: its SHA-256 is {teacher.sha256}, and "
            f"{TEACHER_FILE} has {record['sha256']}. {advice}"
        )
    return record
