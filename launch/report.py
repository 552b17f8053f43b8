"""One self-contained HTML page of a run: curves, events, ranks. Drawn as SVG: it needs nothing else to be read."""

import html
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launch.status import event_words, require_run, steps_of
from megalm.errors import MegalmError
from megalm.metrics.events import Event, read_events
from megalm.metrics.meters import format_bytes, format_count, format_duration
from megalm.metrics.records import Record, evaluated, read_records

POINTS = 1500
"""Of a line; of a longer one the lowest and highest of each stretch are drawn, so that no spike is lost."""
COLOURS = 6
"""Of lines, in STYLE."""
MARKS = {
    "failed": "bad",
    "hung": "bad",
    "not saved": "bad",
    "stopped": "stop",
    "anomaly": "warn",
    "slow rank": "slow",
}
"""Events drawn across the curves, with their colours in STYLE."""
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #626a73; --grid: #e4e6ea; --card: #f5f6f8; --back: #fff;
  --line0: #0072b2; --line1: #d55e00; --line2: #00805c; --line3: #b0508a; --line4: #8a6a00; --line5: #3a86c8;
  --bad: #c00000; --stop: #6a4fc9; --warn: #a06800; --slow: #b0508a }
@media (prefers-color-scheme: dark) { :root {
  --text: #e3e6ea; --muted: #a2a9b3; --grid: #343a43; --card: #1e232a; --back: #14181d;
  --line0: #58b0ee; --line1: #ff9350; --line2: #3fcf9c; --line3: #ea9fcb; --line4: #e5c04d; --line5: #9ad4f5;
  --bad: #ff6f6f; --stop: #a995ff; --warn: #e5b04d; --slow: #ea9fcb } }
* { box-sizing: border-box }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1160px;
  margin: 0 auto; padding: 1.5em 1.25em 3em }
h1 { font-size: 1.6em; margin: 0 0 .7em; overflow-wrap: anywhere } h2 { font-size: 1em; margin: 2em 0 .6em }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; margin: 0 }
dl div { background: var(--card); border-radius: 6px; padding: 8px 12px } dt { color: var(--muted); font-size: 12px }
dd { margin: 0; font-size: 17px; font-weight: 600; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 0 28px }
.charts > :first-child { grid-column: 1 / -1 } .charts > * { min-width: 0 }
figure { margin: 0 } figcaption { font-weight: 600; margin: 2em 0 .6em } figcaption small { color: var(--muted);
  font-weight: 400 }
.plot { position: relative; height: 200px; margin: 0 22px 26px 52px }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible }
.plot path, .plot polyline { vector-effect: non-scaling-stroke; fill: none }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--muted); white-space: nowrap }
.y { right: 100%; margin-right: 8px; transform: translateY(50%) } .x { top: 100%; margin-top: 8px;
  transform: translateX(-50%) }
.legend { font-size: 13px } .plot + .legend { margin-left: 52px }
dl + .legend { margin-top: 1.5em } .key { margin-right: 1.3em; white-space: nowrap }
.key i { display: inline-block; margin-right: 6px } .key i.line { width: 16px; border-top: 3px solid;
  vertical-align: middle } .key i.mark { height: 12px; border-left: 2px dashed; vertical-align: -1px }
.scroll { overflow: auto; max-height: 32em }
table { border-collapse: collapse; font-size: 13px } th { color: var(--muted); font-weight: 400; position: sticky;
  top: 0; background: var(--back) } td, th { padding: 3px 16px 3px 0; text-align: left; vertical-align: top }
