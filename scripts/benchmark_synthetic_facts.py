# SPDX-License-Identifier: Apache-2.0
"""
How fast synthetic facts are drawn, and how much memory that takes.

For each kind of keys, prints the CPU time until the first fact and from then on, and the most memory that Python held
while the facts were read one by one, measured in a pass of its own.

    python scripts/benchmark_synthetic_facts.py --model_name_or_path outputs/quickstart/model
"""

import argparse
import time
import tracemalloc

from transformers import AutoTokenizer

from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.synthetic.facts import synthetic_facts


OVERLAPS = {"recombined": 1.0, "pseudo": 0.0, "overlap 0.5": 0.5, "uuid": None}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Model whose tokenizer the keys are made for.")
    parser.add_argument("--num_facts", type=int, nargs="+", default=[10**4, 10**5], help="Numbers of facts.")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    facts, places = geonames_facts(["P17"]), known_place_names()
    print("| keys | facts | until the first, s | facts a second | peak memory, MiB |\n|---|---|---|---|---|")
    for keys, overlap in OVERLAPS.items():
        for num_facts in args.num_facts:
            started = time.process_time()
            rows = synthetic_facts(facts, "P17", num_facts, tokenizer, overlap, exclude=places)
            ready = time.process_time()
            for _row in rows:
                pass
            rate = num_facts / (time.process_time() - ready)
            tracemalloc.start()
            for _row in rows:
                pass
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            print(f"| {keys} | {num_facts:,} | {ready - started:.1f} | {rate:,.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
