"""near_duplicates: what it finds, beside datatrove's MinHash and theory, and how it grows.

    python benchmarks/near_duplicates.py [--only quality | growth] [--pairs 20000] [--documents 10000 100000 1000000]

quality: documents of 300 units (words, Chinese characters) drawn by Zipf's law, and of each a copy with 1, 2 or 4 % of
the units replaced. A pair is found if one of its documents is removed. Copies with 15 % replaced (Jaccard similarity
about 0.3) are pairs that should not be found: what is removed of them, and both documents of a pair, counts against
precision. Both sides run their whole step on the same documents with the same parameters: 14 buckets of 8 hashes of
5-grams. `theory` is the mean of 1 - (1 - J^8)^14 over the exact Jaccard similarities J. The difference has its standard
error beside it, of pairs that only one side finds. Asked: recall at most 0.01 below datatrove's. datatrove is given a
regular expression as its tokeniser, so that units are the same on both sides; it needs
`pip install 'datatrove[io,processing]' 'xxhash<4'`, and is left out, with a note, where it is missing.

growth: a recipe of near_duplicates alone over JSONL of several numbers of documents, of which every tenth is an edited
copy, each part of it (sketching, merging, applying) by its own command of tools/curate.py. Memory is resident memory
of the largest process and of all of them at once, sampled; pages that processes share, and those of mapped files, which
the system may take back, count too. The exponent is the b of n^b between a size and the one before it; at small sizes
it is small, because starting takes most of the time. Then, from what the documents between the two largest sizes took,
what 10 TB on 100 nodes need, with the assumptions.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from megalm.curate.document import Document
from megalm.curate.plan import prepare
from megalm.curate.recipe import Recipe
from megalm.curate.steps.near_duplicates import _EDGE, NearDuplicates, NearDuplicatesSettings
from megalm.errors import main_guard

REPOSITORY = Path(__file__).resolve().parents[1]
SHARES = (0.01, 0.02, 0.04)
DIFFERENT = 0.15
UNITS = 300
SYLLABLES = ("ba", "ko", "li", "ter", "ma", "ni", "so", "ru", "pe", "do", "gan", "vi", "sha")
VOCABULARIES = {
    "en": [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES],
    "zh": [chr(code) for code in range(0x4E00, 0x4E00 + 2500)],
}
SETTINGS = NearDuplicatesSettings(keep="first")
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("quality", "growth"), help="default: both")
    parser.add_argument("--pairs", type=int, default=20_000, metavar="N", help="of each share (default: %(default)s)")
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[10**4, 10**5, 10**6], metavar="N", help="default: 10^4 10^5 10^6"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="default: one per core")
    parser.add_argument("--terabytes", type=float, default=10, metavar="N", help="to scale to (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=100, metavar="N", help="to scale to (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=32, metavar="N", help="of a node (default: %(default)s)")
    parser.add_argument(
        "--document-bytes", type=int, default=4000, metavar="N", help="of a page's text (default: %(default)s)"
    )
    arguments = parser.parse_args()
    good = True
    if arguments.only in (None, "quality"):
        for language in VOCABULARIES:
            good &= quality(language, arguments.pairs)
    if arguments.only in (None, "growth"):
        runs: list[Run] = []
        print("\n documents      MB  part       wall s    CPU s  MB largest  MB all  exponent")
        for count in sorted(arguments.documents):
            runs.append(grow(count, arguments.workers))
            print_growth(*runs[-2:])
        if len(runs) > 1:
            print_scale(*runs[-2:], arguments)
    return 0 if good else 1


# Quality


@dataclass
class Corpus:
    """Documents 2 i and 2 i + 1 are a pair, whose share of replaced units is shares[i]."""

    texts: list[str]
    shares: NDArray[np.float64]
    jaccard: NDArray[np.float64]


def planted(language: str, pairs: int) -> Corpus:
    draw = np.random.default_rng(0)
    vocabulary = VOCABULARIES[language]
    size = len(vocabulary)
    frequencies = 1 / np.arange(1, size + 1)
    shares = draw.permutation(np.repeat([*SHARES, DIFFERENT], pairs))
    texts: list[str] = []
    jaccard = np.empty(len(shares))
    for i, share in enumerate(shares):
        one = draw.choice(size, UNITS, p=frequencies / frequencies.sum())
        other = one.copy()
        places = draw.choice(UNITS, round(share * UNITS), replace=False)
        other[places] = (other[places] + draw.integers(1, size, len(places))) % size  # another unit, whichever
        texts += [("" if language == "zh" else " ").join(vocabulary[k] for k in each) for each in (one, other)]
        first, second = (set(shingles(each, size).tolist()) for each in (one, other))
        jaccard[i] = len(first & second) / len(first | second)
    return Corpus(texts, shares, jaccard)


def shingles(drawn: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Every five units in a row as one number."""
    count = len(drawn) - SETTINGS.shingle + 1
    numbers = np.zeros(count, dtype=np.int64)
    for k in range(SETTINGS.shingle):
        numbers = numbers * size + drawn[k : k + count]
    return numbers


