# SPDX-License-Identifier: Apache-2.0
"""How a study goes to the Hub: a repository for each arm, its facts as a dataset, and the command that does it."""

import re
import shlex
from pathlib import Path

from ..hub.dataset_card import render_dataset_card
from ..hub.model_card import CARD_FILE, EVAL_RESULTS_FILE, RECORD_FILE, read_record
from ..hub.publishing import Publication, PublishError, refuse_tokens, select_files
from .stage import run_arguments


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def repo_ids(folders: list[Path], repo_id: str) -> dict[str, Path]:
    """
    The repository of each checkpoint: `repo_id` for one, `repo_id-<folder>` for several.

    ```python
    >>> list(repo_ids([Path("study/sft"), Path("study/frozen")], "alice/facts"))
    ['alice/facts-sft', 'alice/facts-frozen']
    ```

    Raises:
        PublishError: If `repo_id` has no namespace, or two folders have one name.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise PublishError(f"`repo_id` must have the form your-name/my-model, got {repo_id!r}.")
    if len(folders) == 1:
        return {repo_id: folders[0]}
    named = {f"{repo_id}-{folder.name}": folder for folder in folders}
    if len(named) < len(folders):
        raise PublishError(
            f"Checkpoints are told apart by the names of their folders, got {[f.name for f in folders]}."
        )
    return named


def plan_dataset(
    repo_id: str, annotated: str | None, mix: str | None, license: str | None, base_model: str | None
) -> Publication:
    """
    The facts of a study and their card.

    Args:
        repo_id (`str`): The dataset's repository.
        annotated (`str`, *optional*): Folder of annotate_facts.py, with `facts.jsonl`.
        mix (`str`, *optional*): Folder of build_training_mix.py, with `known.jsonl`, `new.jsonl` and `heldout.jsonl`.
        license (`str`, *optional*): Licence of the facts; it has to be given.
        base_model (`str`, *optional*): Hub id of the model that was asked.

    Raises:
        PublishError: If there is nothing to publish, or the licence is missing.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise PublishError(f"`dataset_repo_id` must have the form your-name/my-facts, got {repo_id!r}.")
    if license is None:
        raise PublishError("`dataset_license` is not set. Facts of GeoNames are cc-by-4.0; of your own, you decide.")
    splits, contents, left_out = {}, {}, {}
    for config, folder, names in (
        ("annotated", annotated, {"train": "facts.jsonl"}),
        ("mix", mix, {split: f"{split}.jsonl" for split in ("known", "new", "heldout")}),
    ):
        if folder is None:
            continue
        chosen, others = select_files(Path(folder), names.values())
        if missing := set(names.values()) - set(chosen):
            raise PublishError(f"`{config}` is {folder}, which holds no {', '.join(sorted(missing))}.")
        splits[config] = {split: chosen[name] for split, name in names.items()}
        contents |= {f"{config}/{name}": path for name, path in chosen.items()}
        left_out |= {f"{config}/{name}": reason for name, reason in others.items()}
    if not splits:
        raise PublishError(
            "`dataset_repo_id` is set, but neither `annotated` nor `mix`. Pass the folder of the facts."
        )
    settings = run_arguments(annotated).get("slick", {}) if annotated is not None else {}
    card = render_dataset_card(splits, repo_id, license, base_model, settings)
    return refuse_tokens(Publication(repo_id, "dataset", {**contents, CARD_FILE: str(card).encode()}, left_out))


def base_model_of_checkpoint(folder: Path) -> str | None:
    """The Hub id that a checkpoint goes back to, as its record has it."""
    return (read_record(folder).get("training") or {}).get("base_model")


def write_card(plan: Publication, folder: Path) -> Path:
    """
    Writes the card of a planned model, its record and its results into `folder`, and returns the card.

    Raises:
        PublishError: If nothing can be written there.
    """
    try:
        for name in (CARD_FILE, RECORD_FILE, EVAL_RESULTS_FILE):
            if name in plan.contents:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(plan.contents[name])
    except OSError as error:
        raise PublishError(
            f"The card could not be written into {folder}: {error.strerror}. Pass `--card_dir` with a folder that you "
            "may write to."
        ) from error
    return folder / CARD_FILE


def publish_command(folders: list[Path]) -> str:
    """
    The command that publishes finished arms, named after their base model.

    ```python
    >>> publish_command([Path("outputs/quickstart/sft")])
    'python scripts/publish_model.py --checkpoints outputs/quickstart/sft --repo_id YOUR_NAME/model-facts'
    ```
    """
    origin = base_model_of_checkpoint(folders[0]) or "model"
    words = ["python", "scripts/publish_model.py", "--checkpoints", *(folder.as_posix() for folder in folders)]
    return shlex.join([*words, "--repo_id", f"YOUR_NAME/{origin.split('/')[-1]}-facts"])
