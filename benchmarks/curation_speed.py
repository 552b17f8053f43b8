"""The steps of curation against datatrove's own: MinHash signatures, and a pipeline from HTML to signatures.

Both read the same documents in this process, on one core, in turn, several rounds; ratios are of the same round, and
their median counts. datatrove runs as it comes, with the word tokeniser that it has for the language (spaCy; for
Chinese with jieba), and once more with a plain regular expression in its place. It needs datatrove[io], spacy and
jieba.

signatures: of 14 bands of 8 over 5-grams, written to a file by both. pipeline: extraction, Gopher's repetition and
quality, C4, FineWeb, signatures. Each document stands in a page with a menu. datatrove extracts with trafilatura, its
default; ours in mode fast, and for comparison in mode best. Language identification is left out, since datatrove would
download its model, and so is writing text.

Asked: signatures at least 60 times datatrove's default and 10 times its variant with a regular expression; the pipeline
at least 3 and 1.2 times. What both find is near_duplicates.py's.
"""

import argparse
import json
import re
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pydoc_data.topics import topics
from typing import Any

from megalm.curate.document import Document
from megalm.curate.recipe import step_class
from megalm.errors import MegalmError, main_guard

ASKED = {
    ("signatures", "default"): 60.0,
    ("signatures", "regex"): 10.0,
    ("pipeline", "default"): 3.0,
    ("pipeline", "regex"): 1.2,
}
FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3400-\u4dbf\u4e00-\u9fff]+|[^\w\s]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", metavar="FILE", help="JSONL with a field `text`; default: Python's help pages, English"
    )
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the data (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of text (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", choices=("signatures", "pipeline"), help="default: both")
    parser.add_argument(
        "--no-default", action="store_true", help="leave datatrove with its own tokeniser out: it is slow"
    )
    arguments = parser.parse_args()
    try:
        import datatrove  # noqa: F401
    except ModuleNotFoundError:
        raise MegalmError("datatrove is not installed: pip install 'datatrove[io]' spacy jieba 'xxhash<4'") from None
    texts = read(arguments.data, arguments.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {size:.2f} MB of text ({arguments.language})")
    variants = {"regex": regex_tokenizer()}
    if not arguments.no_default:
        variants = {"default": {"en": "eng_Latn", "zh": "cmn_Hani"}[arguments.language], **variants}
    good = True
    for what in ("signatures", "pipeline"):
        if arguments.only in (None, what):
            good &= compare(what, texts, arguments.language, variants, size, arguments.rounds)
    return 0 if good else 1


def read(path: str | None, megabytes: float) -> list[str]:
    """Documents up to that size, repeated if there are too few (speed does not depend on it)."""
    if path is None:
        found = [text for _, text in sorted(topics.items())]
    else:
        with open(path, encoding="utf-8") as file:
            found = [json.loads(line)["text"] for line in islice(file, 200_000)]
    texts: list[str] = []
    total = 0.0
    while total < megabytes * 1e6:
        for text in found:
            texts.append(text if len(texts) < len(found) else f"{len(texts)} {text}")
            total += len(text.encode())
            if total >= megabytes * 1e6:
                break
    return texts


def compare(what: str, texts: list[str], language: str, variants: dict[str, Any], size: float, rounds: int) -> bool:
    runs: dict[str, Callable[[], None]] = {}
    if what == "signatures":
        runs["ours"] = lambda: our_signatures([Document(str(i), text) for i, text in enumerate(texts)])
        for name, tokenizer in variants.items():
            runs[name] = lambda tokenizer=tokenizer: their_signatures(texts, tokenizer)  # type: ignore[misc]
    else:
        pages = [page(text) for text in texts]
        runs["ours"] = lambda: our_pipeline(pages, language, "fast")
        runs["ours, mode best"] = lambda: our_pipeline(pages, language, "best")
        for name, tokenizer in variants.items():
            runs[name] = lambda tokenizer=tokenizer: their_pipeline(pages, tokenizer)  # type: ignore[misc]
    for tokenizer in variants.values():  # compile, import, load
        their_signatures(texts[:2], tokenizer)
        their_pipeline([page(text) for text in texts[:2]], tokenizer)
    our_signatures([Document("1", texts[0])])
    our_pipeline([page(texts[0])], language, "best")
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            started = used()
            run()
            seconds[name].append(used() - started)
    good = True
    for name in runs:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"]))
        asked = ASKED.get((what, name))
        good &= asked is None or ratio >= asked
        label = name if name.startswith("ours") else f"datatrove, {name}"
        told = f"{size / statistics.median(seconds[name]):8.2f} MB/s; ours is {ratio:6.1f} times as fast"
        print(f"{what:10} {label:18} {told}{f' (asked: {asked:g})' if asked else ''}")
    return good


def used() -> float:
    """Seconds of processors, those of ended child processes too: datatrove extracts in one."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def page(text: str) -> str:
    menu = "".join(f'<li><a href="/{number}">Entry {number}</a></li>' for number in range(12))
    body = "".join(
        f"<p>{line.replace('&', '&amp;').replace('<', '&lt;')}</p>" for line in text.split("\n") if line.strip()
    )
    return f"<html><head><title>x</title></head><body><nav><ul>{menu}</ul></nav><article>{body}</article></body></html>"


def batches(documents: Sequence[Document], size: int = 256) -> list[Sequence[Document]]:
    return [documents[begin : begin + size] for begin in range(0, len(documents), size)]


def our_signatures(documents: list[Document]) -> None:
    cls = step_class("near_duplicates")
    step: Any = cls(cls.Settings())
    with tempfile.TemporaryFile() as file:
        for batch in batches(documents):
            file.write(step.sketch(batch))


def our_pipeline(pages: list[str], language: str, mode: str) -> None:
    extract = step_class("extract_html")
    steps = [extract(extract.Settings.model_validate({"mode": mode}))]
    steps += [cls(cls.Settings()) for cls in map(step_class, FILTERS)]
    kept: list[Document] = []
    documents = [Document(str(number), text, {"language": language}) for number, text in enumerate(pages)]
    for batch in batches(documents):
        for step in steps:
            batch = [document for document, answer in zip(batch, step.apply(batch)) if answer is None]
        kept += batch
    our_signatures(kept)


# datatrove


def regex_tokenizer() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Regex(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end] for start, end in self.span_tokenize(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in re.finditer(r"[^.!?。！？]+[.!?。！？]*", text)]

    return Regex()


def their_documents(texts: list[str]) -> Any:
    from datatrove.data import Document as Theirs

    return (Theirs(text=text, id=str(number)) for number, text in enumerate(texts))


def their_signatures(texts: list[str], tokenizer: Any, documents: Any = None) -> None:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    with tempfile.TemporaryDirectory() as folder:
        step = MinhashDedupSignature(folder, config=MinhashConfig(), language=tokenizer)
        for _ in step.run(documents or their_documents(texts), 0, 1) or ():
            pass


def their_pipeline(pages: list[str], tokenizer: Any) -> None:
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    documents: Any = Trafilatura(timeout=10).run(their_documents(pages))
    for cls in (GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter, FineWebQualityFilter):
        documents = cls(language=tokenizer).run(documents, 0, 1)
    their_signatures([], tokenizer, documents)


if __name__ == "__main__":
    main_guard(main)
