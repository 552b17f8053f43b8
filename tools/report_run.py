"""Write RUN/report.html and RUN/report.json: curves, model selection, scores per class, and the worst examples."""

import argparse
from pathlib import Path

from megalm.command_line import count
from megalm.errors import main_guard, writing
from megalm.sft.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, which holds metrics.jsonl")
    parser.add_argument(
        "--worst", type=count, default=20, metavar="N", help="examples per corpus (default: %(default)s)"
    )
    arguments = parser.parse_args()

    with writing(arguments.run / "report.html", "make room for it"):
        page = write_report(arguments.run, arguments.worst)
    print(page)


if __name__ == "__main__":
    main_guard(main)
