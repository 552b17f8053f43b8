"""What came in, what went out, and why: counted by every task, added up for the report.

Everything here is bounded, whatever the number of documents, and the same whatever the order of the tasks: numbers are
counted by their first three digits, and the samples of a reason are the documents whose ids have the smallest hashes.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from megalm.curate.document import Document, Rejection
from megalm.curate.step import Step

ALL_MEASURED, THEN_EVERY = 2000, 16
"""Of the documents of a task that reach a step, the first so many are measured, then one in so many."""
FIRST_COUNTED, COUNTED_SHARE = 100, 64
"""Of the documents of a task that reach a step, the tokens of the first so many are counted, and of one in so many by a
hash of its id: where its text does not change it is tokenised once for all steps."""
MOST_VALUES = 200
"""Values of a metadata key that are told apart; the rest are counted together."""
OTHERS = "(others)"


@dataclass
class Measure:
    """How a number is distributed over documents: rounded value -> count."""

    kept: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)


@dataclass
class TokenCount:
    """Characters and tokens of a sample."""

    characters: int = 0
    tokens: int = 0

    def estimate(self, characters: int) -> int | None:
        """Tokens of so many characters; None where nothing was counted."""
        return round(characters * self.tokens / self.characters) if self.characters else None


@dataclass
class StepTally:
    """A step. samples: reason -> [hash, id, detail, beginning of the text], sorted."""

    kind: str
    documents_in: int = 0
    documents_out: int = 0
    characters_in: int = 0
    characters_out: int = 0
    counted_in: TokenCount = field(default_factory=lambda: TokenCount())
    counted_out: TokenCount = field(default_factory=lambda: TokenCount())
    changed: int = 0
    """Documents that go on with another text."""
    seconds: float = 0.0
    """Of one core."""
    reasons: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[tuple[int, str, str, str]]] = field(default_factory=dict)
    measures: dict[str, Measure] = field(default_factory=dict)


@dataclass
class SourceTally:
    """What a source gave. sampled_out: documents that its share leaves out."""

    documents: int = 0
    characters: int = 0
    sampled_out: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)


@dataclass
class Tally:
    """Of a task or of all of them. steps: by their index in the recipe."""

    sources: dict[str, SourceTally] = field(default_factory=dict)
    steps: dict[int, StepTally] = field(default_factory=dict)
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Of one core: reading, writing, sketching."""
    lengths: Measure = field(default_factory=Measure)
    """Characters of documents: kept as they are written, removed as they were read."""
    counts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Of what is written: metadata key -> value -> [documents, characters]."""

    def add(self, other: "Tally", samples: int) -> None:
        """Add what another task counted."""
        for name, source in other.sources.items():
            mine = self.sources.setdefault(name, SourceTally())
            _add(mine, source)
        for index, step in sorted(other.steps.items()):
            kept = self.steps.setdefault(index, StepTally(step.kind))
            _add(kept, step)
            _add(kept.counted_in, step.counted_in)
            _add(kept.counted_out, step.counted_out)
            for reason, found in step.samples.items():
                kept.samples[reason] = _smallest([*kept.samples.get(reason, []), *found], samples)
            for name, measure in step.measures.items():
                _add(kept.measures.setdefault(name, Measure()), measure)
        _add(self, other)
        _add(self.lengths, other.lengths)
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for key, values in other.counts.items():
            for value, (documents, characters) in values.items():
                _count(self.counts.setdefault(key, {}), value, documents, characters)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @staticmethod
    def of_plain(plain: Mapping[str, Any]) -> "Tally":
        """From what plain() gave, also after a way through JSON."""
        given = dict(plain)
        given["sources"] = {
            name: SourceTally(
                **source | {"malformed": Counter(source["malformed"]), "passed_over": Counter(source["passed_over"])}
            )
            for name, source in given["sources"].items()
        }
        steps = {}
        for index, step in given["steps"].items():
            samples = {reason: [tuple(sample) for sample in found] for reason, found in step["samples"].items()}
            measures = {name: _measure(measure) for name, measure in step["measures"].items()}
            counted = {name: TokenCount(**step[name]) for name in ("counted_in", "counted_out")}
            parts = {"samples": samples, "measures": measures, "reasons": Counter(step["reasons"]), **counted}
            steps[int(index)] = StepTally(**step | parts)
        return Tally(**given | {"steps": steps, "lengths": _measure(given["lengths"])})


def _plain(value: Any) -> Any:
    """dataclasses.asdict, which cannot copy a Counter."""
    if is_dataclass(value):
        return {name: _plain(item) for name, item in vars(value).items()}
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _measure(plain: Mapping[str, Any]) -> Measure:
    return Measure(Counter(plain["kept"]), Counter(plain["removed"]))


def _add(mine: Any, other: Any) -> None:
    """Add the numbers and counters among two records' attributes."""
    for name, value in vars(other).items():
        if isinstance(value, Counter):
            getattr(mine, name).update(value)
        elif isinstance(value, int | float):
            setattr(mine, name, getattr(mine, name) + value)