def quality(language: str, pairs: int) -> bool:
    corpus = planted(language, pairs)
    removed = {"megalm": ours(corpus.texts)}
    try:
        removed["datatrove"] = theirs(corpus.texts)
    except ModuleNotFoundError as error:
        print(f"datatrove is left out, {error.name} is missing: pip install 'datatrove[io,processing]' 'xxhash<4'")
    good = True
    print(f"\n{language}: {pairs:,} pairs of {UNITS} units in each row; recall")
    print("edited  Jaccard  theory  " + "  ".join(f"{name:>9}" for name in removed) + "  difference")
    for share in (*SHARES, DIFFERENT):
        chosen = corpus.shares == share
        similarity = corpus.jaccard[chosen]
        theory = float(np.mean(1 - (1 - similarity**SETTINGS.rows) ** SETTINGS.bands))
        found = {name: gone.reshape(-1, 2)[chosen].any(axis=1) for name, gone in removed.items()}
        line = f"{share:5.0%}  {similarity.mean():8.3f}  {theory:6.4f}  "
        line += "  ".join(f"{each.mean():9.4f}" for each in found.values())
        if "datatrove" in found:
            apart = found["megalm"].astype(float) - found["datatrove"]
            error = float(apart.std() / math.sqrt(len(apart)))
            line += f"  {apart.mean():+.4f} ± {error:.4f}"
            good &= share == DIFFERENT or apart.mean() >= -0.01 - 2 * error
        print(line)
    for name, gone in removed.items():
        both = gone.reshape(-1, 2)
        right = both.any(axis=1)[corpus.shares != DIFFERENT].sum()
        print(f"precision of {name:9} {right / max(1, both.sum()):.4f}")
    return good


