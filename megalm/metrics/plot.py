"""Pictures of one or several runs, drawn from their metrics.jsonl."""

import itertools
import math
import re
from array import array
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, LogFormatterSciNotation, MaxNLocator

from megalm.errors import MegalmError
from megalm.metrics.compare import Course, main_metric
from megalm.metrics.meters import format_count
from megalm.metrics.records import read_records

# Okabe and Ito's palette, which colour-blind readers can tell apart, the faint yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SHORT = 20  # curves of so few points are drawn as they are
CROWDED = 40  # curves of so many held-out points go without markers
MOST = 5000  # points of a line, several to a pixel of its picture
DRAWN = ("step", "tokens", "loss", "lr", "grad_norm")  # what is kept of a record
HELD_OUT = "held_out/"  # and its held-out losses, each under this and the corpus's name
INK, MUTED, GRID = "#222222", "#666666", "#E3E3E3"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#AAAAAA",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}

Curves = dict[str, np.ndarray]
"""Columns of a run's records, NaN where a record has no such number. Each [records]."""


def plot_runs(
    runs: list[Path],
    output: Path,
    *,
    x: Literal["tokens", "steps"] = "tokens",
    log_loss: bool = False,
    title: str | None = None,
) -> None:
    """Draw training and held-out loss, learning rate and gradient norm of run folders into `output` (.png, .pdf, .svg).

    The thin line is each record's loss, the thick one its moving average. Of a long run, the lowest and the highest
    point of each stretch are drawn, so that no spike is lost. A run without token counts puts all of them on steps.
    Raises MegalmError for a folder without metrics.jsonl or with an empty one, and for an output
    format that is not known.
    """
    curves = [_read(run) for run in runs]
    key = "tokens" if x == "tokens" and all(np.isfinite(curve["tokens"]).all() for curve in curves) else "step"
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 7.2), dpi=150, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        formats = canvas.get_supported_filetypes()
        if output.suffix.lstrip(".").lower() not in formats:
            raise MegalmError(f"{output} is not a picture that can be written: end its name in .png, .pdf or .svg")
        loss_axes, rate_axes, norm_axes = figure.subplots(3, 1, sharex=True, height_ratios=[3.2, 1, 1])
        names = short_names(runs)
        for index, (name, curve) in enumerate(zip(names, curves, strict=True)):
            colour = COLOURS[index % len(COLOURS)]
            style = ("-", "--", ":")[index // len(COLOURS) % 3]
            places = curve[key]
            _draw_loss(loss_axes, curve, key, colour, style, name if len(runs) > 1 else None)
            _draw_line(rate_axes, places, curve["lr"], color=colour, linestyle=style, linewidth=1.6)
            norms = curve["grad_norm"]
            _draw_line(norm_axes, places, norms, color=colour, alpha=0.3, linewidth=0.7)
            _draw_line(norm_axes, places, _smooth_logarithm(norms), color=colour, linestyle=style, linewidth=1.6)
        if log_loss:
            loss_axes.set_yscale("log")
            loss_axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            loss_axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.8)))
            loss_axes.grid(which="minor", color=GRID, linewidth=0.8)
        _finish(figure, loss_axes, rate_axes, norm_axes, key, title or (names[0] if len(runs) == 1 else None))
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Moving average over `share` of the points on either side. Shape [n] -> [n].

    At the start, where curves are steep, as few points after as there are before, so that the average does not lag.
    NaN is left out of the averages; where there is nothing else, it stays.
    """
    n = len(values)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(n)
    half = np.minimum(index, max(1, round(share * n)) if n > SHORT else 0)
    low, high = index - half, np.minimum(index + half + 1, n)
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def _smooth_logarithm(values: np.ndarray) -> np.ndarray:
    """Geometric moving average: one spike does not lift its neighbours. What is not positive is left out."""
    return np.exp(smooth(np.log(np.where(values > 0, values, np.nan))))


def _read(run: Path) -> Curves:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise MegalmError(f"{run} has no metrics.jsonl: name the folder of a run (run.directory)")
    columns: dict[str, array[float]] = {key: array("d") for key in DRAWN}
    drawn = [(key, columns[key].append) for key in DRAWN]
    for number, record in enumerate(read_records(path)):
        for key, append in drawn:
            append(_number(record.get(key)))
        for corpus, loss in (record.get("held_out") or {}).items():
            column = columns.setdefault(HELD_OUT + corpus, array("d"))
            column.extend([math.nan] * (number - len(column)))
            column.append(_number(loss))
    records = len(columns["step"])
    if not records:
        raise MegalmError(f"{path} holds no records yet: wait for the run's first step")
    for column in columns.values():
        column.extend([math.nan] * (records - len(column)))
    return {key: np.array(column) for key, column in columns.items()}


def short_names(runs: list[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while len({names[-depth:] for names in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(names[-depth:]) for names in parts]


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else math.nan


def _draw_line(axes: Axes, places: np.ndarray, values: np.ndarray, **style: Any) -> None:
    """A line through the known points, or a dot when there is one."""
    places, values = _thinned(places, values)
    axes.plot(places, values, marker="o" if len(places) == 1 else None, markersize=4, **style)


def _thinned(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The known points: all, or of MOST / 2 equal stretches the lowest and the highest, and both ends."""
    known = np.isfinite(places) & np.isfinite(values)
    places, values = places[known], values[known]
    if len(values) <= MOST:
        return places, values
    bounds = np.linspace(0, len(values), MOST // 2 + 1).astype(int).tolist()
    kept = {0, len(values) - 1}
    for start, stop in itertools.pairwise(bounds):
        stretch = values[start:stop]
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    chosen = sorted(kept)
    return places[chosen], values[chosen]


def _draw_loss(axes: Axes, curves: Curves, key: str, colour: str, style: str, name: str | None) -> None:
    """name: the run's, where there are several; their held-out curves then share its colour."""
    places, losses = curves[key], curves["loss"]
    if len(losses) > SHORT:
        _draw_line(axes, places, losses, color=colour, alpha=0.35, linewidth=0.7)
    _draw_line(axes, places, smooth(losses), color=colour, linestyle=style, linewidth=2.0, label=name or "training")
    corpora = sorted(column.removeprefix(HELD_OUT) for column in curves if column.startswith(HELD_OUT))
    for number, corpus in enumerate(corpora):
        points = _thinned(places, curves[HELD_OUT + corpus])
        label = "held out" if corpus == "held_out" else f"held out: {corpus}"  # the name write_shards gives its folder
        axes.plot(
            *points,
            color=colour if name else COLOURS[(number + 1) % len(COLOURS)],
            linestyle=(0, (4, 2)) if name else "-",
            linewidth=1.3,
            marker=MARKERS[number % len(MARKERS)] if len(points[0]) <= CROWDED else "",
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=f"{name}, {label}" if name else label,
        )


def _finish(figure: Figure, loss: Axes, rate: Axes, norm: Axes, key: str, title: str | None) -> None:
    """Labels, scales and legend."""
    if title:
        loss.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=10)
    loss.set_ylabel("loss (nats per token)")
    rate.set_ylabel("learning rate")
    norm.set_ylabel("gradient norm")
    norm.set_xlabel("training tokens" if key == "tokens" else "steps")
    figure.align_ylabels()
    norm.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    norm.xaxis.set_major_formatter(
        FuncFormatter(_format_tokens if key == "tokens" else lambda value, _: f"{value:,.0f}")
    )
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rate.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    norms = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in norm.lines])
    positive = norms[norms > 0]
    if len(positive) and positive.max() > 20 * positive.min():
        norm.set_yscale("log")
        norm.yaxis.set_major_formatter(LogFormatterSciNotation())
    else:
        norm.set_ylim(bottom=0)
        norm.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    legend = loss.legend(loc="upper right")
    legend.set_in_layout(False)  # long names would squeeze the axes


