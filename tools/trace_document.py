"""Show one document's way through a recipe: what each step changed, and where it was left behind."""

import argparse
import json
import sys

from megalm.command_line import count
from megalm.config import load
from megalm.curate.recipe import Recipe
from megalm.curate.trace import Stage, find, trace
from megalm.errors import main_guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or recipe.yaml of an output folder")
    parser.add_argument("id", metavar="ID", help="of a document, as the report and the output have it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--lines", type=count, default=12, metavar="N", help="of each change and text (default: 12)")
    parser.add_argument("--json", action="store_true", help="a JSON object per step instead")
    arguments = parser.parse_args()
    recipe = load(arguments.recipe, Recipe, arguments.set)
    document = find(recipe, arguments.id)
    if not arguments.json:
        print(f"{document.id}: {len(document.text):,} characters, {_short(document.metadata)}")
        print(_cut(document.text.splitlines(), arguments.lines, "    "))
    stage = None
    for stage in trace(recipe, document):
        if arguments.json:
            print(json.dumps(vars(stage), ensure_ascii=False))
        else:
            _show(stage, arguments.lines)
    if not arguments.json:
        gone = stage is not None and stage.rejected is not None
        print("left behind" if gone else f"goes on to the end: {len(document.text):,} characters")
        if not gone:
            print(_cut(document.text.splitlines(), arguments.lines, "    "))


def _show(stage: Stage, lines: int) -> None:
    size = f"{stage.characters_in:,} -> {stage.characters_out:,} characters" if stage.changes else "text unchanged"
    print(f"{stage.index} {stage.kind}: {stage.note or stage.rejected and f'REJECTED: {stage.rejected}' or size}")
    if stage.metadata:
        print(f"    metadata: {_short(stage.metadata)}")
    if stage.measures:
        print(f"    measures: {', '.join(f'{name} {value:.4g}' for name, value in stage.measures.items())}")
    if stage.changes:
        print(_cut(stage.changes, lines, "    "))


def _cut(lines: list[str], most: int, indent: str) -> str:
    shown = [indent + (line if len(line) <= 160 else line[:159] + "…") for line in lines[:most]]
    more = [f"{indent}({len(lines) - most:,} more lines)"] if len(lines) > most else []
    return "\n".join([*shown, *more])


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else text[:299] + "…"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal that is not UTF-8
    main_guard(main)