td.time, td.host { white-space: nowrap } td.time { color: var(--muted) }
td.kind { white-space: nowrap; font-weight: 600 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.facts { overflow-wrap: anywhere }
.bar { width: 180px; margin-top: 6px } .bar div { background: var(--line0); height: 8px; border-radius: 2px }
.slow { color: var(--slow); font-weight: 600 } .bad { color: var(--bad) } footer { color: var(--muted);
  font-size: 12px; margin-top: 2.5em }
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
    output.write_text(page(run.resolve().name, records, read_events(run), steps_of(run)), encoding="utf-8")


def page(name: str, records: list[Record], events: list[Event], steps: int | None = None) -> str:
    """The page's HTML. steps: that the run is to take, if that is known."""
    marks = [
        (event["step"], event["event"]) for event in events if event["event"] in MARKS and _is_number(event.get("step"))
    ]
    held_out: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for metric, values in evaluated(record).items():
            for corpus, value in values.items():
                if _is_number(value):
                    held_out.setdefault(metric, {}).setdefault(corpus, []).append((record["step"], value))

    def on_held_out(metric: str) -> list[Line]:
        return [Line(f"held out: {corpus}", points) for corpus, points in held_out.pop(metric, {}).items()]

    long = len(records) > 50
    loss = [
        Line("loss", _column(records, "loss"), faint=long),
        *([Line("smoothed", _smooth(_column(records, "loss")))] if long else []),
        *on_held_out("loss"),
    ]
    memory = [(x, y / 2**30) for x, y in _column(records, "memory")]
    span = float(records[0]["step"]), float(max(records[-1]["step"], records[0]["step"] + 1))
    chart = partial(_drawn, span, marks)
    charts = [
        chart("Loss", "nats per token", loss),
        chart("Bits per byte", "held-out text", on_held_out("bits_per_byte")),
        *(chart(metric, "held-out rows", on_held_out(metric)) for metric in list(held_out)),
        chart("Gradient norm", "before clipping", [Line("", _column(records, "grad_norm"))], logarithmic=True),
        chart("Learning rate", "", [Line("", _column(records, "lr"))]),
        chart("Throughput", "tokens per second", [Line("", _column(records, "tokens_per_second"))]),
        chart("Memory", "GiB, the most that rank 0 has held", [Line("", memory)]),
    ]
    title = html.escape(name)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>",
        _tiles(_summary(records, events, steps)),
        _legend("mark", [(MARKS[kind], kind) for kind in dict.fromkeys(kind for _, kind in marks)]),
        "<div class=charts>",
        *charts,
        "</div>",
        _ranks(events),
        _events(events),
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M:%S')}</footer></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _summary(records: list[Record], events: list[Event], steps: int | None) -> list[tuple[str, str]]:
    last = records[-1]
    counts = Counter(event["event"] for event in events)
    times = [record["time"] for record in records if _is_number(record.get("time"))]
    rates = [record["tokens_per_second"] for record in records if _is_number(record.get("tokens_per_second"))]
    rows = [
        ("step", f"{last['step']:,}" + (", done" if counts["done"] else f" of {steps:,}" if steps else "")),
        ("loss", f"{last['loss']:.4f}" if _is_number(last.get("loss")) else "not a number"),
        ("tokens", format_count(last.get("tokens", math.nan))),
    ]
    if times:
        rows.append(("from first step to last", format_duration(times[-1] - times[0])))
    if rates:
        rows.append(("median tokens per second", format_count(sorted(rates)[len(rates) // 2])))
    if _is_number(last.get("memory")):
        rows.append(("memory of rank 0", format_bytes(last["memory"])))
    started = [event for event in events if event["event"] == "started" and event.get("ranks")]
    if started:
        nodes = len(started[-1]["nodes"])
        rows.append(("ranks", f"{started[-1]['ranks']} on {nodes} node{'s' if nodes > 1 else ''}"))
    hangs = f" ({counts['hung']} by hanging)" if counts["hung"] else ""
    rows += [
        ("starts", str(counts["started"])),
        ("failures", f"{counts['failed']}{hangs}"),
        ("stops by a signal", str(counts["stopped"])),
        ("checkpoints saved", str(counts["saved"])),
        ("steps not applied", str(counts["anomaly"])),
    ]
    return rows


def _tiles(rows: list[tuple[str, str]]) -> str:
    tiles = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in rows)
    return f"<dl>{''.join(tiles)}</dl>"


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
        bar = f"<div class=bar><div style='width:{100 * last['p50'][rank] / most:.0f}%'></div></div>"
        mark = " slow" if rank in named else ""
        name = f"<td class='rank{mark}'>{rank}</td><td class='host{mark}'>{html.escape(host)}</td>"
        rows.append(f"<tr>{name}{numbers}<td>{bar}</td></tr>")
    slow = "; ranks that were named as slow are coloured" if named else ""
    return (
        f"<h2>Own work of each rank in a step, milliseconds (step {last['step']:,}{slow})</h2><div class=scroll><table>"
        "<tr><th>rank<th>host<th class=n>median<th class=n>90 %<th class=n>most<th>median</tr>"
        + "".join(rows)
        + "</table></div>"
    )


def _events(events: list[Event]) -> str:
    """What happened, in order. What ranks told of their work is a table of its own."""
    rows = []
    for event in events:
        if event["event"] != "ranks":
            when, kind, facts = event_words(event)
            mark = " bad" if MARKS.get(event["event"]) == "bad" else ""
            rows.append(
                f"<tr><td class=time>{when}</td><td class='kind{mark}'>{html.escape(kind)}</td>"
                f"<td class=facts>{html.escape(facts)}</td></tr>"
            )
    return f"<h2>Events</h2><div class=scroll><table>{''.join(rows) or '<tr><td>none</td></tr>'}</table></div>"


def _column(records: list[Record], key: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), float(record[key])) for record in records if _is_number(record.get(key))]


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


def _drawn(
    span: tuple[float, float],
    marks: list[tuple[float, str]],
    title: str,
    unit: str,
    lines: list[Line],
    *,
    logarithmic: bool = False,
) -> str:
    """Lines over the steps of `span`, with events as vertical strokes. Only the drawing stretches with the window, not
    its words."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points]
    logarithmic = logarithmic and min(ys) > 0 and max(ys) > 20 * min(ys)
    first, last = span
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if logarithmic else (min(ys), max(ys))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def across(x: float) -> float:
        return 1000 * (x - first) / (last - first)

    def up(y: float) -> float:
        return 1000 * (((math.log10(y) if logarithmic else y) - low) / (high - low))

    drawn, words = [], []
    for value in _powers(low, high) if logarithmic else _ticks(low, high, 5):
        drawn.append(f"<path d='M0 {1000 - up(value):.1f}H1000' stroke='var(--grid)'/>")
        words.append(f"<span class=y style='bottom:{up(value) / 10:.2f}%'>{_tick(value)}</span>")
    for value in _ticks(first, last, 6, whole=True):
        words.append(f"<span class=x style='left:{across(value) / 10:.2f}%'>{_tick(value)}</span>")
    marks = [(x, kind) for x, kind in marks if first <= x <= last]
    for x, kind in marks:
        drawn.append(
            f"<path d='M{across(x):.1f} 0V1000' stroke='var(--{MARKS[kind]})' stroke-width='1.5' "
            f"stroke-dasharray='4 3'><title>{kind} at step {x:,.0f}</title></path>"
        )
    for n, line in enumerate(lines):
        points = " ".join(f"{across(x):.1f},{1000 - up(y):.1f}" for x, y in _thinned(line.points))
        look = f"stroke='var(--line{n % COLOURS})' opacity='{0.4 if line.faint else 1}'"
        if len(line.points) == 1:
            drawn.append(f"<path d='M{points}h0' {look} stroke-width='7' stroke-linecap='round'/>")
        else:
            drawn.append(f"<polyline points='{points}' {look} stroke-width='1.7' stroke-linejoin='round'/>")
    legend = _legend("line", [(f"line{n % COLOURS}", line.name) for n, line in enumerate(lines) if line.name])
    label = html.escape(f"{title}, {unit}, over steps" if unit else f"{title} over steps", quote=True)
    about = f" <small>{html.escape(unit)}{', ' if unit else ''}over steps</small>"
    return (
        f"<figure><figcaption>{html.escape(title)}{about}</figcaption>"
        f"<div class=plot><svg viewBox='0 0 1000 1000' preserveAspectRatio='none' role='img' aria-label='{label}'>"
        f"{''.join(drawn)}</svg>{''.join(words)}</div>{legend}</figure>"
    )


def _legend(shape: str, keys: list[tuple[str, str]]) -> str:
    """keys: colours and names."""
    words = "".join(
        f"<span class=key><i class={shape} style='color:var(--{colour})'></i>{html.escape(name)}</span>"
        for colour, name in keys
    )
    return f"<div class=legend>{words}</div>" if words else ""


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """At most `most` round numbers between low and high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, step) if whole else step
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Round numbers for an axis from 10**low to 10**high: powers of ten, and what is between them if they are few."""
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        decades = range(math.floor(low), math.ceil(high) + 1)
        found = [f * 10.0**n for n in decades for f in factors if low <= math.log10(f * 10.0**n) <= high]
        if len(found) >= 3:
            break
    return found[:: math.ceil(len(found) / 6) or 1]


def _tick(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