def ours(texts: list[str]) -> NDArray[np.bool_]:
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    step = NearDuplicates(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        sketch, verdicts = Path(folder, "sketch"), Path(folder, "verdicts")
        with sketch.open("wb") as file:
            for begin in range(0, len(documents), 1000):
                file.write(step.sketch(documents[begin : begin + 1000]))
        verdicts.mkdir()
        step.merge([sketch], verdicts)
        step.judge(verdicts)
        return np.array([answer is not None for answer in step.apply(documents)])


def theirs(texts: list[str]) -> NDArray[np.bool_]:
    from datatrove.data import Document as Theirs
    from datatrove.pipeline.dedup import minhash
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Regex(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError  # MinHash has no sentences

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    def documents() -> Iterator[Any]:
        return (Theirs(text=text, id=str(number)) for number, text in enumerate(texts))

    logger.disable("datatrove")
    config = minhash.MinhashConfig(
        n_grams=SETTINGS.shingle, num_buckets=SETTINGS.bands, hashes_per_bucket=SETTINGS.rows, seed=SETTINGS.seed
    )
    left = np.zeros(len(texts), dtype=np.bool_)
    with tempfile.TemporaryDirectory() as folder:
        signatures, buckets, clusters = (f"{folder}/{name}" for name in ("signatures", "buckets", "clusters"))
        minhash.MinhashDedupSignature(signatures, config=config, language=Regex()).run(documents())
        for bucket in range(SETTINGS.bands):
            minhash.MinhashDedupBuckets(signatures, buckets, config=config).run(None, bucket, SETTINGS.bands)
        minhash.MinhashDedupCluster(buckets, clusters, config=config).run()
        for document in minhash.MinhashDedupFilter(clusters).run(documents()):
            left[int(document.id)] = True
    return ~left


# Growth

PARTS = {"sketch": "phase:0", "merge": "merge:1", "apply": "phase:1", "finish": "finish"}


@dataclass
class Use:
    """What a command took: seconds of the clock and of processors, MB of its largest process and of all at once."""

    wall: float
    cpu: float
    largest: float
    all: float


@dataclass
class Run:
    documents: int
    megabytes: float
    """Of JSONL."""
    parts: dict[str, Use]


def grow(count: int, workers: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.jsonl")
        write(source, count)
        recipe = {
            "name": "growth",
            "directory": f"{folder}/out",
            "sources": [{"name": "source", "path": str(source)}],
            "steps": [{"kind": "near_duplicates"}],
        }
        Path(folder, "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML too
        prepare(Recipe.model_validate(recipe))
        parts = {name: use(Path(folder, "recipe.yaml"), part, workers) for name, part in PARTS.items()}
        return Run(count, source.stat().st_size / 1e6, parts)


def write(path: Path, count: int, words: int = 200) -> None:
    """Every tenth document is the one before it with two words replaced."""
    draw = np.random.default_rng(0)
    vocabulary = np.array(VOCABULARIES["en"])
    frequencies = 1 / np.arange(1, len(vocabulary) + 1)
    steps = np.cumsum(frequencies / frequencies.sum())
    with path.open("w") as file:
        for begin in range(0, count, 1000):
            drawn = np.searchsorted(steps, draw.random((min(1000, count - begin), words)) * steps[-1])
            drawn[9::10] = drawn[8::10][: len(drawn[9::10])]
            drawn[9::10, [50, 150]] = draw.integers(len(vocabulary), size=(len(drawn[9::10]), 2))
            file.writelines(json.dumps({"text": " ".join(row)}) + "\n" for row in vocabulary[drawn].tolist())


def use(recipe: Path, part: str, workers: int) -> Use:
    command = [sys.executable, str(REPOSITORY / "tools" / "curate.py"), "--config", str(recipe), "--only", part]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with (recipe.parent / "said").open("w+") as said:
        started = time.monotonic()
        process = psutil.Popen(
            [*command, "--workers", str(workers)], env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        largest, together = 0.0, 0.0
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            sizes = [resident(each) for each in [process, *process.children(recursive=True)]]
            largest, together = max(largest, *sizes), max(together, sum(sizes))
            time.sleep(0.05)
        wall = time.monotonic() - started
        said.seek(0)
        assert status == 0, f"{part} failed: {said.read()}"
    largest = max(largest, used.ru_maxrss / 1024)  # of the command and what it waited for
    return Use(wall, used.ru_utime + used.ru_stime, largest, max(together, largest))


def resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def print_growth(*runs: Run) -> None:
    """The last of them; the exponent, if there is one before it."""
    run = runs[-1]
    columns = [together(run) for run in runs]
    for name, each in columns[-1].items():
        line = f"{run.documents:10,} {run.megabytes:7.0f}  {name:9} {each.wall:7.1f}  {each.cpu:7.1f}"
        line += f"  {each.largest:10.0f}  {each.all:6.0f}"
        if len(runs) > 1:
            steeper = math.log(each.wall / columns[0][name].wall) / math.log(run.documents / runs[0].documents)
            line += f"  {steeper:8.2f}"
        print(line, flush=True)


def together(run: Run) -> dict[str, Use]:
    """The parts, and all of them, one after the other."""
    every = list(run.parts.values())
    wall, cpu = sum(each.wall for each in every), sum(each.cpu for each in every)
    whole = Use(wall, cpu, max(each.largest for each in every), max(each.all for each in every))
    return {**run.parts, "together": whole}


def print_scale(smaller: Run, larger: Run, asked: argparse.Namespace) -> None:
    """By what the documents took that the larger run has more: without what starting takes."""
    spread = [sum(use.cpu for name, use in run.parts.items() if name != "merge") for run in (smaller, larger)]
    per_megabyte = (spread[1] - spread[0]) / (larger.megabytes - smaller.megabytes)
    merging = larger.parts["merge"].wall - smaller.parts["merge"].wall
    per_document = merging / (larger.documents - smaller.documents)
    if min(per_megabyte, per_document) <= 0:
        print("\nthese sizes are too small to tell what a document takes from what starting takes")
        return

    documents = round(asked.terabytes * 1e12 / asked.document_bytes)
    hours = per_megabyte * asked.terabytes * 1e6 / (asked.nodes * asked.cores) / 3600
    rate = asked.terabytes * 1e6 / asked.nodes / (hours * 3600)
    step = NearDuplicates(NearDuplicatesSettings())
    edges = documents * step.settings.bands
    print(f"""
{asked.terabytes:g} TB on {asked.nodes} nodes of {asked.cores} cores, near_duplicates alone.
Assumed: {asked.document_bytes:,} bytes a document, so {documents:,} documents; cores as fast as those of this machine,
all of them busy; storage that keeps up; time in proportion to bytes (sketch, apply, finish) and to documents (merge).
sketch, apply, finish: {per_megabyte:.3f} CPU s/MB, {hours:.2f} hours, {rate:.0f} MB/s read by a node
merge, in one process: {1e6 * per_document:.1f} s per million documents, {per_document * documents / 3600:.2f} hours
  sketches:            {documents * step._sketch.itemsize / 1e9:,.0f} GB on the storage that nodes share
  files of the merge:  {edges * _EDGE.itemsize / 1e9:,.0f} GB of bands, {documents * 28 / 1e9:,.0f} GB of clusters
  memory of the merge: {step.settings.memory_mb / 1e3:.1f} GB to sort bands; at best
                       {documents * 8 / 1e9:.0f} GB more, in which the system keeps the clusters' parents""")


if __name__ == "__main__":
    main_guard(main)
