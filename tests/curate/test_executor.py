"""A recipe gives the same bytes however it runs and wherever it is killed; what goes wrong is told."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megalm.config import dump
from megalm.curate import executor, slurm
from megalm.curate.plan import prepare
from megalm.curate.recipe import Recipe
from megalm.curate.step import Step
from megalm.errors import MegalmError
from tests.curate.conftest import STEPS, MakeRecipe

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(recipe: Recipe) -> dict[str, Any]:
    """What a run leaves for its user: every file's bytes, and the audit without its seconds."""
    root = Path(recipe.directory)
    found: dict[str, Any] = {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("text", "aside", "shards")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }
    report = json.loads((root / "audit.json").read_text())
    del report["seconds"]
    for step in report["steps"]:
        del step["seconds"]
    return found | {"audit": report}


def written(recipe: Recipe) -> list[dict[str, Any]]:
    """The documents of the output, in order."""
    lines = []
    for path in sorted((Path(recipe.directory) / "text").glob("*.jsonl.zst")):
        with path.open("rb") as raw:
            lines += zstandard.ZstdDecompressor().stream_reader(raw).read().decode().splitlines()
    return [json.loads(line) for line in lines]


def in_fork(action: Callable[[], object]) -> int:
    """The status in which a copy of this process ends that does `action`."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def whole(make_recipe: MakeRecipe) -> Recipe:
    """A recipe that has run."""
    recipe = make_recipe("whole")
    executor.run(recipe, 1)
    return recipe


def test_every_document_goes_through_once(whole: Recipe, inputs: Path) -> None:
    expected, seen = [], set()
    for path in sorted(inputs.iterdir()):
        position = 0
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                text = json.loads(line)["text"].strip()
                if len(text) >= 35 and text not in seen:
                    seen.add(text)
                    if len(text) >= 40:
                        expected.append((f"web/{path.name}@{position}", text))
            position += len(line)
    assert len(expected) > 50
    assert [(each["id"], each["text"]) for each in written(whole)] == expected
    assert not list(Path(whole.directory).rglob("*.partial"))
    assert not (Path(whole.directory) / "work" / "documents").exists(), "what is between the phases is not kept"


def test_a_kill_at_any_write_changes_nothing(make_recipe: MakeRecipe, whole: Recipe) -> None:
    """Killed again and again, before each time in turn that something is put on the disk, the run ends as an
    undisturbed one."""
    recipe = make_recipe("killed")
    kills = 0

    def run_until_killed() -> None:
        calls = 0
        fsync = os.fsync

        def deadly(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 1 + kills % 13:  # a chunk and its state are eight
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = deadly
        executor.run(recipe, 1)

    while (status := in_fork(run_until_killed)) != 0:
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
        assert kills < 400
    assert kills > 15, kills
    assert contents(recipe) == contents(whole)


def test_a_command_on_two_processes_that_is_killed_continues(
    make_recipe: MakeRecipe, whole: Recipe, tmp_path: Path
) -> None:
    recipe = make_recipe("command")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    command = [sys.executable, "tools/curate.py", "--config", str(path), "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    running = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    state = Path(recipe.directory) / "work" / "state" / "0"
    while not list(state.glob("*.json")) and running.poll() is None:
        time.sleep(0.005)
    running.kill()
    assert running.wait() == -signal.SIGKILL, "it has not ended before"
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"300 documents read, {len(written(whole))} written" in ended.stdout and "audit.html" in ended.stdout
    assert contents(recipe) == contents(whole)


def test_files_without_a_state_do_not_stay(make_recipe: MakeRecipe, whole: Recipe) -> None:
    """A killed process may have named the files of a chunk that its successor, with a mended step, does not write."""
    recipe = make_recipe("stale")
    text = Path(recipe.directory) / "text"
    prepare(recipe)
    text.mkdir()
    for name in ("00000-000000.jsonl.zst", "00001-000099.jsonl.zst", ".00001-000000.jsonl.zst.1.partial"):
        (text / name).write_bytes(b"stale")
    executor.run(recipe, 1)
    assert contents(recipe) == contents(whole)


def test_a_finished_run_is_not_done_again(whole: Recipe) -> None:
    before = {path: path.stat().st_mtime_ns for path in (Path(whole.directory) / "text").iterdir()}
    executor.run(whole, 1)
    assert before == {path: path.stat().st_mtime_ns for path in (Path(whole.directory) / "text").iterdir()}


def test_a_full_disk_is_told_and_the_run_continues(make_recipe: MakeRecipe, whole: Recipe) -> None:
    recipe = make_recipe("full")

    def run_with_little_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        try:
            executor.run(recipe, 1)
        except MegalmError as error:
            told = "cannot write in" in str(error) and "run the same command again" in str(error)
            os._exit(7 if told else 8)

    assert os.waitstatus_to_exitcode(in_fork(run_with_little_space)) == 7
    executor.run(recipe, 1)
    assert contents(recipe) == contents(whole)


def test_a_step_that_cannot_start_says_so(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: Step) -> None:
        raise OSError("no model")

    monkeypatch.setattr(Step, "prepare", fail)
    with pytest.raises(MegalmError, match=r"step 0 \(long_enough\) cannot start \(OSError: no model\)"):
        executor.run(make_recipe(), 1)
    monkeypatch.undo()
    executor.run(make_recipe(), 1)


def test_a_step_that_raises_names_the_document(make_recipe: MakeRecipe, inputs: Path) -> None:
    lines = [json.dumps({"text": f"text number {number} that is long enough for all steps"}) for number in range(40)]
    (inputs / "3.jsonl").write_text("\n".join(lines))
    steps = [{"kind": f"{STEPS}:LongEnough"}, {"kind": f"{STEPS}:Fragile"}]
    whole = make_recipe("healthy", steps=steps)
    executor.run(whole, 1)

    before = (inputs / "3.jsonl").stat()
    poisoned = [line.replace("number 27 ", "poison 27 ") for line in lines]
    (inputs / "3.jsonl").write_text("\n".join(poisoned))
    os.utime(inputs / "3.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))  # the same to the plan
    recipe = make_recipe("poisoned", steps=steps)
    position = sum(len(line) + 1 for line in poisoned[:27])
    with pytest.raises(
        MegalmError, match=f"step 1 .fragile. failed on document web/3.jsonl@{position}, in task"
    ) as told:
        executor.run(recipe, 1)
    assert "ZeroDivisionError: this text cannot be borne" in str(told.value)
    assert "cannot be borne" in next((Path(recipe.directory) / "work" / "failures").iterdir()).read_text()
    assert written(recipe), "other tasks have gone on"
    (inputs / "3.jsonl").write_text("\n".join(lines))
    os.utime(inputs / "3.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    executor.run(recipe, 1)
    assert contents(recipe) == contents(whole)


def test_what_cannot_be_written_names_the_document(make_recipe: MakeRecipe) -> None:
    for steps in ([{"kind": f"{STEPS}:Spoil"}], [{"kind": f"{STEPS}:Spoil"}, {"kind": f"{STEPS}:FirstOnly"}]):
        with pytest.raises(MegalmError, match="writing failed on document web/0.jsonl@0, in task 0: Unicode"):
            executor.run(make_recipe(f"spoilt {len(steps)}", steps=steps), 1)


def test_another_recipe_is_refused(make_recipe: MakeRecipe, whole: Recipe) -> None:
    with pytest.raises(MegalmError, match=r"begun with another recipe \(steps differ\)"):
        executor.run(make_recipe("whole", steps=[]), 1)
    (Path(whole.directory).parent / "precious").mkdir()
    (Path(whole.directory).parent / "precious" / "file").touch()
    with pytest.raises(MegalmError, match="holds something else"):
        executor.run(make_recipe("precious"), 1)


def test_a_file_of_the_sources_that_has_changed_is_refused_by_its_name(whole: Recipe, inputs: Path) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(MegalmError) as told:
            executor.run(whole, 1)
        assert all(word in str(told.value) for word in (*words, "or name another directory")), told.value
        return str(told.value)

    path = inputs / "1.jsonl"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content + b"{}\n")
    assert "touch" not in refused(f"{path} has changed since", "put it back as it was")
    path.write_bytes(content.replace(b"alpha", b"ALPHA", 1))  # as long as before
    sentence = refused(f"{path} has changed since", "if only its time is another: touch -d @")
    path.write_bytes(content)
    subprocess.run(re.search(r"touch [^)]+", sentence).group(), shell=True, check=True)
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    executor.run(whole, 1)

    (inputs / "new.jsonl").write_bytes(content)
    refused(f"{inputs / 'new.jsonl'} is new", "take it away")
    (inputs / "new.jsonl").rename(inputs / "newer.jsonl")
    path.rename(inputs / "1.txt")
    refused(f"{inputs / 'newer.jsonl'} (and 1 more) is new")
    (inputs / "newer.jsonl").unlink()
    refused(f"{path} is gone", "put it back")


def test_a_part_of_a_file_is_no_change(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are compared by files, whose parts several tasks may have."""
    monkeypatch.setattr("megalm.curate.plan.SMALLEST_PART", 1000)
    plan = prepare(make_recipe(tasks=7))
    assert plan.tasks == 7 and any(file.start for task in range(7) for _, file in plan.items(task))
    assert prepare(make_recipe(tasks=7)) == plan


