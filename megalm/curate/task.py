"""One task of one phase: documents in, steps, documents out, in chunks that are there whole or not at all.

A chunk is: its files under their names, then the state. A process that is killed in between does the chunk again, from
the same document to the same bytes. So nothing is lost, and nothing is there twice.
"""

import json
import struct
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from megalm.curate.audit import (
    SourceTally,
    StepTally,
    Tally,
    hash_of,
    record_output,
    record_step,
    rounded,
)
from megalm.curate.document import Document
from megalm.curate.files import (
    PARTIAL,
    ChunkFile,
    LinesFile,
    TableFile,
    final_record,
    read_documents,
    write_whole,
    writing,
)
from megalm.curate.plan import Plan
from megalm.curate.readers import Found, Malformed, PassedOver, open_reader
from megalm.curate.recipe import Recipe, build
from megalm.curate.step import Merging, Step
from megalm.disk import sync
from megalm.errors import MegalmError
from megalm.tokenizer.base import Tokenizer

SAMPLING = "megalm-share"
"""What hashes decide a source's share by."""
HEAD = struct.Struct("<QI")
"""Before a document's ids: its hash for the held-out share, and its bytes."""


@dataclass
class Place:
    """Where a task stands in its input. item: of its files (phase 0) or of the chunks that the phase before wrote.
    position: in it; None: at its start."""

    item: int = 0
    position: int | None = None


@dataclass
class State:
    """What a task has done. bytes: of its input, for progress."""

    chunks: int = 0
    place: Place = field(default_factory=Place)
    done: bool = False
    documents: int = 0
    bytes: int = 0
    tally: Tally = field(default_factory=Tally)

    @staticmethod
    def load(path: Path) -> "State":
        """From its file; a new one if there is none."""
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State()
        plain["place"] = Place(**plain["place"])
        plain["tally"] = Tally.of_plain(plain["tally"])
        return State(**plain)

    def save(self, path: Path) -> None:
        """Raises OSError."""
        plain = vars(self) | {"place": vars(self.place), "tally": self.tally.plain()}
        write_whole(path, json.dumps(plain, ensure_ascii=False))


@dataclass
class Batch:
    """Documents, and where they begin and end in the input."""

    begin: Place
    end: Place
    documents: list[Document]
    malformed: list[Malformed]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Progress:
    """What a task has done since it spoke last. kept: documents that have passed this phase. seconds: by step."""

    phase: int
    task: int
    bytes: int
    documents: int
    kept: int
    seconds: dict[str, float]


class StepFailed(Exception):
    """What a step raised, before it is known for which document. index: -1 for what comes after the steps."""

    def __init__(self, index: int, kind: str, error: Exception) -> None:
        super().__init__(kind)
        self.index, self.kind, self.error = index, kind, error


