"""Write docs/config.md, the reference of every config key, from the docstrings of the config classes."""

import argparse
from pathlib import Path

from megalm.config import Branch, describe
from megalm.errors import main_guard
from megalm.training.config import RunConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

HEADER = """\
# Configuration

Every key of a run, its type, its default and what it means. `megalm/train.py --config FILE` reads a YAML file that
names only what differs from the defaults; `extends: other.yaml` (or a list) starts from other files, and
`--set train.steps=100` (repeatable) has the last word. `N` stands for a list index: `--set data.sources.0.path=...`.

This page is written by `python tools/write_config_docs.py`; change the docstrings in the packages' `config.py` instead.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    arguments = parser.parse_args()
    page = HEADER + "".join(section(branch) for branch in describe(RunConfig))
    if arguments.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        raise SystemExit("docs/config.md is not current: run `python tools/write_config_docs.py` and commit it")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    return 0


def section(branch: Branch) -> str:
    """One branch as Markdown."""
    title = f"`{branch.key}`" if branch.key else "The tree"
    lines = [
        "",
        f"## {title}",
        "",
        branch.meaning,
        "",
        "| Key | Type | Default | Meaning |",
        "| --- | --- | --- | --- |",
    ]
    for key in branch.keys:
        cells = (f"`{key.name}`", key.type, key.default, key.meaning)
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main_guard(main)
