import errno
import io
import json
import math
import resource
import struct
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.errors import MegalmError
from megalm.metrics.config import LoggingConfig, WandbConfig
from megalm.metrics.records import read_records
from megalm.metrics.sinks import ConsoleSink, JsonlSink, TensorboardSink, WandbSink, flatten, open_sinks


def record(step: int, **more) -> dict:
    return {"step": step, "loss": 1 / step, "lr": 3e-4, "grad_norm": 1.5, "tokens": step * 1000, **more}


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path, first: int, last: int, resumed_step: int = 0) -> None:
    sink = JsonlSink(path, resumed_step)
    for step in range(first, last + 1):
        sink.write(record(step))
    sink.close()


def with_full_disk(write: Callable[[], None]) -> None:
    """No file can grow beyond ten bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestJsonl:
    def test_a_record_is_on_disk_when_write_returns(self, tmp_path):
        sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
        sink.write(record(1, held_out={"web": 3.5}))
        assert list(read_records(tmp_path / "run" / "metrics.jsonl")) == [record(1, held_out={"web": 3.5})]

    def test_floats_come_back_bitwise(self, tmp_path):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write({"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300})
        (back,) = read_records(tmp_path / "metrics.jsonl")
        assert (back["loss"], back["lr"]) == (0.1 + 0.2, 1e-300)

    def test_resuming_gives_the_file_of_the_uninterrupted_run(self, tmp_path):
        write(tmp_path / "whole.jsonl", 1, 9)
        write(tmp_path / "cut.jsonl", 1, 7)
        write(tmp_path / "cut.jsonl", 6, 9, resumed_step=5)
        assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    @pytest.mark.parametrize("cut", [1, 20, 40])
    def test_a_line_that_a_crash_cut_short_is_dropped(self, tmp_path, cut, caplog):
        write(tmp_path / "whole.jsonl", 1, 6)
        path = tmp_path / "cut.jsonl"
        write(path, 1, 5)
        path.write_bytes(path.read_bytes()[:-cut])
        write(path, 5, 6, resumed_step=4)
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert ("line 5 is not a record" in caplog.text) == (cut > 1)

    def test_a_new_run_starts_an_empty_file(self, tmp_path):
        write(tmp_path / "metrics.jsonl", 1, 5)
        write(tmp_path / "metrics.jsonl", 1, 2)
        assert steps(tmp_path / "metrics.jsonl") == [1, 2]

    def test_a_rollback_replaces_the_steps_it_takes_again(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        sink = JsonlSink(path)
        for step in (1, 2, 3, 4, 3):
            sink.write(record(step))
        assert steps(path) == [1, 2, 3]
        sink.write(record(4))
        assert steps(path) == [1, 2, 3, 4]

    def test_what_a_full_disk_did_not_take_follows_later(self, tmp_path):
        """Half of a line fits, then nothing, then all."""
        write(tmp_path / "whole.jsonl", 1, 5)
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write(record(1))
        file, room = sink._file, [20]

        def full(data: bytes) -> int:
            if not room[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = file.write(data[: room[0]])
            room[0] -= taken
            return taken

        sink._file = SimpleNamespace(write=full)
        for step in (2, 3):
            with pytest.raises(OSError, match="No space"):
                sink.write(record(step))
        sink._file = file
        sink.write(record(4))
        sink.write(record(5))
        sink.close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_rewind_takes_out_what_was_written_of_later_steps(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        sink = JsonlSink(path)
        for step in (3, 6):
            sink.write(record(step))
        sink.rewind(5)
        assert steps(path) == [3]
        sink.rewind(5)
        sink.write(record(9))
        sink.close()
        assert steps(path) == [3, 9]

    @pytest.mark.parametrize("told", [True, False])
    def test_a_rewind_on_a_full_disk_follows_later(self, tmp_path, told):
        """told: by rewind(), and not only by a step that comes again."""
        path = tmp_path / "metrics.jsonl"
        sink = JsonlSink(path)
        for step in (3, 6):
            sink.write(record(step, course="left"))
        before = path.read_bytes()
        if told:
            with_full_disk(lambda: sink.rewind(5))
        for step in (6, 9):
            with_full_disk(lambda step=step: sink.write(record(step)))
        assert path.read_bytes() == before
        sink.write(record(12))
        sink.close()
        assert list(read_records(path)) == [record(3, course="left"), *map(record, (6, 9, 12))]

    def test_a_number_that_is_not_finite_is_null(self, tmp_path):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "held_out": {"web": math.nan}})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert strict == {"step": 1, "loss": None, "grad_norm": None, "held_out": {"web": None}}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestConsole:
    def test_lines_align(self):
        stream = io.StringIO()
        sink = ConsoleSink(1000, stream=stream)
        for step in (1, 10, 100, 1000):
            sink.write(record(step, tokens_per_second=12345.0 * step, memory=3 * 2**30))
        sink.close()
        lines = stream.getvalue().splitlines()
        assert len(lines) == 4
        assert len({line.index("grad") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1
        assert lines[1].startswith(
            "step   10/1000  loss  0.1000  lr 3.00e-04  grad   1.50   123K tok/s    3.0 GiB  ETA"
        )

    def test_what_a_record_lacks_is_left_out(self):
        stream = io.StringIO()
        ConsoleSink(5, stream=stream).write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
        assert stream.getvalue().startswith("step 1/5  loss     nan  grad    inf  ETA")

    def test_held_out_loss_has_its_own_line(self):
        stream = io.StringIO()
        ConsoleSink(5, stream=stream).write(record(2, held_out={"web": 3.25, "code": 1.5}))
        assert stream.getvalue().splitlines()[1] == "step 2 held-out loss  web 3.2500  code 1.5000"
        stream = io.StringIO()
        ConsoleSink(5, stream=stream).write(record(2, held_out={"web": 3.25}, bits_per_byte={"web": 1.125}))
        assert stream.getvalue().splitlines()[1] == "step 2 held-out loss  web 3.2500 (1.1250 bits per byte)"

    def test_eta_is_the_remaining_steps_at_the_present_pace(self, monkeypatch):
        now = [0.0]
        stream = io.StringIO()
        sink = ConsoleSink(100, 40, stream=stream)
        monkeypatch.setattr(sink._steps, "_clock", lambda: now[0])
        sink._steps._reports[0] = (0.0, 0.0)
        now[0] = 20.0
        sink.write(record(50))
        assert stream.getvalue().rstrip().endswith("ETA  1m 40s")

    @pytest.mark.parametrize(("choice", "bar"), [("auto", True), ("on", True), ("off", False)])
    def test_a_terminal_gets_a_bar(self, choice, bar):
        stream = Terminal()
        sink = ConsoleSink(8, 3, progress_bar=choice, stream=stream)
        sink.write(record(4, held_out={"web": 3.25}))
        sink.close()
        text = stream.getvalue()
        assert ("50%|" in text) == bar
        assert "4/8" in text
        assert "loss  0.2500" in text
        assert "web 3.2500" in text

    def test_a_file_gets_lines_unless_told(self):
        stream = io.StringIO()
        ConsoleSink(8, stream=stream).write(record(4))
        assert "%|" not in stream.getvalue()
        sink = ConsoleSink(8, progress_bar="on", stream=stream)
        sink.write(record(4))
        sink.close()
        assert "%|" in stream.getvalue()


def test_flatten():
    assert flatten({"step": 1, "held_out": {"web": 2.0, "code": 3.0}}) == {
        "step": 1,
        "held_out/web": 2.0,
        "held_out/code": 3.0,
    }


def test_tensorboard_reads_what_was_written_and_forgets_purged_steps(tmp_path):
    for resumed_step, last in ((0, 4), (2, 3)):
        sink = TensorboardSink(tmp_path, resumed_step)
        for step in range(resumed_step + 1, last + 1):
            sink.write(record(step, held_out={"web": float(resumed_step)}, note="text is passed over"))
        sink.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3)
    ]
    assert [event.value for event in reader.Scalars("held_out/web")] == [0.0, 0.0, 2.0]


def test_tensorboard_forgets_a_run_killed_before_its_first_checkpoint_and_a_course_rolled_back(tmp_path):
    for course in ((1, 2, 3, 4, 5), (1, 2, 3)):
        sink = TensorboardSink(tmp_path)
        for step in course:
            sink.write(record(step))
        sink.close()
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 2, 3]
    sink = TensorboardSink(tmp_path, 2)
    for step in (3, 6):
        sink.write(record(step))
    sink.rewind(4)
    sink.write(record(9))
    sink.close()
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [1, 2, 3, 9]


def test_every_sink_takes_a_rewind(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = LoggingConfig(tensorboard=True, wandb=WandbConfig(mode="offline"))
    sinks = open_sinks(config, tmp_path, total_steps=5, resumed_step=0, run_config={})
    assert len(sinks) == 4
    for sink in sinks:
        sink.write(record(2))
        sink.rewind(1)
        sink.write(record(3))
        sink.close()


def test_wandb_without_a_login_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(MegalmError, match=r"wandb login, or set logging.wandb.mode to offline$"):
        WandbSink(WandbConfig(mode="online"), tmp_path / "run", {})


@pytest.mark.parametrize(
    ("package", "config", "message"),
    [
        ("wandb", LoggingConfig(wandb=WandbConfig(mode="offline")), r"pip install 'megalm\[wandb\]'"),
        ("torch.utils.tensorboard", LoggingConfig(tensorboard=True), r"pip install 'megalm\[tensorboard\]'"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, package, config, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MegalmError, match=message):
        open_sinks(config, tmp_path / "run", total_steps=5, resumed_step=0, run_config={})
    assert not (tmp_path / "run").exists()


def test_the_default_is_console_and_jsonl_and_never_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sinks = open_sinks(LoggingConfig(), tmp_path, total_steps=5, resumed_step=0, run_config={})
    assert [type(sink) for sink in sinks] == [JsonlSink, ConsoleSink]
    for sink in sinks:
        sink.close()


def wandb_entries(data: bytes):
    """The messages of a .wandb file, which is a LevelDB log: blocks of 32 KiB, each piece behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, message = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(message)
            message = b""


