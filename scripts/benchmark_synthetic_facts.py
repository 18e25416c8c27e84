# SPDX-License-Identifier: Apache-2.0
"""
How fast synthetic facts are drawn, and how much memory that takes as their number grows.

Kinds of keys take turns, so that a busy machine slows all of them; medians with their spread are printed. Memory is
the most that Python and numpy held while the facts were read one by one, measured in a pass of its own.

    python scripts/benchmark_synthetic_facts.py --model_name_or_path outputs/quickstart/model
"""

import argparse
import statistics
import time
import tracemalloc

from transformers import AutoTokenizer

from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.synthetic.facts import SyntheticFacts


KINDS = {
    "recombined": {"keys": "recombined"},
    "pseudo": {"keys": "pseudo"},
    "overlap 0.5": {"keys": "overlap", "overlap": 0.5},
    "uuid": {"keys": "uuid"},
    "uuid, uuid values": {"keys": "uuid", "values": "uuid"},
}


def main() -> None:
    """Prints a table of facts a second, and one of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Model whose tokenizer the keys are made for.")
    parser.add_argument("--num_facts", type=int, default=200_000, help="Facts in each timed pass.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed passes of each kind.")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6], help="Numbers of facts for the memory."
    )
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    facts, places = geonames_facts(["P17"]), known_place_names()

    def stream(num_facts: int, options: dict) -> SyntheticFacts:
        return SyntheticFacts(facts, "P17", num_facts, tokenizer, exclude=places, **options)

    streams = {kind: stream(args.num_facts, options) for kind, options in KINDS.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, facts_of_kind in streams.items():
            started = time.perf_counter()
            for _fact in facts_of_kind:
                pass
            rates[kind].append(args.num_facts / (time.perf_counter() - started))
    print(f"{args.num_facts:,} facts a pass, {args.rounds} passes of each kind\n")
    print("| keys | facts a second, median [min, max] |\n|---|---|")
    for kind, values in rates.items():
        print(f"| {kind} | {statistics.median(values):,.0f} [{min(values):,.0f}, {max(values):,.0f}] |")

    print("\n| facts | peak memory, MiB |\n|---|---|")
    for size in args.sizes:
        rows = iter(stream(size, KINDS["recombined"]))
        tracemalloc.start()
        for _fact in rows:
            pass
        print(f"| {size:,} | {tracemalloc.get_traced_memory()[1] / 2**20:.1f} |", flush=True)
        tracemalloc.stop()


if __name__ == "__main__":
    main()
