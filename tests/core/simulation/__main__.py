"""Replay one seed with a trace."""

from __future__ import annotations

import argparse
import sys

from .world import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--large", action="store_true", help="the large world of that seed")
    arguments = parser.parse_args()
    result = run(arguments.seed, large=arguments.large, trace=lambda line: sys.stdout.write(line + "\n"))
    sys.stdout.write(f"{result}\n")


if __name__ == "__main__":
    main()
