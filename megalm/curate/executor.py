"""A whole recipe on this machine: phases, the merges between them, shards and the report.

Each part is also a command of its own (tools/curate.py --only PART), from which megalm/curate/slurm.py makes jobs.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalm.curate import audit
from megalm.curate.files import write_whole, writing
from megalm.curate.plan import Plan, prepare
from megalm.curate.recipe import Recipe, build
from megalm.curate.step import Merging
from megalm.curate.task import HEAD, Phase, Progress, State, shard_folders
from megalm.disk import sync
from megalm.errors import MegalmError

QUIET_SECONDS = 30.0
"""Between two lines of progress where nobody watches a terminal."""


def run(recipe: Recipe, workers: int) -> Plan:
    """Everything that is still to be done, on `workers` processes. Raises MegalmError."""
    plan = prepare(recipe)
    with _alone(plan):
        for number in range(len(plan.phases)):
            if number:
                merge(plan, number)
            run_phase(plan, number, range(plan.tasks), workers)
        finish(plan)
    return plan


def run_phase(plan: Plan, number: int, tasks: Sequence[int], workers: int) -> None:
    """Those of `tasks` that are not done in this phase. A task that fails does not keep the others from going on.

    Raises MegalmError for the first that failed.
    """
    states = {task: _state(plan, number, task) for task in tasks}
    todo = [task for task, (done, _, _) in states.items() if not done]
    if not todo:
        return
    plan.check()
    with _Meter(plan, number, tasks, states) as meter:
        failures = (_here if workers == 1 else _in_processes)(plan, number, todo, workers, meter.report)
    print(meter.table(), file=sys.stderr, flush=True)
    if failures:
        more = f" (and {len(failures) - 1} more tasks failed)" if len(failures) > 1 else ""
        raise MegalmError(f"{failures[0]}{more}")


def merge(plan: Plan, number: int) -> None:
    """The merge before phase `number`, unless it is done. Raises MegalmError if the phase before is not."""
    folder = plan.folder.merged(number)
    if folder.exists():
        return
    _require(plan, number - 1)
    index = plan.phases[number][0]
    step = build(plan.recipe.steps)[index]
    assert isinstance(step, Merging)
    print(f"merging for step {index} ({step.kind})", file=sys.stderr, flush=True)
    unfinished = folder.with_name(folder.name + ".partial")
    with writing(folder.parent):
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "verdicts").mkdir(parents=True)
        said = step.merge(sorted(plan.folder.sketches(number - 1).glob("*.bin")), unfinished / "verdicts")
        write_whole(unfinished / "summary.json", audit.dumped(said))
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)  # what the step wrote: when the folder has its name, the next phase trusts all that is in it
        unfinished.rename(folder)
        sync(folder.parent)
        shutil.rmtree(plan.folder.sketches(number - 1), ignore_errors=True)


def finish(plan: Plan) -> dict[str, Any]:
    """Put the shards together, draw the report, remove what is no longer needed; what audit.json holds."""
    _require(plan, len(plan.phases) - 1)
    report = summarise(plan)
    if not report["documents_written"]:
        print("warning: no document has passed all steps; the report says which removed them", file=sys.stderr)
    if plan.recipe.output.shards is not None and report["documents_written"]:
        _assemble(plan)
    write_report(plan, report)
    for name in ("documents", "ids", "sketches"):
        shutil.rmtree(plan.folder.root / "work" / name, ignore_errors=True)
    return report


def summarise(plan: Plan) -> dict[str, Any]:
    """What is known so far, of all tasks and phases."""
    total = audit.Tally()
    for number in range(len(plan.phases)):
        for task in range(plan.tasks):
            total.add(State.load(plan.folder.state(number, task)).tally, plan.recipe.audit.samples)
    merges = {}
    for number, (first, _) in enumerate(plan.phases):
        path = plan.folder.merged(number) / "summary.json"
        if number and path.exists():
            merges[first] = json.loads(path.read_text(encoding="utf-8"))
    files = {"files": plan.files, "bytes": plan.bytes, "left_out": plan.left_out}
    return audit.summary(plan.recipe.model_dump(), total, merges, files)


def write_report(plan: Plan, report: dict[str, Any]) -> None:
    """Write audit.json and audit.html."""
    from megalm.curate.page import draw

    with writing(plan.folder.root):
        write_whole(plan.folder.root / "audit.json", audit.dumped(report))
        write_whole(plan.folder.root / "audit.html", draw(report))


def _assemble(plan: Plan) -> None:
    """The ids of all tasks, in order, as shards."""
    from megalm.data import shards
    from megalm.tokenizer.load import load

    wanted = plan.recipe.output.shards
    assert wanted is not None
    for source in shard_folders(plan.recipe):
        paths = sorted(plan.folder.ids(source).glob("*.bin"))
        output = plan.folder.shards / (source or "")
        if output.exists() or not paths:  # it appears whole
            continue
        print(f"writing {output}", file=sys.stderr, flush=True)
        shards.write_tokenised(
            partial(_read_ids, paths),
            load(wanted.tokenizer),
            output,
            held_out_fraction=wanted.held_out,
            shard_bytes=wanted.shard_megabytes * 2**20,
        )


def _read_ids(paths: Sequence[Path]) -> Iterator[tuple[list[int], list[bytes]]]:
    for path in paths:
        with path.open("rb") as stream:
            while head := stream.read(HEAD.size):
                number, length = HEAD.unpack(head)
                yield [number], [stream.read(length)]


def _require(plan: Plan, number: int) -> None:
    """Raise MegalmError if a task of a phase is not done."""
    if missing := undone(plan, number):
        raise MegalmError(
            f"{len(missing)} tasks of phase {number} are not done, such as {missing[0]}: run tools/curate.py again; "
            f"what failed is in {plan.folder.root / 'work' / 'failures'}"
        )


def undone(plan: Plan, number: int) -> list[int]:
    """Tasks of a phase that are not done."""
    return [task for task in range(plan.tasks) if not _state(plan, number, task)[0]]


def _state(plan: Plan, number: int, task: int) -> tuple[bool, int, int]:
    """Whether a task is done, its bytes and its documents."""
    state = State.load(plan.folder.state(number, task))
    return state.done, state.bytes, state.documents


@contextlib.contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Keep a second run out of the folder."""
    with (plan.folder.root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MegalmError(f"another run is writing {plan.folder.root}: wait for it, or end it") from None
        yield


# ---- processes ----


def _here(plan: Plan, number: int, tasks: list[int], workers: int, report: Callable[[Progress], None]) -> list[str]:
    """Run tasks in this process; what failed."""
    phase = Phase(plan, number)
    failures = []
    for task in tasks:
        try:
            phase.run(task, report)
        except MegalmError as error:
            failures.append(str(error))
    return failures


def _in_processes(
    plan: Plan, number: int, tasks: list[int], workers: int, report: Callable[[Progress], None]
) -> list[str]:
    context = multiprocessing.get_context("spawn")
    said: Any = context.Queue()
    ended = threading.Event()

    def listen() -> None:
        while not ended.is_set() or not said.empty():
            with contextlib.suppress(queue.Empty):
                report(said.get(timeout=0.2))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    failures = []
    try:
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _Worker.start, (plan, number, said)) as pool:
            try:
                futures = [pool.submit(_Worker.run, task) for task in tasks]
                for future in as_completed(futures):
                    try:
                        future.result()
                    except MegalmError as error:
                        failures.append(str(error))
            except BaseException:
                processes = list(getattr(pool, "_processes", None) or {})  # shutdown() forgets them
                pool.shutdown(wait=False, cancel_futures=True)
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)  # each goes on from its last chunk the next time
                raise
    except BrokenProcessPool as error:
        raise MegalmError(
            "a working process was killed (out of memory?): lower --workers or batches.documents and run the same "
            "command again; it continues"
        ) from error
    finally:
        ended.set()
        listener.join(5)
    return failures