def _smallest(samples: list[tuple[int, str, str, str]], count: int) -> list[tuple[int, str, str, str]]:
    return sorted(samples)[:count]


def _count(values: dict[str, list[int]], value: str, documents: int, characters: int) -> None:
    if value not in values and len(values) >= MOST_VALUES:
        value = OTHERS
    sums = values.setdefault(value, [0, 0])
    sums[0] += documents
    sums[1] += characters


def rounded(value: float) -> str:
    """The first three digits of a number, by which it is counted."""
    return f"{value:.3g}"


def hash_of(identity: str, purpose: str) -> int:
    """63 bits that an id always has, other ones for another purpose."""
    digest = hashlib.blake2b(identity.encode("utf-8", "replace"), digest_size=8, person=purpose.encode()[:16]).digest()
    return int.from_bytes(digest, "big") >> 1


def record_step(
    tally: StepTally,
    step: Step,
    documents: Sequence[Document],
    before: Sequence[str],
    rejections: Sequence[Rejection | None],
    seconds: float,
    samples: int,
    sample_characters: int,
    count_tokens: Callable[[str], int] | None = None,
) -> None:
    """Count what a step did to a batch. before: the texts that it was given."""
    for document, text, rejection in zip(documents, before, rejections):
        number = tally.documents_in
        if count_tokens and (number < FIRST_COUNTED or hash_of(document.id, "megalm-tokens") % COUNTED_SHARE == 0):
            tally.counted_in.characters += len(text)
            tally.counted_in.tokens += count_tokens(text)
            if rejection is None:
                tally.counted_out.characters += len(document.text)
                tally.counted_out.tokens += count_tokens(document.text)
        tally.documents_in += 1
        tally.characters_in += len(text)
        if rejection is None:
            tally.documents_out += 1
            tally.characters_out += len(document.text)
            tally.changed += document.text is not text and document.text != text
        else:
            tally.reasons[rejection.reason] += 1
            key = hash_of(document.id, "megalm-sample")
            kept = tally.samples.setdefault(rejection.reason, [])
            if samples and (len(kept) < samples or key < kept[-1][0]):
                shown = (document.text or text)[:sample_characters]
                tally.samples[rejection.reason] = _smallest(
                    [*kept, (key, document.id, rejection.detail, shown)], samples
                )
        if number < ALL_MEASURED or number % THEN_EVERY == 0:
            for name, value in {"characters": float(len(document.text)), **step.measure(document)}.items():
                measure = tally.measures.setdefault(name, Measure())
                if math.isfinite(value):
                    (measure.kept if rejection is None else measure.removed)[rounded(value)] += 1
    tally.seconds += seconds


def record_output(tally: Tally, documents: Sequence[Document], count_by: Sequence[str], tokens: int) -> None:
    """Count what is written."""
    for document in documents:
        tally.documents += 1
        tally.characters += len(document.text)
        tally.lengths.kept[rounded(len(document.text))] += 1
        for key in count_by:
            if (value := document.metadata.get(key)) is not None:
                _count(tally.counts.setdefault(key, {}), str(value)[:80], 1, len(document.text))
    tally.tokens += tokens


