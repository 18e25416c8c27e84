# SPDX-License-Identifier: Apache-2.0
"""Measures SLiCK's two methods against each other on the facts of geonames: do they agree, and how much faster is one?

    python scripts/compare_slick_methods.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output slick_methods.json

The methods take turns, so that other load meets both. Only some facts are sampled; that time is scaled to 16 samples.
The limit of scoring is the time of its products (and of attention) at the rate of a large one.
"""

import argparse
import json
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfdistill.files import write_json
from trl_selfdistill.hallucination.exact_match import exact_match, spellings
from trl_selfdistill.slick.generation import predict_answers
from trl_selfdistill.slick.likelihood import score_answers
from trl_selfdistill.slick.prompts import few_shot_prompt
from trl_selfdistill.slick.slick import PRESETS, reserve_exemplars, slick_category
from trl_selfdistill.studies.facts.geonames import geonames_facts


QUICK = PRESETS["quick"]
SAMPLING = {"temperature": QUICK.temperature, "top_k": QUICK.top_k}
DEFAULTS = {"num_facts": 1000, "num_sampled_facts": 150, "num_samples": 4, "batch_size": 32, "max_new_tokens": 16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("slick_methods.json"))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32", help="bfloat16 is autocast")
    for name, default in (DEFAULTS | {"num_threads": 1, "seed": 0}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def choose_facts(args: argparse.Namespace):
    """About as many facts of each relation, in random order; and the exemplars of the relations' prompts."""
    facts = geonames_facts()
    exemplars, kept = reserve_exemplars(facts, QUICK.num_prompts, QUICK.num_shots, args.seed)
    facts = facts.select(kept).shuffle(seed=args.seed)
    rows_of = [[row for row, other in enumerate(facts["relation"]) if other == name] for name in exemplars]
    chosen = []
    for i, rows in enumerate(sorted(rows_of, key=len)):
        chosen += rows[: round((args.num_facts - len(chosen)) / (len(rows_of) - i))]
    return facts.select(chosen), exemplars


def ask_both(args, model, tokenizer, facts, exemplars) -> tuple[list[dict], dict[str, list[float]]]:
    """A record for each fact and prompt; and for each way of asking `[questions or samples, wall s, CPU s]`."""
    seconds = defaultdict(lambda: [0, 0.0, 0.0])

    def timed(name: str, count: int, function, *arguments, **options):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(model, tokenizer, *arguments, **options)
        for i, value in enumerate((count, time.perf_counter() - wall, time.process_time() - cpu)):
            seconds[name][i] += value
        return result

    sampled_rows = set(np.random.default_rng(args.seed).permutation(len(facts))[: args.num_sampled_facts].tolist())
    square, operations = torch.ones(2048, 2048), 0
    rows_of = {name: [i for i, other in enumerate(facts["relation"]) if other == name] for name in exemplars}
    pieces = [(rows, prompt) for name, rows in rows_of.items() for prompt in exemplars[name]]
    records, cut = [], {"max_new_tokens": args.max_new_tokens}
    for seed, (rows, prompt) in enumerate(tqdm(pieces, unit="piece")):
        texts = [few_shot_prompt(facts[row]["question"], prompt) for row in rows]
        forms = [[facts[row]["answer"], *facts[row]["aliases"]] for row in rows]
        scores = timed("score", len(rows), score_answers, texts, forms, batch_size=args.batch_size, **SAMPLING)
        with FlopCounterMode(display=False) as counter:
            score_answers(model, tokenizer, texts, forms, batch_size=args.batch_size, **SAMPLING)
        operations += counter.get_total_flops()
        timed("product", 2 * 2048**3, lambda *_: square @ square)
        greedy = timed("greedy", len(rows), predict_answers, texts, batch_size=args.batch_size, **cut)
        drawn = [i for i, row in enumerate(rows) if row in sampled_rows]
        how = {"num_samples": args.num_samples, "seed": seed, "batch_size": 2 * args.batch_size, **SAMPLING, **cut}
        samples = timed("sampled", len(drawn) * args.num_samples, predict_answers, [texts[i] for i in drawn], **how)
        samples = dict(zip(drawn, samples, strict=True))
        for i, row in enumerate(rows):
            record = {"fact": facts[row]["fact_id"], "prompt": texts[i], "samples": samples.get(i)}
            record["forms"] = [spelling for form in forms[i] for spelling in spellings(form)]
            record |= {"greedy": greedy[i][0], "is_right": exact_match(greedy[i][0], forms[i]), **scores[i]._asdict()}
            record["frequency"] = float(np.mean([exact_match(s, forms[i]) for s in samples.get(i, [""])]))
            records.append(record)
    # How long the operations of the scores would take at the rate of the large product
    count, *totals = seconds.pop("product")
    seconds["limit of a score"] = [len(records), *(operations / count * total for total in totals)]
    return records, seconds


def reason(record: dict, model, tokenizer) -> str:
    """Why the methods differ on a greedy answer."""
    if record["is_right"] and record["greedy"] not in record["forms"]:
        return "exact match accepts a form that is not scored"
    with torch.autocast(model.device.type, enabled=False):
        [[greedy]] = predict_answers(model, tokenizer, [record["prompt"]])
        [score] = score_answers(model, tokenizer, [record["prompt"]], [record["forms"]])
    agree = exact_match(greedy, record["forms"]) == score.is_greedy
    return "near-tie: asked alone in float32 the methods agree" if agree else "other (see the JSON)"


def categories(records: list[dict], num_samples: int) -> tuple[str, str]:
    """The categories of one fact by generation and by scores, from its records of all prompts."""
    p_greedy, frequency = (np.mean([record[key] for record in records]) for key in ("is_right", "frequency"))
    p_none = np.prod([(1 - record["p_sampled"]) ** num_samples for record in records])
    scored = slick_category(np.mean([record["is_greedy"] for record in records]), float(p_none <= 0.5))
    return slick_category(p_greedy, frequency).value, scored.value


def summarize(args, records: list[dict], seconds: dict, model, tokenizer) -> dict:
    drawn, sampled = [record for record in records if record["samples"]], defaultdict(list)
    for record in drawn:
        sampled[record["fact"]].append(record)
    differing = [record for record in records if record["is_right"] != record["is_greedy"]]
    for record in differing:
        record["reason"] = reason(record, model, tokenizer)
    pairs = Counter(categories(prompts, args.num_samples) for prompts in sampled.values())
    gaps = np.array([record["frequency"] - record["p_sampled"] for record in drawn])
    scored = [s in r["forms"] for r in drawn for s in r["samples"] if exact_match(s, r["forms"])]
    per = {name: [round(total / count, 5) for total in totals] for name, (count, *totals) in seconds.items()}
    return {
        "questions (facts x prompts)": len(records),
        "greedy outcomes agree": 1 - len(differing) / len(records),
        "reasons of the differences": Counter(record["reason"] for record in differing),
        "categories agree": sum(n for (one, other), n in pairs.items() if one == other) / pairs.total(),
        "categories (generate / score)": {" / ".join(pair): n for pair, n in sorted(pairs.items())},
        "mean frequency and probability": [np.mean([r[key] for r in drawn]) for key in ("frequency", "p_sampled")],
        "mean difference and its standard error": [gaps.mean(), gaps.std(ddof=1) / len(gaps) ** 0.5],
        "right samples in a form that is not scored": 1 - np.mean(scored),
        "seconds a question or sample (wall, CPU)": per,
        "1 greedy + 16 samples : score": [
            (g + 16 * s) / t for t, g, s in zip(*(per[name] for name in ("score", "greedy", "sampled")), strict=True)
        ],
    }


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.num_threads)  # more threads wait for each other where other work has the cores
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    facts, exemplars = choose_facts(args)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
        records, seconds = ask_both(args, model, tokenizer, facts, exemplars)
        summary = summarize(args, records, seconds, model, tokenizer)
    write_json(args.output, {"arguments": vars(args), "summary": summary, "records": records})
    print("| measure | value |\n|---|---|")
    for name, value in summary.items():
        print(f"| {name} | {json.dumps(value, ensure_ascii=False)} |")


if __name__ == "__main__":
    main()
