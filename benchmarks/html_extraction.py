"""How well extract_html finds the articles of real pages, by the definitions of the article extraction benchmark.

--data is a folder in its layout (https://github.com/scrapinghub/article-extraction-benchmark): ground-truth.json, and
NAME.html.gz, here or in html/. A text's shingles are its sequences of four words, with how often they are there; for
each page precision and recall are over shingles; F1 is of the means of both. Asked of mode best: an F1 of at least
0.95.
"""

import argparse
import gzip
import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path

from megalm.curate.document import Document
from megalm.curate.steps.extract_html import ExtractHtml, ExtractHtmlSettings
from megalm.curate.web import decode_page
from megalm.errors import MegalmError, main_guard

ASKED = 0.95
_WORD = re.compile(r"\w+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of the benchmark")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="also name the N pages with the lowest F1")
    arguments = parser.parse_args()
    pages, truth = read(Path(arguments.data))
    best = 0.0
    for mode in ("fast", "best"):
        documents = [Document(name, page) for name, page in pages.items()]
        step = ExtractHtml(ExtractHtmlSettings(mode=mode))
        step.apply([Document("first", documents[0].text)])  # imports
        started = time.process_time()
        rejected = step.apply(documents)
        seconds = time.process_time() - started
        rows = {
            document.id: compare(truth[document.id], "" if verdict else document.text)
            for document, verdict in zip(documents, rejected)
        }
        precision, recall = (statistics.mean(column) for column in zip(*rows.values()))
        best = harmonic(precision, recall)
        megabytes = sum(len(page.encode()) for page in pages.values()) / 1e6
        print(
            f"{mode:5} {len(pages)} pages: F1 {best:.4f}, precision {precision:.4f}, recall {recall:.4f}, "
            f"{megabytes / seconds:.1f} MB of HTML a second of one core"
        )
        for name, (page_precision, page_recall) in sorted(rows.items(), key=lambda row: harmonic(*row[1]))[
            : arguments.worst
        ]:
            print(f"      {name[:16]} precision {page_precision:.3f}, recall {page_recall:.3f}")
    return 0 if best >= ASKED else 1


def read(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Pages, decoded as a reader does, and their articles."""
    try:
        truth = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise MegalmError(f"{folder} has no ground-truth.json ({error}): name the benchmark's folder") from None
    base = folder / "html" if (folder / "html").is_dir() else folder
    pages = {name: gzip.decompress((base / f"{name}.html.gz").read_bytes()) for name in truth}
    return (
        {name: decode_page(page)[0] for name, page in pages.items()},
        {name: row.get("articleBody", "") for name, row in truth.items()},
    )


def compare(true: str, said: str) -> tuple[float, float]:
    """Precision and recall."""
    expected, found = shingles(true), shingles(said)
    common = sum((expected & found).values())
    if expected == found:
        return 1.0, 1.0
    return common / max(1, sum(found.values())), common / max(1, sum(expected.values()))


def shingles(text: str) -> Counter[tuple[str, ...]]:
    """Fewer words than four are one."""
    words = _WORD.findall(text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3)) if words)


def harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


if __name__ == "__main__":
    main_guard(main)
