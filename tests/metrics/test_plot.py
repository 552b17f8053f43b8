import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megalm.errors import MegalmError
from megalm.metrics import plot
from megalm.metrics.plot import plot_runs, smooth

ROOT = Path(__file__).parents[2]


def run(folder: Path, steps: int = 60, **changes) -> Path:
    """A run folder with a falling loss; changes: functions of the step that replace a key (None: leave it out)."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 2 + 5 / step, "lr": 1e-3, "grad_norm": 1 + 1 / step, "tokens": step * 4096}
        if step % 20 == 0:
            record["held_out"] = {"web": 2.2 + 5 / step, "code": 1.5 + 5 / step}
        for key, change in changes.items():
            if change(step) is None:
                record.pop(key)
            else:
                record[key] = change(step)
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot_runs makes, to look at their axes."""
    figures = []

    def keep(*arguments, **settings):
        figures.append(figure(*arguments, **settings))
        return figures[-1]

    figure = plot.Figure
    monkeypatch.setattr(plot, "Figure", keep)
    return figures


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_one_run(tmp_path, drawn):
    plot_runs([run(tmp_path / "tiny")], tmp_path / "pictures" / "loss.png")
    picture = imread(tmp_path / "pictures" / "loss.png")
    assert picture.shape[0] > 1000
    assert picture.std() > 0.05
    loss, rate, norm = drawn[0].axes
    curves = lines(loss)
    assert curves["held out: web"] == ([20 * 4096, 40 * 4096, 60 * 4096], [2.2 + 5 / step for step in (20, 40, 60)])
    assert curves["held out: code"][1] == [1.5 + 5 / step for step in (20, 40, 60)]
    assert curves["training"][0] == [step * 4096 for step in range(1, 61)]
    raw = next(line for line in loss.get_lines() if line.get_label().startswith("_"))
    assert list(raw.get_ydata()) == [2 + 5 / step for step in range(1, 61)]
    assert set(rate.get_lines()[0].get_ydata()) == {1e-3}
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["loss (nats per token)", "learning rate", "gradient norm"]
    assert norm.get_xlabel() == "training tokens"
    assert loss.get_title(loc="left") == "tiny"


def test_several_runs_share_the_axes_and_keep_their_names(tmp_path, drawn):
    runs = [run(tmp_path / "a" / "x"), run(tmp_path / "b" / "x"), run(tmp_path / "y", 30)]
    plot_runs(runs, tmp_path / "all.png", log_loss=True, title="Three")
    loss = drawn[0].axes[0]
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert [label for label in labels if "held" not in label] == ["a/x", "b/x", f"{tmp_path.name}/y"]
    assert loss.get_yscale() == "log"
    assert loss.get_title(loc="left") == "Three"
    colours = {line.get_color() for line in loss.get_lines()}
    assert len(colours) == 3


def test_a_long_name_does_not_push_the_curves_aside(tmp_path, drawn, recwarn):
    plot_runs([run(tmp_path / f"{'long' * 30}-{i}", 5) for i in range(2)], tmp_path / "all.png")
    assert drawn[0].axes[0].get_position().width > 0.8
    assert not recwarn.list


def test_ten_runs_look_different(tmp_path, drawn):
    plot_runs([run(tmp_path / str(i), 5) for i in range(10)], tmp_path / "all.png")
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].get_lines()]
    assert len(set(looks)) == 10


def test_steps_on_demand_and_where_one_run_has_no_tokens(tmp_path, drawn):
    whole, bare = run(tmp_path / "whole"), run(tmp_path / "bare", tokens=lambda step: None)
    plot_runs([whole], tmp_path / "a.png", x="steps")
    plot_runs([whole, bare], tmp_path / "b.png")
    for figure in drawn:
        assert figure.axes[2].get_xlabel() == "steps"
        assert figure.axes[0].get_lines()[0].get_xdata()[-1] == 60


def test_nan_and_missing_values_leave_holes_only(tmp_path, drawn):
    folder = run(
        tmp_path / "holes",
        loss=lambda step: math.nan if step == 30 else 3.0,
        grad_norm=lambda step: None if step < 10 else 0.0,
        lr=lambda step: None,
    )
    plot_runs([folder], tmp_path / "loss.png")
    loss, rate, _ = drawn[0].axes
    assert lines(loss)["training"][1] == pytest.approx([3.0] * 60)
    assert len(rate.get_lines()[0].get_xdata()) == 0