def summary(
    recipe: Mapping[str, Any], tally: Tally, merges: Mapping[int, Any], files: Mapping[str, Any]
) -> dict[str, Any]:
    """What audit.json holds. merges: of merging steps, by index, what they had to say. files: of the plan."""
    kinds = [step["kind"] for step in recipe["steps"]]
    steps: list[dict[str, Any]] = []
    tokens: int | None = None
    documents = sum(source.documents for source in tally.sources.values())
    for index, kind in enumerate(kinds):
        step = tally.steps.get(index, StepTally(kind))
        tokens_in = tokens if tokens is not None else step.counted_in.estimate(step.characters_in)
        tokens = _tokens_out(step, tokens_in)
        steps.append(
            {
                "index": index,
                "kind": kind,
                "settings": {key: value for key, value in recipe["steps"][index].items() if key != "kind"},
                "documents_in": step.documents_in,
                "documents_out": step.documents_out,
                "characters_in": step.characters_in,
                "characters_out": step.characters_out,
                "tokens_in": tokens_in,
                "tokens_out": tokens,
                "changed": step.changed,
                "seconds": round(step.seconds, 3),
                "reasons": dict(sorted(step.reasons.items(), key=lambda item: (-item[1], item[0]))),
                "samples": {
                    reason: [{"id": name, "detail": detail, "text": text} for _, name, detail, text in found]
                    for reason, found in sorted(step.samples.items())
                },
                "measures": {name: histogram(measure) for name, measure in sorted(step.measures.items())},
                "merge": merges.get(index),
            }
        )
    written = tally.tokens if recipe["output"]["shards"] and not recipe["audit"]["tokenizer"] else None
    if written and tokens and _complete(steps, tally):  # what is written was counted: the estimates are brought to it
        for each in steps:
            for key in ("tokens_in", "tokens_out"):
                each[key] = round(each[key] * written / tokens)
    return {
        "name": recipe["name"],
        "sources": {name: _plain(source) for name, source in sorted(tally.sources.items())},
        "files": dict(files),
        "documents_read": documents,
        "characters_read": sum(source.characters for source in tally.sources.values()),
        "documents_written": tally.documents,
        "characters_written": tally.characters,
        "tokens_written": tally.tokens if recipe["output"]["shards"] else None,
        "steps": steps,
        "lengths": histogram(tally.lengths),
        "counts": {
            key: {
                value: {"documents": sums[0], "characters": sums[1]}
                for value, sums in sorted(values.items(), key=lambda item: (-item[1][0], item[0]))
            }
            for key, values in sorted(tally.counts.items())
        },
        "seconds": {name: round(seconds, 3) for name, seconds in sorted(tally.seconds.items())},
    }


def _complete(steps: Sequence[Mapping[str, Any]], tally: Tally) -> bool:
    """Whether every step has seen all that the one before let go on."""
    passed = [*(step["documents_in"] for step in steps[1:]), tally.documents]
    return passed == [step["documents_out"] for step in steps]


def _tokens_out(step: StepTally, tokens_in: int | None) -> int | None:
    """What is left of so many tokens: the share that its sample has left, so that a step that removes nothing leaves
    all of them."""
    if tokens_in is None:
        return None
    before, after = (
        each.estimate(size)
        for each, size in ((step.counted_in, step.characters_in), (step.counted_out, step.characters_out))
    )
    if not before or after is None:
        return round(tokens_in * step.characters_out / step.characters_in) if step.characters_in else 0
    return round(tokens_in * after / before)


def histogram(measure: Measure) -> dict[str, Any]:
    """Values in order, how many documents have each, kept and removed; and the quantiles of each."""
    values = sorted({*measure.kept, *measure.removed}, key=float)
    return {
        "values": [float(value) for value in values],
        "kept": [measure.kept[value] for value in values],
        "removed": [measure.removed[value] for value in values],
        "quantiles": {"kept": quantiles(measure.kept), "removed": quantiles(measure.removed)},
    }


def quantiles(counts: Mapping[str, int], shares: Iterable[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> list[float]:
    """The values below which such shares of the documents lie; none for no documents."""
    total = sum(counts.values())
    found: list[float] = []
    if total:
        ordered = sorted(counts, key=float)
        for share in shares:
            passed = 0
            for value in ordered:
                passed += counts[value]
                if passed >= share * total:
                    found.append(float(value))
                    break
    return found


def dumped(report: Mapping[str, Any]) -> str:
    """As the file has it: what is not finite as null."""
    return json.dumps(_finite(report), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and (value - value) != 0 else value
