# SPDX-License-Identifier: Apache-2.0
"""
Publishes trained models on the Hugging Face Hub, each with its card and evaluation, and by choice the annotated facts
as a dataset and the metric as a Space. Repositories are private unless --public is given.

Input: checkpoints of this package's trainers. Output: a repository each, by a commit that is whole or not at all;
after an interruption the same command goes on, and sends nothing twice. Log in with `hf auth login` first: no flag
takes a token. With --dry-run nothing is sent: it prints every file with its size, and writes the card beside the
checkpoint, or below --card_dir.

    python scripts/publish_model.py --checkpoints outputs/quickstart/selfdistill --repo_id your-name/my-model --dry-run

    python scripts/publish_model.py --checkpoints outputs/quickstart/sft outputs/quickstart/selfdistill \\
        --repo_id your-name/my-study --dataset_repo_id your-name/my-facts --annotated outputs/quickstart/annotated \\
        --mix outputs/quickstart/mix --metric_repo_id your-name/hallucination
"""

import sys
from pathlib import Path

from trl_selfdistill.hub.publishing import PublishError, plan_metric, plan_model, publish
from trl_selfdistill.studies.arguments import PublishArguments
from trl_selfdistill.studies.command_line import run_script
from trl_selfdistill.studies.publishing import base_model_of_checkpoint, plan_dataset, repo_ids, write_card


def main(args: PublishArguments) -> None:
    """Plans everything before anything is sent, then writes the cards or pushes."""
    about = {"license": args.license, "base_model": args.base_model}
    about |= {"dataset_id": args.dataset_repo_id, "metric_id": args.metric_repo_id}
    try:
        folders = repo_ids([Path(folder) for folder in args.checkpoints], args.repo_id)
        plans = [plan_model(folder, repo_id, about) for repo_id, folder in folders.items()]
        if args.dataset_repo_id is not None:
            base_model = args.base_model or base_model_of_checkpoint(Path(args.checkpoints[0]))
            facts = (args.annotated, args.mix, args.dataset_license, base_model)
            plans.insert(0, plan_dataset(args.dataset_repo_id, *facts))
        if args.metric_repo_id is not None:
            plans.append(plan_metric(Path(args.metric_folder), args.metric_repo_id))
        for plan in plans:
            print(plan)
            if not args.dry_run:
                print(f"Published: {publish(plan, private=not args.public, create_pr=args.create_pr)}\n")
            elif plan.repo_type == "model":
                folder = folders[plan.repo_id]
                print(f"Card: {write_card(plan, Path(args.card_dir, folder.name) if args.card_dir else folder)}\n")
    except PublishError as error:
        sys.exit(str(error))
    if args.dry_run:
        print("Nothing was sent. Run it without --dry-run to publish.")


if __name__ == "__main__":
    run_script(main, (PublishArguments,), __doc__)
