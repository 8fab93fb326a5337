"""Where the time of a training step goes on this GPU, in three parts.

    python benchmarks/train/probe/run.py --out OUT [--only micro,kernels,e2e] [--budget 200]

``micro``: single products and attention (micro.py). ``kernels``: the toolkit's kernels against
float64, then their time by tile (kernels.py). ``e2e``: whole steps by variant, some with a profile
of their kernels (steps.py). Llama-3.1-8B shape with random weights. One JSON line per measurement in
OUT/probe.jsonl as it is taken, profiles as text beside it. ``--tiny`` takes whole steps on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:] = [
    str(ROOT),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from benchmarks.train.probe.book import Book  # noqa: E402

PARTS = ("kernels", "e2e")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="for probe.jsonl and profiles")
    parser.add_argument("--budget", type=float, default=200, help="seconds for all of it")
    parser.add_argument(
        "--only", help="parts, by commas: micro, kernels, e2e; default the last two"
    )
    parser.add_argument("--match", default="", help="whole steps whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="whole steps, in a size for a CPU")
    return parser.parse_args()


def main() -> None:
    """Measure part after part; what fails is written down and the next is taken."""
    import torch

    options = parse()
    parts = options.only.split(",") if options.only else PARTS
    book = Book(options.out, options.budget)
    device = None if options.tiny else torch.cuda.get_device_name()
    book.add(part="about", torch=torch.__version__, device=device)
    if "micro" in parts and not options.tiny:
        from benchmarks.train.probe import micro

        micro.measure(book)
    if "kernels" in parts and not options.tiny:
        from benchmarks.train.probe import kernels

        kernels.measure(book)
    if "e2e" in parts:
        from benchmarks.train.probe import steps

        steps.measure(book, options.match, tiny=options.tiny)


if __name__ == "__main__":
    main()