class _Worker:
    """State of a working process."""

    phase: Phase | None = None
    problem: Exception | None = None
    """Why the phase could not be made: a process that fails at its start would only say that it is gone."""
    said: Any

    @staticmethod
    def start(plan: Plan, number: int, said: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        _Worker.said = said
        try:
            _Worker.phase = Phase(plan, number)
        except Exception as error:
            _Worker.problem = error

    @staticmethod
    def run(task: int) -> None:
        if _Worker.phase is None:
            assert _Worker.problem is not None
            raise _Worker.problem
        _Worker.phase.run(task, _Worker.said.put)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


# ---- progress ----


class _Meter:
    """A phase's progress, on stderr: by bytes of the sources, later by the documents that the phase before kept."""

    def __init__(self, plan: Plan, number: int, tasks: Sequence[int], states: dict[int, tuple[bool, int, int]]) -> None:
        self._plan, self._number = plan, number
        self._documents = self._kept = 0
        self._seconds: dict[int, dict[str, float]] = {}
        self._begun = {task: State.load(plan.folder.state(number, task)).tally for task in tasks}
        if number:
            counts = Counter[int]()
            for task in tasks:
                before = State.load(plan.folder.state(number - 1, task)).tally
                last = max(before.steps, default=None)
                read = sum(source.documents for source in before.sources.values())
                counts[task] = before.steps[last].documents_out if last is not None else read
            total, done = sum(counts.values()), sum(documents for _, _, documents in states.values())
            unit = " documents"
        else:
            total = sum(file.size for task in tasks for _, file in plan.items(task))
            done, unit = sum(size for _, size, _ in states.values()), "B"
        watched = sys.stderr.isatty()
        self._bar = tqdm(
            desc=f"phase {number + 1} of {len(plan.phases)}",
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            mininterval=0.3 if watched else QUIET_SECONDS,
            maxinterval=10.0 if watched else QUIET_SECONDS,
            dynamic_ncols=watched,
        )

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, progress: Progress) -> None:
        self._documents += progress.documents
        self._kept += progress.kept
        self._seconds[progress.task] = progress.seconds
        slowest = ""
        if spent := self._spent():
            name = max(spent, key=lambda each: spent[each])
            slowest = f"{100 * spent[name] / max(sum(spent.values()), 1e-9):.0f}% in {name}"
        self._bar.set_postfix_str(f"{self._documents:,} in, {self._kept:,} on; {slowest}", refresh=False)
        self._bar.update(progress.documents if self._number else progress.bytes)

    def _spent(self) -> Counter[str]:
        spent = Counter[str]()
        for seconds in self._seconds.values():
            spent.update(seconds)
        return spent

    def table(self) -> str:
        """What each step has done in this run, and how fast."""
        now, before = audit.Tally(), audit.Tally()
        for task, begun in self._begun.items():
            now.add(State.load(self._plan.folder.state(self._number, task)).tally, 0)
            before.add(begun, 0)
        lines = [f"{'step':<28}{'documents in':>14}{'out':>14}{'s of a core':>13}{'documents/s':>13}{'MB/s':>8}"]
        for index, step in sorted(now.steps.items()):
            old = before.steps.get(index, audit.StepTally(step.kind))
            documents, seconds = step.documents_in - old.documents_in, step.seconds - old.seconds
            characters = step.characters_in - old.characters_in
            rate = f"{documents / seconds:>13,.0f}{characters / seconds / 1e6:>8.1f}" if seconds > 0 else ""
            out = step.documents_out - old.documents_out
            lines.append(f"{f'{index} {step.kind}':<28.28}{documents:>14,}{out:>14,}{seconds:>13.1f}{rate}")
        for name, value in sorted(now.seconds.items()):
            lines.append(f"{name:<28}{'':>28}{value - before.seconds.get(name, 0.0):>13.1f}")
        return "\n".join(lines) + "\n(MB: millions of characters; rates are those of one core)"