def test_wandb_offline_continues_its_run(tmp_path, monkeypatch):
    """Two parts of one run, written without a network, read back from wandb's own files."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = tmp_path / "tiny"
    for step in (1, 2):
        sink = WandbSink(WandbConfig(mode="offline", project="proof"), directory, {"train": {"steps": 2}})
        sink.write(record(step, held_out={"web": 3.0 + step}))
        sink.close()
    deadline = time.monotonic() + 30
    while True:  # wandb's own process may write the end of its file after finish() has returned
        parts = [list(wandb_entries(path.read_bytes())) for path in sorted(directory.glob("wandb/offline-*/*.wandb"))]
        if len(parts) == 2 and all(part and part[-1].WhichOneof("record_type") == "exit" for part in parts):
            break
        assert time.monotonic() < deadline, "wandb did not finish its two files"
        time.sleep(0.05)
    entries = [entry for part in parts for entry in part]
    runs = [entry.run for entry in entries if entry.WhichOneof("record_type") == "run"]
    run_id = (directory / "wandb-id").read_text().strip()
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(run_id, "proof", "tiny")}
    rows = [entry.history.item for entry in entries if entry.WhichOneof("record_type") == "history"]
    values = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]
    assert [(row["step"], row["held_out/web"]) for row in values] == [(1, 4.0), (2, 5.0)]
