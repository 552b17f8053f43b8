"""Draw the curves of one or several runs into one picture."""

import argparse
from pathlib import Path

from megalm.errors import main_guard, writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, which holds metrics.jsonl")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=".png, .pdf or .svg")
    parser.add_argument("--x", choices=["tokens", "steps"], default="tokens", help="horizontal axis (default: tokens)")
    parser.add_argument("--log-loss", action="store_true", help="logarithmic loss axis")
    parser.add_argument("--title", help="default: the run's name, if there is one run")
    arguments = parser.parse_args()

    from megalm.metrics.plot import plot_runs  # imports matplotlib, which takes seconds

    with writing(arguments.output):
        plot_runs(arguments.runs, arguments.output, x=arguments.x, log_loss=arguments.log_loss, title=arguments.title)
    print(arguments.output)


if __name__ == "__main__":
    main_guard(main)
