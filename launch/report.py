"""One self-contained HTML page of a run: curves, events, ranks. Drawn as SVG: it needs nothing else to be read."""

import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.status import event_line, require_run
from megalm.errors import MegalmError
from megalm.metrics.events import Event, read_events
from megalm.metrics.meters import format_bytes, format_count, format_duration
from megalm.metrics.records import Record, read_records

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 860, 220, 70, 24, 8
POINTS = 1500
"""Of a line; of a longer one the lowest and highest of each stretch are drawn, so that no spike is lost."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = {
    "failed": "#C00000",
    "hung": "#C00000",
    "stopped": "#0072B2",
    "anomaly": "#E69F00",
    "not saved": "#C00000",
    "slow rank": "#CC79A7",
}
"""Events drawn across the curves, with their colours."""
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 900px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin: 2em 0 .3em }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 10px 2px 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } pre { font-size: 12px; overflow-x: auto }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #666 }
.slow { color: #C00000; font-weight: 600 } .key { margin-right: 1.2em; white-space: nowrap }
"""


@dataclass(frozen=True)
class Line:
    name: str
    points: list[tuple[float, float]]
    faint: bool = False


def write(run: Path, output: Path) -> None:
    """Write the page of a run. Raises MegalmError for a folder that is no run or has no step yet."""
    require_run(run)
    path = run / "metrics.jsonl"
    records = list(read_records(path)) if path.exists() else []
    if not records:
        raise MegalmError(f"{run} has no step yet: wait for the first line of {path}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(run.resolve().name, records, read_events(run)), encoding="utf-8")


def page(name: str, records: list[Record], events: list[Event]) -> str:
    """The page's HTML."""
    marks = [
        (event["step"], event["event"]) for event in events if event["event"] in MARKS and _is_number(event.get("step"))
    ]
    corpora = sorted({corpus for record in records for corpus in record.get("held_out") or {}})
    loss = [
        Line("loss", _column(records, "loss"), faint=len(records) > 50),
        *([Line("smoothed", _smooth(_column(records, "loss")))] if len(records) > 50 else []),
        *(Line(f"held out: {corpus}", _column(records, "held_out", corpus)) for corpus in corpora),
    ]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(name)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(name)}</h1>",
        _table(_summary(records, events)),
        _chart("Loss (nats per token)", loss, marks),
        _chart("Gradient norm", [Line("gradient norm", _column(records, "grad_norm"))], marks, logarithmic=True),
        _chart("Learning rate", [Line("learning rate", _column(records, "lr"))], marks),
        _chart("Tokens per second", [Line("tokens per second", _column(records, "tokens_per_second"))], marks),
        _chart("Memory (GiB)", [Line("memory", [(x, y / 2**30) for x, y in _column(records, "memory")])], marks),
        _ranks(events),
        "<h2>Events</h2><pre>",
        html.escape("\n".join(event_line(event) for event in events)) or "none",
        f"</pre><p>Written {time.strftime('%Y-%m-%d %H:%M:%S')}.</p></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(records: list[Record], events: list[Event]) -> list[tuple[str, str]]:
    last = records[-1]
    counts = {
        kind: sum(event["event"] == kind for event in events) for kind in ("started", "failed", "hung", "stopped")
    }
    times = [record["time"] for record in records if _is_number(record.get("time"))]
    rates = [record["tokens_per_second"] for record in records if _is_number(record.get("tokens_per_second"))]
    rows = [
        ("step", f"{last['step']:,}" + (" (done)" if any(event["event"] == "done" for event in events) else "")),
        ("loss", f"{last['loss']:.4f}" if _is_number(last.get("loss")) else "not a number"),
        ("tokens", format_count(last.get("tokens", math.nan))),
    ]
    if times:
        rows.append(("from first step to last", format_duration(times[-1] - times[0])))
    if rates:
        rows.append(("tokens per second, median", format_count(sorted(rates)[len(rates) // 2])))
    if _is_number(last.get("memory")):
        rows.append(("memory", format_bytes(last["memory"])))
    rows += [
        ("starts", str(counts["started"])),
        ("failures", f"{counts['failed']}, of them hangs {counts['hung']}"),
        ("stops by a signal", str(counts["stopped"])),
        ("saves", str(sum(event["event"] == "saved" for event in events))),
        ("steps not applied", str(sum(event["event"] == "anomaly" for event in events))),
    ]
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _ranks(events: list[Event]) -> str:
    """The ranks' own work per step, as they compared it last; slow ones are marked."""
    last = next((event for event in reversed(events) if event["event"] == "ranks"), None)
    if last is None:
        return ""
    named = {event["rank"] for event in events if event["event"] == "slow rank" and event["step"] == last["step"]}
    most = max(last["p50"]) or 1.0
    rows = []
    for rank, host in enumerate(last["hosts"]):
        numbers = "".join(f"<td class=n>{1000 * last[key][rank]:.1f}</td>" for key in ("p50", "p90", "max"))
        width = 200 * last["p50"][rank] / most
        bar = (
            f"<svg style='width:200px' viewBox='0 0 200 8'><rect width='{width:.0f}' height='8' fill='#0072B2'/></svg>"
        )
        mark = " class=slow" if rank in named else ""
        rows.append(f"<tr><td{mark}>{rank}</td><td{mark}>{html.escape(host)}</td>{numbers}<td>{bar}</td></tr>")
    return (
        f"<h2>Own work of each rank, milliseconds a step (up to step {last['step']})</h2>"
        "<table><tr><th>rank<th>host<th>median<th>90 %<th>most<th></tr>" + "".join(rows) + "</table>"
    )


def _column(records: list[Record], key: str, inner: str | None = None) -> list[tuple[float, float]]:
    points = []
    for record in records:
        value: Any = record.get(key)
        if inner is not None:
            value = (value or {}).get(inner)
        if _is_number(value):
            points.append((float(record["step"]), float(value)))
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    half = max(1, len(points) // 50)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for n, (x, _) in enumerate(points):
        reach = min(half, n, len(points) - 1 - n)
        smoothed.append((x, (sums[n + reach + 1] - sums[n - reach]) / (2 * reach + 1)))
    return smoothed


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    size = len(points) / (POINTS // 2)
    kept = [points[0]]
    for n in range(POINTS // 2):
        stretch = points[int(n * size) : int((n + 1) * size)]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _chart(title: str, lines: list[Line], marks: list[tuple[float, str]], *, logarithmic: bool = False) -> str:
    """Lines over steps, with events as vertical strokes."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    logarithmic = logarithmic and min(ys) > 0 and max(ys) > 20 * min(ys)
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if logarithmic else (min(ys), max(ys))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        y = math.log10(y) if logarithmic else y
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - 10)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP):.1f}"

    drawn = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{html.escape(title)}'>"]
    for n in range(5):
        y = low + (high - low) * n / 4
        value = 10**y if logarithmic else y
        line_height = HEIGHT - BOTTOM - n / 4 * (HEIGHT - BOTTOM - TOP)
        drawn.append(f"<path d='M{LEFT} {line_height:.1f}H{WIDTH - 10}' stroke='#E3E3E3'/>")
        drawn.append(f"<text x='{LEFT - 6}' y='{line_height + 4:.1f}' text-anchor='end'>{_tick(value)}</text>")
        step = first + (last - first) * n / 4
        column = LEFT + n / 4 * (WIDTH - LEFT - 10)
        drawn.append(f"<text x='{column:.1f}' y='{HEIGHT - 6}' text-anchor='middle'>{step:,.0f}</text>")
    for x, kind in marks:
        if first <= x <= last:
            across = place(x, 10**low if logarithmic else low).split(",")[0]
            drawn.append(
                f"<path d='M{across} {TOP}V{HEIGHT - BOTTOM}' stroke='{MARKS[kind]}' stroke-dasharray='3 2'>"
                f"<title>{kind} at step {x:,.0f}</title></path>"
            )
    for n, line in enumerate(lines):
        colour = COLOURS[n % len(COLOURS)]
        points = " ".join(place(x, y) for x, y in _thinned(line.points))
        opacity = 0.35 if line.faint else 1
        if len(line.points) == 1:
            across, _, height = points.partition(",")
            drawn.append(f"<circle cx='{across}' cy='{height}' r='3' fill='{colour}'/>")
        else:
            drawn.append(
                f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='1.6' opacity='{opacity}'/>"
            )
    keys = [(line.name, COLOURS[n % len(COLOURS)]) for n, line in enumerate(lines) if len(lines) > 1]
    keys += [(kind, MARKS[kind]) for kind in dict.fromkeys(kind for _, kind in marks)]
    legend = "".join(
        f"<span class=key><span style='color:{colour}'>&#9644;</span> {html.escape(name)}</span>"
        for name, colour in keys
    )
    return f"<h2>{html.escape(title)}</h2>\n" + "".join(drawn) + f"</svg>\n<div>{legend}</div>"


def _tick(value: float) -> str:
    return format_count(value) if abs(value) >= 1000 else f"{value:.3g}"
