"""Put runs, or checkpoints of them, side by side: a table, and pictures of their curves and scores."""

import argparse
from pathlib import Path

from megalm.errors import main_guard, writing
from megalm.metrics.compare import read_course, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="run folder, or RUN/checkpoints/step-N")
    parser.add_argument("--output", type=Path, metavar="FILE", help=".png, .pdf or .svg of the curves (default: none)")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="the same, of the scores (default: none)")
    parser.add_argument("--x", choices=["tokens", "steps"], default="tokens", help="horizontal axis (default: tokens)")
    parser.add_argument("--log-loss", action="store_true", help="logarithmic loss axis")
    arguments = parser.parse_args()

    from megalm.metrics.plot import plot_runs, plot_scores, short_names  # imports matplotlib, which takes seconds

    courses = [read_course(path) for path in arguments.paths]
    names = short_names(arguments.paths)
    print(table(names, courses))
    if arguments.output:
        runs = list(dict.fromkeys(course.run for course in courses))  # two checkpoints of a run share its curve
        with writing(arguments.output):
            plot_runs(runs, arguments.output, x=arguments.x, log_loss=arguments.log_loss)
        print(arguments.output)
    if arguments.scores:
        with writing(arguments.scores, "make room for it, or name another --scores"):
            drawn = plot_scores(names, courses, arguments.scores)
        print(arguments.scores if drawn else "no scores to draw yet: tools/evaluate_model.py makes them")


if __name__ == "__main__":
    main_guard(main)