class Phase:
    """The steps of a phase, ready to work: a process makes it once and runs many tasks."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.number = plan, number
        self.folder, self.recipe = plan.folder, plan.recipe
        first, end = plan.phases[number]
        steps = build(self.recipe.steps)
        self.steps: list[tuple[int, Step]] = list(enumerate(steps))[first:end]
        after = steps[end] if end < len(steps) else None
        self.sketching = after if isinstance(after, Merging) else None
        if number:
            merging = steps[first]
            assert isinstance(merging, Merging)
            merging.judge(self.folder.merged(number) / "verdicts")
        self.tokenizer: Tokenizer | None = None
        if self.sketching is None and self.recipe.output.shards is not None:
            from megalm.tokenizer.load import load

            self.tokenizer = load(self.recipe.output.shards.tokenizer)
        path = self.recipe.audit.tokenizer or (self.recipe.output.shards and self.recipe.output.shards.tokenizer)
        self._counting: Tokenizer | None = None
        if path:
            from megalm.tokenizer.load import load

            self._counting = load(path)
        self._shard_folders = shard_folders(self.recipe)
        self._starting: float | None = None

    def run(self, task: int, report: Callable[[Progress], None]) -> None:
        """Work through a task, from where its state stands.

        Raises MegalmError that names the document and the step if a step raises, and where the storage refuses.
        """
        path = self.folder.state(self.number, task)
        state = State.load(path)
        if not state.done:
            with writing(self.folder.root):
                self._clean(task, state.chunks)
            if self._starting is None:
                self._starting = self._prepare()
            batches = self._batches(task, state)
            while not state.done:
                self._chunk(task, state, batches, report)
                with writing(path.parent):
                    state.save(path)
        if self.number:
            for file in self._inputs(task):
                file.unlink(missing_ok=True)

    def _prepare(self) -> float:
        """Make the steps ready; in seconds. Raises MegalmError."""
        started = time.perf_counter()
        working = [(index, step) for index, step in self.steps if not isinstance(step, Merging)]
        if self.sketching is not None:
            working.append((self.plan.phases[self.number][1], self.sketching))
        for index, step in working:
            try:
                step.prepare()
            except MegalmError:
                raise
            except Exception as error:
                raise MegalmError(
                    f"step {index} ({step.kind}) cannot start ({type(error).__name__}: {error}): mend what it needs "
                    "and run the same command again"
                ) from error
        return time.perf_counter() - started

    def _clean(self, task: int, chunks: int) -> None:
        """Remove what a killed process left of this task beyond its `chunks` whole ones."""
        for folder in {output.parent for output in self._paths(task, 0).values()}:
            left = [*folder.glob(f".{task:05d}-*{PARTIAL}")]
            left += [path for path in folder.glob(f"{task:05d}-*") if int(path.name[6:12]) >= chunks]
            for path in left:
                path.unlink(missing_ok=True)

    def _paths(self, task: int, chunk: int) -> dict[str, Path]:
        """The files that a chunk may have."""
        name = f"{task:05d}-{chunk:06d}"
        paths = {"aside": self.folder.aside / f"{name}.jsonl.zst"} if self.number == 0 else {}
        if self.sketching is not None:
            paths["documents"] = self.folder.documents(self.number) / f"{name}.jsonl.zst"
            paths["sketches"] = self.folder.sketches(self.number) / f"{name}.bin"
            return paths
        if self.recipe.output.text is not None:
            suffix = "parquet" if self.recipe.output.text.format == "parquet" else "jsonl.zst"
            paths["text"] = self.folder.text / f"{name}.{suffix}"
        if self.tokenizer is not None:
            for source in self._shard_folders:
                paths[f"ids {source or ''}"] = self.folder.ids(source) / f"{name}.bin"
        return paths

    # ---- in ----

    def _inputs(self, task: int) -> list[Path]:
        """The chunks of the phase before."""
        return sorted(self.folder.documents(self.number - 1).glob(f"{task:05d}-*.jsonl.zst"))

    def _read(self, task: int, start: Place, tally: Tally | None) -> Iterator[tuple[Found, Place, int]]:
        """What there is from `start`, the place behind it, and the bytes of the item that were read so far; what is not
        a document is counted in the tally."""
        if self.number:
            for item, path in enumerate(self._inputs(task)):
                if item >= start.item:
                    skipped = (start.position or 0) if item == start.item else 0
                    for number, document in enumerate(read_documents(path)):
                        if number >= skipped:
                            yield document, Place(item, number + 1), 0
            return
        passed = 0
        for item, (index, file) in enumerate(self.plan.items(task)):
            if item >= start.item:
                source = self.recipe.sources[index]
                counted = tally.sources.setdefault(source.name, SourceTally()) if tally else SourceTally()
                reader = open_reader(source, file)
                for found, position in reader.read(start.position if item == start.item else None):
                    place = Place(item, position)
                    if isinstance(found, PassedOver):
                        counted.passed_over[found.reason] += 1
                    elif isinstance(found, Malformed):
                        counted.malformed[found.reason] += 1
                    elif source.share < 1 and hash_of(found.id, SAMPLING) >= source.share * 2**63:
                        counted.sampled_out += 1
                        found = PassedOver("sampled out")
                    else:
                        counted.documents += 1
                        counted.characters += len(found.text)
                    yield found, place, passed + reader.bytes_read
            passed += file.size

    def _batches(self, task: int, state: State) -> Iterator[Batch]:
        """The documents from the state's place on, in batches; what is counted goes into the state's tally."""
        limits = self.recipe.batches
        read = state.bytes
        started = time.perf_counter()
        batch = Batch(state.place, state.place, [], [], 0, 0.0)
        characters = passed_over = 0
        for found, place, place_bytes in self._read(task, state.place, state.tally):
            batch.end = place
            batch.bytes = place_bytes - read if not self.number else 0
            if isinstance(found, Document):
                batch.documents.append(found)
                characters += len(found.text)
            elif isinstance(found, Malformed):
                batch.malformed.append(found)
            else:
                passed_over += 1
            whole = len(batch.documents) + len(batch.malformed) >= limits.documents
            # What is passed over costs next to nothing, and yet its place is saved now and then.
            if whole or characters >= limits.characters or passed_over >= 64 * limits.documents:
                batch.seconds = time.perf_counter() - started
                read += batch.bytes
                yield batch
                started = time.perf_counter()
                batch = Batch(place, place, [], [], 0, 0.0)
                characters = passed_over = 0
        batch.seconds = time.perf_counter() - started
        yield batch

    # ---- through ----

    def _chunk(self, task: int, state: State, batches: Iterator[Batch], report: Callable[[Progress], None]) -> None:
        """Work through the batches of a chunk, and give its files their names; the state is moved behind it."""
        outputs = _Outputs(self._paths(task, state.chunks))
        try:
            for _ in range(self.recipe.batches.per_chunk):
                batch = next(batches, None)
                if batch is None:
                    state.done = True
                    break
                try:
                    kept = self.process(batch.documents, state.tally)
                    seconds = self._write(outputs, batch, kept, state.tally)
                except StepFailed as failed:
                    raise self._explained(task, batch, failed) from failed.error
                spent = {"reading": batch.seconds, "starting": self._starting or 0.0, **seconds}
                self._starting = 0.0
                for name, value in spent.items():
                    state.tally.seconds[name] = state.tally.seconds.get(name, 0.0) + value
                state.place = batch.end
                state.documents += len(batch.documents)
                state.bytes += batch.bytes
                report(Progress(self.number, task, batch.bytes, len(batch.documents), len(kept), self._spent(state)))
            with writing(self.folder.root):
                outputs.commit()
            state.chunks += 1
        finally:
            outputs.abandon()

    def _spent(self, state: State) -> dict[str, float]:
        return {f"{index} {step.kind}": step.seconds for index, step in state.tally.steps.items()} | state.tally.seconds

    def process(self, documents: Sequence[Document], tally: Tally) -> list[Document]:
        """Those documents that pass all steps of this phase. Raises StepFailed."""
        left = list(documents)
        lengths = [len(document.text) for document in left] if self.number == 0 else []
        counter = self._counting
        # A text that no step changes is tokenised once; the batch's texts are forgotten with it.
        count = cache(lambda text: len(counter.encode(text))) if counter is not None else None
        for index, step in self.steps:
            counted = tally.steps.setdefault(index, StepTally(step.kind))
            if not left:
                continue
            before = [document.text for document in left]
            started = time.perf_counter()
            try:
                rejections = step.apply(left)
                if len(rejections) != len(left):
                    raise ValueError(f"apply() returned {len(rejections)} verdicts for {len(left)} documents")
                seconds = time.perf_counter() - started
                audit = self.recipe.audit
                record_step(
                    counted, step, left, before, rejections, seconds, audit.samples, audit.sample_characters, count
                )
            except Exception as error:
                raise StepFailed(index, step.kind, error) from error
            left = [document for document, rejection in zip(left, rejections) if rejection is None]
        for length in lengths:
            tally.lengths.removed[rounded(length)] += 1
        return left

    def _explained(self, task: int, batch: Batch, failed: StepFailed) -> MegalmError:
        """The failure in words, with the document that it is due to: the batch is read again, one at a time."""
        path = self.folder.failure(self.number, task)
        with writing(path.parent):
            write_whole(path, "".join(traceback.format_exception(failed.error)))
        culprit = f"a batch from {batch.documents[0].id} to {batch.documents[-1].id}, though on none of them alone"
        remaining = len(batch.documents)
        for found, _, _ in self._read(task, batch.begin, None):
            if not isinstance(found, Document):
                continue
            if remaining == 0:
                break
            remaining -= 1
            try:
                self._alone(found, failed)
            except Exception:
                culprit = f"document {found.id}"
                break
        error = failed.error
        said = str(error).splitlines()[0] if str(error) else ""
        name = f"step {failed.index} ({failed.kind})" if failed.index >= 0 else failed.kind
        return MegalmError(
            f"{name} failed on {culprit}, in task {task}: {type(error).__name__}{': ' if said else ''}{said}; where in "
            f"the code: {path}. Mend the step and run the same command again: it continues there"
        )

    def _alone(self, document: Document, failed: StepFailed) -> None:
        """Do with one document what failed with its batch."""
        for index, step in self.steps:
            if step.apply([document])[0] is not None:
                return
            step.measure(document)
            if index == failed.index:
                return
        if self.sketching is not None:
            self.sketching.sketch([document])
        json.dumps(final_record(document), ensure_ascii=False).encode()
        if self.tokenizer is not None:
            self._ids(self.tokenizer, [document])

    # ---- out ----

    def _write(self, outputs: "_Outputs", batch: Batch, kept: list[Document], tally: Tally) -> dict[str, float]:
        """Add a batch to the files of the chunk; seconds by what was done. Raises StepFailed."""
        started = time.perf_counter()
        spent: dict[str, float] = {}
        doing = "writing"
        try:
            with writing(self.folder.root):
                if batch.malformed:
                    outputs.lines("aside").add([_described(found) for found in batch.malformed])
                if kept and self.sketching is not None:
                    doing = f"sketching for {self.sketching.kind}"
                    outputs.raw("sketches").write(self.sketching.sketch(kept))
                    spent["sketching"] = time.perf_counter() - started
                    doing = "writing"
                    outputs.lines("documents", level=1).add([[each.id, each.text, each.metadata] for each in kept])
                elif kept:
                    tokens = 0
                    if self.tokenizer is not None:
                        doing = "tokenising"
                        content, tokens = self._ids(self.tokenizer, kept)
                        spent["tokenising"] = time.perf_counter() - started
                        doing = "writing"
                        for source, ids in content.items():
                            outputs.raw(f"ids {source}").write(ids)
                    if "text" in outputs.paths:
                        outputs.records("text").add([final_record(document) for document in kept])
                    record_output(tally, kept, self.recipe.audit.count_by, tokens)
        except MegalmError:
            raise
        except Exception as error:
            raise StepFailed(-1, doing, error) from error
        spent["writing"] = time.perf_counter() - started - sum(spent.values())
        return spent

    def _ids(self, tokenizer: Tokenizer, documents: Sequence[Document]) -> tuple[dict[str, bytes], int]:
        """The documents as they stand in files of ids, by source (one, "", where sources are not told apart), and how
        many ids they are."""
        from megalm.data import corpus, shards

        grouped = [corpus.Document(each.text, "", _group(each)) for each in documents]
        hashes, content = shards.encode_documents(tokenizer, grouped)
        parts: dict[str, list[bytes]] = {}
        for document, number, ids in zip(documents, hashes, content):
            source = "" if self._shard_folders == [None] else document.id.partition("/")[0]
            parts.setdefault(source, []).extend((HEAD.pack(number, len(ids)), ids))
        width = 2 if tokenizer.vocab_size <= 2**16 else 4
        return {source: b"".join(each) for source, each in parts.items()}, sum(map(len, content)) // width


def shard_folders(recipe: Recipe) -> list[str | None]:
    """The sources that have shards of their own; [None] for one folder of all."""
    shards = recipe.output.shards
    return [source.name for source in recipe.sources] if shards is not None and shards.by_source else [None]


class _Outputs:
    """The files of a chunk, each opened when there is something to write."""

    def __init__(self, paths: dict[str, Path]) -> None:
        self.paths = paths
        self._open: dict[str, ChunkFile] = {}

    def lines(self, name: str, level: int = 3) -> LinesFile:
        found = self._open.get(name) or self._open.setdefault(name, LinesFile(self.paths[name], level))
        assert isinstance(found, LinesFile)
        return found

    def raw(self, name: str) -> ChunkFile:
        return self._open.get(name) or self._open.setdefault(name, ChunkFile(self.paths[name]))

    def records(self, name: str) -> LinesFile | TableFile:
        if self.paths[name].suffix != ".parquet":
            return self.lines(name)
        found = self._open.get(name) or self._open.setdefault(name, TableFile(self.paths[name]))
        assert isinstance(found, TableFile)
        return found

    def commit(self) -> None:
        for file in self._open.values():
            file.commit()
        for folder in {file.path.parent for file in self._open.values()}:
            sync(folder)
        self._open = {}

    def abandon(self) -> None:
        for file in self._open.values():
            file.abandon()


def _group(document: Document) -> str | None:
    group = document.metadata.get("group")
    return group if isinstance(group, str) else None


def _described(found: Malformed) -> dict[str, str]:
    return {"place": found.place, "reason": found.reason, "detail": found.detail, "excerpt": found.excerpt}