def test_a_file_of_a_step_that_has_changed_is_refused_by_its_name(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    steps = [{"kind": f"{STEPS}:FirstOnly"}, {"kind": "domains", "block_files": [str(path)]}]
    with pytest.raises(MegalmError, match=rf"steps.1 \(domains\) needs {path}, which cannot be read"):
        prepare(make_recipe(steps=steps))
    path.write_text("example.com\n")
    recipe = make_recipe(steps=steps)
    plan = prepare(recipe)
    executor.run_phase(plan, 0, range(plan.tasks), 1)
    executor.merge(plan, 1)
    times = path.stat()
    path.write_text("example.org\n")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # its content decides
    # As the whole command, and as a job of Slurm that has waited.
    for go_on in (lambda: executor.run(recipe, 1), lambda: executor.run_phase(plan, 1, range(plan.tasks), 1)):
        with pytest.raises(
            MegalmError, match=f"{path}, which decides .* has changed .* put it back as it was, or name"
        ):
            go_on()
    path.write_text("example.com\n")
    executor.run(recipe, 1)


def test_every_step_names_the_files_that_it_reads() -> None:
    """By the settings whose names or descriptions speak of files."""
    from megalm.curate.recipe import step_class
    from megalm.curate.steps.registry import KINDS

    reading = {}
    for kind in KINDS:
        fields = step_class(kind).Settings.model_fields
        named = [name for name, field in fields.items() if re.search(r"\b[Ff]iles?\b", field.description or "")]
        settings = {name: f"/{name}" if fields[name].annotation is str else [f"/{name}"] for name in named}
        if named and kind not in ("exact_substrings", "near_duplicates"):  # files of their own
            step = step_class(kind)(step_class(kind).Settings(**settings))
            reading[kind] = sorted(step.files())
            assert reading[kind] == sorted(f"/{name}" for name in named), kind
    assert {*reading} == {"domains", "quality_classifier", "decontaminate"}


def test_a_tokenizer_that_has_changed_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from megalm.tokenizer.train import train

    texts = ["some words of no great meaning " + "".join(map(chr, range(97, 123)))] * 30
    train(lambda: texts, 300).save(tmp_path / "tokenizer")
    recipe = make_recipe(output={"shards": {"tokenizer": str(tmp_path / "tokenizer")}})
    prepare(recipe)
    prepare(recipe)
    (tmp_path / "tokenizer").rename(tmp_path / "old")
    train(lambda: texts, 301).save(tmp_path / "tokenizer")
    with pytest.raises(MegalmError, match=f"{tmp_path / 'tokenizer'}, which decides .* has changed"):
        prepare(recipe)


def test_what_a_merge_decided_is_on_the_disk_before_it_counts(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was synced, and a name that was synced with its folder."""
    plan = prepare(make_recipe())
    executor.run_phase(plan, 0, range(plan.tasks), 1)
    folder = plan.folder.merged(1)
    fsync, rename = os.fsync, Path.rename
    on_disk: dict[str, int] = {}

    def recorded(descriptor: int) -> None:
        on_disk[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_mtime_ns
        fsync(descriptor)

    def checked(path: Path, target: Path) -> Path:
        if target == folder:
            for each in (path, *path.rglob("*")):
                renamed = each.with_name(
                    f".{each.name}.{os.getpid()}.partial"
                )  # of a file that took its name when whole
                assert each.stat().st_mtime_ns in (on_disk.get(str(each)), on_disk.get(str(renamed))), each
            checks.append(path)
        return rename(path, target)

    checks: list[Path] = []
    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", checked)
    executor.merge(plan, 1)
    assert checks and str(folder.parent) in on_disk and (folder / "verdicts" / "repeated").stat().st_size


def test_a_second_run_is_kept_out(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    plan = prepare(recipe)
    with executor._alone(plan), pytest.raises(MegalmError, match="another run is writing"):
        executor.run(recipe, 1)


def test_a_share_is_the_same_documents_in_every_run(make_recipe: MakeRecipe, inputs: Path) -> None:
    source = {"name": "web", "path": str(inputs)}
    some = make_recipe("some", sources=[source | {"share": 0.3}], steps=[])
    more = make_recipe("more", sources=[source | {"share": 0.6}], steps=[], tasks=5)
    for recipe in (some, more):
        executor.run(recipe, 1)
    ids = {each["id"] for each in written(some)}
    assert 60 < len(ids) < 120 and ids < {each["id"] for each in written(more)}
    counts = json.loads((Path(some.directory) / "audit.json").read_text())["sources"]["web"]
    assert counts["sampled_out"] + counts["documents"] == 300


def test_parquet_and_shards_hold_the_same_documents(
    make_recipe: MakeRecipe, whole: Recipe, inputs: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from megalm.data.index import ShardReader
    from megalm.tokenizer.load import load
    from megalm.tokenizer.train import train

    texts = [each["text"] for each in written(whole)]
    train(lambda: texts * 3, 330).save(tmp_path / "tokenizer")
    shards = {"tokenizer": str(tmp_path / "tokenizer"), "held_out": 0.2}
    recipe = make_recipe("both", output={"text": {"format": "parquet"}, "shards": shards})
    executor.run(recipe, 1)
    root = Path(recipe.directory)
    rows = [row for path in sorted((root / "text").iterdir()) for row in parquet.read_table(path).to_pylist()]
    assert [row["text"] for row in rows] == texts
    assert json.loads(rows[0]["metadata"])["language"] in ("en", "zh")

    tokenizer = load(tmp_path / "tokenizer")
    readers = [ShardReader(str(root / "shards" / part), tokenizer, True) for part in ("train", "held_out")]
    decoded = [tokenizer.decode(list(reader.document(i))[:-1]) for reader in readers for i in range(reader.documents)]
    assert sorted(decoded) == sorted(texts) and 0 < readers[1].documents < readers[0].documents
    report = json.loads((root / "audit.json").read_text())
    lengths = [len(reader.document(i)) for reader in readers for i in range(reader.documents)]
    assert report["tokens_written"] == sum(lengths)

    source = {"path": str(inputs / "0.jsonl"), "name": "zero"}, {"path": str(inputs / "1.jsonl"), "name": "one"}
    apart = make_recipe("apart", sources=[*source], output={"text": None, "shards": shards | {"by_source": True}})
    executor.run(apart, 1)
    counts = json.loads((Path(apart.directory) / "audit.json").read_text())["counts"]["source"]
    for name in ("zero", "one"):
        folders = [Path(apart.directory) / "shards" / name / part for part in ("train", "held_out")]
        documents = sum(ShardReader(str(folder), tokenizer, True).documents for folder in folders)
        assert documents == counts[name]["documents"] > 10

    step = report["steps"][2]
    ends = step["documents_out"]  # of a document each: they are in the shards, and not in the text
    assert step["tokens_out"] == pytest.approx(report["tokens_written"] - ends, rel=0.05)
    assert step["tokens_in"] > step["tokens_out"]

    killed = make_recipe("both again", output={"text": {"format": "parquet"}, "shards": shards})

    def die_in_the_second_phase() -> None:
        run_phase = executor.run_phase

        def dying(plan: Any, number: int, tasks: Any, workers: int) -> None:
            run_phase(plan, number, tasks[:1] if number else tasks, workers)
            if number:
                os.kill(os.getpid(), signal.SIGKILL)

        executor.run_phase = dying
        executor.run(killed, 1)

    assert os.WIFSIGNALED(in_fork(die_in_the_second_phase))
    executor.run(killed, 1)
    assert contents(killed) == contents(recipe)


def test_the_parts_of_slurm_make_the_same(
    make_recipe: MakeRecipe, whole: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("parts")
    plan = prepare(recipe)
    monkeypatch.chdir(REPOSITORY)
    commands = slurm.commands("r.yaml", plan, 8, 1, ["--partition=cpu"], ["--set", "tasks=2"])
    parts = [command[command.index("--only") + 1] for command in commands]
    assert parts == ["phase:0", "merge:1", "phase:1", "finish"]
    assert "--array=0-1" in commands[0] and "--partition=cpu" in commands[0]
    assert not any(word.startswith("--array") for word in commands[1])

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nwc -l < {tmp_path}/calls\n')
    sbatch.chmod(0o755)
    assert slurm.submit(commands, plan) == ["1", "2", "3", "4"]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [f"--dependency=afterok:{number}" in calls[number] for number in (1, 2, 3)] == [True] * 3

    with pytest.raises(MegalmError, match="2 tasks of phase 0 are not done"):
        executor.merge(plan, 1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    for number in (0, 1):
        if number:
            executor.merge(plan, number)
        for element in ("1", "0"):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", element)
            executor.run_phase(plan, number, slurm.share(range(plan.tasks)), 1)
    executor.finish(plan)
    assert contents(recipe) == contents(whole)
    again = slurm.commands("r.yaml", plan, 8, 1, [])
    assert [command[command.index("--only") + 1] for command in again] == ["finish"], "what is done is not submitted"


def test_jobs_find_the_command_from_any_folder(make_recipe: MakeRecipe, whole: Recipe, tmp_path: Path) -> None:
    """sbatch, as this one, runs a copy of the script in the folder where it was submitted."""
    recipe = make_recipe("elsewhere").model_copy(update={"directory": "elsewhere"})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        "#!/bin/sh\nuntil [ -f $1 ]; do shift; done\n"
        f'cp "$1" {tmp_path}/copy; shift; bash {tmp_path}/copy "$@" >&2 && echo 1\n'
    )
    sbatch.chmod(0o755)
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "curate.py", "--config", "recipe.yaml", "--executor", "slurm"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert contents(recipe.model_copy(update={"directory": str(tmp_path / "elsewhere")})) == contents(whole)


def test_an_empty_end_is_told(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(steps=[{"kind": f"{STEPS}:LongEnough", "characters": 10**6}])
    executor.run(recipe, 1)
    assert "no document has passed all steps" in capsys.readouterr().err
    assert not written(recipe)


def test_the_most_tasks_have_names_that_are_in_order(make_recipe: MakeRecipe) -> None:
    most = 100_000
    recipe = make_recipe(tasks=most)
    folder = prepare(recipe).folder
    names = [folder.task(task).name for task in range(most)]
    assert names == sorted(names)
    with pytest.raises(ValueError, match="less than or equal to 100000"):
        make_recipe(tasks=most + 1)