def _format_tokens(value: float, _: int | None = None) -> str:
    """Of a tick: 400K, 1.2M, 1.05B."""
    return re.sub(r"\.?0+(?=[A-Z]$)", "", text) if "." in (text := format_count(value)) else text


def plot_scores(names: list[str], courses: list[Course], output: Path) -> bool:
    """Draw each task's main metric over training tokens, with standard errors, into `output`; a panel per task.

    Returns whether there was anything to draw. Raises MegalmError for an output format that is not known.
    """
    panels: dict[tuple[str, str], None] = {}
    for course in courses:
        for each in course.evaluated:
            for task, metrics in each.scores.items():
                if metric := main_metric(metrics):
                    panels[task, metric] = None
    if not panels:
        return False
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 3.2 * rows), dpi=150, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        if output.suffix.lstrip(".").lower() not in canvas.get_supported_filetypes():
            raise MegalmError(f"{output} is not a picture that can be written: end its name in .png, .pdf or .svg")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, (task, metric) in zip(axes, panels, strict=False):
            for index, (name, course) in enumerate(zip(names, courses, strict=True)):
                points = [
                    (each.tokens, score)
                    for each in course.evaluated
                    if (score := each.scores.get(task, {}).get(metric)) is not None
                ]
                panel.errorbar(
                    [tokens for tokens, _ in points],
                    [score.value for _, score in points],
                    yerr=[score.error if math.isfinite(score.error) else 0.0 for _, score in points],
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4.5,
                    linewidth=1.4,
                    elinewidth=0.9,
                    capsize=2,
                    label=name,
                )
            panel.set_title(task, loc="left", fontsize=10)
            panel.set_ylabel(metric)
            panel.xaxis.set_major_formatter(FuncFormatter(_format_tokens))
            panel.xaxis.set_major_locator(MaxNLocator(4))
        for panel in axes[len(panels) :]:
            panel.set_visible(False)
        for panel in axes[max(0, len(panels) - columns) : len(panels)]:
            panel.set_xlabel("training tokens")
        axes[0].legend(loc="best")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    return True
