# SPDX-License-Identifier: Apache-2.0
"""
Publishes trained models on the Hugging Face Hub, each with its card and evaluation, and by choice the annotated facts
as a dataset and the metric as a Space. Repositories are private unless --public is given.

Input: checkpoints of this package's trainers. Output: a repository each, by a commit that is whole or not at all;
after an interruption the same command goes on, and sends nothing twice. Log in with `hf auth login` first: no flag
takes a token. With --dry-run nothing is sent: it prints every file with its size, and writes the cards to --card_dir.

    trl-selfdistill publish --checkpoints outputs/quickstart/selfdistill --repo_id your-name/my-model --dry-run

    trl-selfdistill publish --checkpoints outputs/quickstart/sft outputs/quickstart/selfdistill \\
        --repo_id your-name/my-study --dataset_repo_id your-name/my-facts --dataset_license cc-by-4.0 \\
        --annotated outputs/quickstart/annotated --mix outputs/quickstart/mix --metric_repo_id your-name/hallucination
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from trl_selfdistill.files import shipped, written_whole
from trl_selfdistill.hub.model_card import CARD_FILE, read_record
from trl_selfdistill.hub.publishing import Publication, PublishError, plan_model, publish, select_files
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.publishing import plan_dataset, repo_ids


@dataclass
class PublishArguments:
    """What to publish, and where. Tokens come from `hf auth login` only."""

    _argument_group_name = "publishing"

    checkpoints: list[str] = field(metadata={"help": "Folders of trained models or adapters."})
    repo_id: str = field(
        metadata={
            "help": "Repository, as your-name/my-model; with several checkpoints, `-<folder>` is added for each."
        }
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the models, where that of the base is not known."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base model, where a local folder was the start."}
    )
    dataset_repo_id: str | None = field(
        default=None, metadata={"help": "Publish the facts too, as your-name/my-facts (with annotated, mix or both)."}
    )
    annotated: str | None = field(default=None, metadata={"help": "Folder of `annotate`."})
    mix: str | None = field(default=None, metadata={"help": "Folder of `mix`."})
    dataset_license: str | None = field(
        default=None, metadata={"help": "Licence of the facts (cc-by-4.0 where they are from GeoNames)."}
    )
    metric_repo_id: str | None = field(
        default=None, metadata={"help": "Publish the metric too, as the Space your-name/hallucination."}
    )
    metric_folder: str = field(
        default=str(shipped("evaluate_metrics/hallucination")), metadata={"help": "Folder of the metric."}
    )
    public: bool = field(default=False, metadata={"help": "Make new repositories public rather than private."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request rather than commit."})
    dry_run: bool = field(default=False, metadata={"help": "Send nothing, and show every file with its size."})
    card_dir: str | None = field(default=None, metadata={"help": "Where a dry run writes the cards, to look at."})


def main(args: PublishArguments) -> None:
    """Plans everything before anything is sent, in one process."""
    if not PartialState().is_main_process:
        return
    try:
        plans = make_plans(args)
        for plan in plans:
            print(plan)
            if not args.dry_run:
                print(f"Published: {publish(plan, private=not args.public, create_pr=args.create_pr)}\n")
            elif args.card_dir is not None and plan.repo_type != "space":
                path = Path(args.card_dir, plan.repo_id, CARD_FILE)
                with written_whole(path) as partial:
                    partial.write_bytes(plan.contents[CARD_FILE])
                print(f"Card: {path}\n")
    except PublishError as error:
        sys.exit(str(error))
    if args.dry_run:
        print("Nothing was sent. Run it without --dry-run to publish.")


def make_plans(args: PublishArguments) -> list[Publication]:
    """What goes to which repository."""
    plans = []
    base_model = args.base_model
    if args.dataset_repo_id is not None:
        asked = base_model or read_record(Path(args.checkpoints[0])).get("training", {}).get("base_model")
        annotated, mix = (folder and Path(folder) for folder in (args.annotated, args.mix))
        plans.append(plan_dataset(args.dataset_repo_id, args.dataset_license, annotated, mix, asked))
    for repo_id, folder in repo_ids([Path(folder) for folder in args.checkpoints], args.repo_id).items():
        plans.append(plan_model(folder, repo_id, args.license, base_model, args.dataset_repo_id))
    if args.metric_repo_id is not None:
        plans.append(plan_metric(Path(args.metric_folder), args.metric_repo_id))
    names = [f"{plan.repo_type} {plan.repo_id.lower()}" for plan in plans]  # the Hub does not tell A from a
    if twice := {name for name in names if names.count(name) > 1}:
        raise PublishError(f"Two of what is published would be {', '.join(sorted(twice))}. Rename a folder.")
    return plans


def plan_metric(folder: Path, repo_id: str) -> Publication:
    """The files of a metric for a Space, which has to be called as its script: `evaluate` looks for that."""
    contents = select_files(folder, ["*.py", "README.md", "requirements.txt"])
    script = f"{repo_id.split('/')[-1]}.py"
    if script not in contents:
        raise PublishError(
            f"`evaluate` loads the Space {repo_id} from its file {script}, which {folder} does not hold. Call the "
            "Space as the metric, or pass another `--metric_folder`."
        )
    return Publication(repo_id, "space", contents)


if __name__ == "__main__":
    run_script(main, (PublishArguments,), __doc__)