def test_one_point_is_a_dot(tmp_path, drawn):
    plot_runs([run(tmp_path / "one", 1)], tmp_path / "loss.png")
    assert [axes.get_lines()[0].get_marker() for axes in drawn[0].axes] == ["o"] * 3


def test_a_truncated_last_line_is_left_out(tmp_path, drawn):
    folder = run(tmp_path / "cut")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[:-10])
    plot_runs([folder], tmp_path / "loss.png")
    assert len(lines(drawn[0].axes[0])["training"][0]) == 59


def test_a_long_run_is_thinned_and_keeps_its_spikes_and_its_mean(tmp_path, drawn):
    steps = 30_000
    noise = np.random.default_rng(0).normal(scale=0.1, size=steps + 1)
    folder = run(
        tmp_path / "long",
        steps,
        loss=lambda step: 50.0 if step == 12_345 else 3 + noise[step],
        grad_norm=lambda step: 1e-3 if step == 23_456 else 1.0,
        held_out=lambda step: {"web": 2.0 + step} if step % 2 == 0 else {},
    )
    plot_runs([folder], tmp_path / "loss.png")
    loss, _, norm = drawn[0].axes
    for axes in drawn[0].axes:
        for line in axes.get_lines():
            assert 2 <= len(line.get_xdata()) <= 5002
            assert list(line.get_xdata()) == sorted(line.get_xdata())
    raw = next(line for line in loss.get_lines() if line.get_label().startswith("_"))
    x, y = raw.get_data()
    assert (x[0], x[-1]) == (4096, steps * 4096)
    assert dict(zip(x, y, strict=True))[12_345 * 4096] == 50.0
    assert norm.get_lines()[0].get_ydata().min() == 1e-3
    # The average is of all records and not of those that are drawn, half of which are extremes.
    x, y = lines(loss)["training"]
    assert y[-1] == pytest.approx(np.mean(3 + noise[-601:]), abs=0.05)
    assert lines(loss)["held out: web"][1][-1] == 2.0 + steps


def test_drawing_takes_little_memory(tmp_path):
    folder = run(tmp_path / "long", 20_000)
    plot_runs([folder], tmp_path / "first.png")  # what matplotlib keeps
    tracemalloc.start()
    plot_runs([folder], tmp_path / "second.png")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9e6  # whole records would take 19 MB


def test_smooth_keeps_straight_lines_and_averages_noise():
    line = np.arange(100.0)
    assert smooth(line)[:90] == pytest.approx(line[:90])
    noise = np.random.default_rng(0).normal(size=10_000)
    assert smooth(noise).std() < 0.1
    assert smooth(np.full(50, 2.0)) == pytest.approx(2.0)


def test_smooth_leaves_nan_out():
    values = np.full(100, 3.0)
    values[[0, 50, 99]] = np.nan
    smoothed = smooth(values)
    assert math.isnan(smoothed[0])  # nothing else in its window
    assert smoothed[1:] == pytest.approx(3.0)
    assert np.isnan(smooth(np.full(30, np.nan))).all()


def test_a_spike_does_not_lift_the_norms_around_it():
    norms = np.ones(1000)
    norms[500] = 1000.0
    assert plot._smooth_logarithm(norms).max() < 1.2
    assert smooth(norms).max() > 10  # what a plain average would show


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/plot_runs.py", *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_command(tmp_path):
    done = command(str(run(tmp_path / "tiny")), "--output", str(tmp_path / "loss.svg"), "--log-loss")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "loss.svg").read_text().startswith("<?xml")
    (tmp_path / "folder.png").mkdir()
    for output in ("folder.png", "loss.svg/x.png"):
        refused = command(str(tmp_path / "tiny"), "--output", str(tmp_path / output))
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith(f"error: cannot write {tmp_path / output} (")
    refused = command(str(tmp_path), "--output", str(tmp_path / "x.png"))
    assert refused.returncode == 2
    assert refused.stderr == f"error: {tmp_path} has no metrics.jsonl: name the folder of a run (run.directory)\n"


def test_refusals(tmp_path):
    folder = run(tmp_path / "tiny", 3)
    with pytest.raises(MegalmError, match=r"loss\.xyz is not a picture"):
        plot_runs([folder], tmp_path / "loss.xyz")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(MegalmError, match="holds no records yet"):
        plot_runs([folder], tmp_path / "loss.png")
