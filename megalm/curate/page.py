"""The page of an audit: one HTML file that needs nothing else, not even a network."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment

# Okabe and Ito's, which colour-blind readers can tell apart.
KEPT, REMOVED, PALE = "#0072B2", "#D55E00", "#D5E4EE"
INK, MUTED, GRID = "#222222", "#666666", "#E3E3E3"
BINS = 40
MOST_BARS = 12
"""Reasons or values of a chart; the rest are in audit.json."""


def draw(report: Mapping[str, Any]) -> str:
    """The page, of what audit.summary() gave."""
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    lengths = _charts({"characters of a document": report["lengths"]}, "written", "read")
    return page.render(
        report=report,
        tokens=any(step["tokens_in"] is not None for step in report["steps"]),
        malformed=sum(sum(source["malformed"].values()) for source in report["sources"].values()),
        funnel=funnel(report),
        lengths=lengths[0] if lengths else None,
        charts=[_charts(_telling(step)) for step in report["steps"]],
        bars=bars,
        merge_tables=merge_tables,
        count=count,
        share=share,
    )


def _telling(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step's measures, without the lengths of texts that it let pass as they were: the step before shows them."""
    idle = not step["reasons"] and not step["changed"]
    return {name: measure for name, measure in step["measures"].items() if not (idle and name == "characters")}


def _charts(measures: Mapping[str, Any], kept: str = "kept", removed: str = "removed") -> list[str]:
    """A histogram of each number that differs among documents."""
    return [histogram(name, measure, kept, removed) for name, measure in measures.items() if len(measure["values"]) > 1]


def count(number: float | None) -> str:
    """12,345 or 1.23 M."""
    if number is None:
        return ""
    if isinstance(number, float) and not number.is_integer():
        return f"{number:,.3g}" if abs(number) < 1000 else f"{number:,.0f}"
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e7, " M")):
        if abs(number) >= limit:
            return f"{number / (limit if limit > 1e7 else 1e6):,.2f}{unit}"
    return f"{int(number):,}"


def share(part: float, whole: float) -> str:
    """In percent; of nothing, nothing."""
    if not whole:
        return ""
    percent = 100 * part / whole
    return f"{percent:.0f} %" if percent == int(percent) else f"{percent:.1f} %" if percent >= 0.1 else "< 0.1 %"


def funnel(report: Mapping[str, Any]) -> str:
    """What is left after each step, as a share of what was read: documents at the left, characters at the right."""
    rows: list[tuple[str, int, int]] = [("read", report["documents_read"], report["characters_read"])]
    for step in report["steps"]:
        rows.append((f"{step['index']} {step['kind']}", step["documents_out"], step["characters_out"]))
    row, label, width, gap = 26, 190, 290, 20
    total = label + 2 * width + gap + 80
    parts = []
    for place, name in ((label, "documents"), (label + width + gap + 40, "characters")):
        parts.append(_text(place, 14, name, MUTED, weight="600"))
    given = [(read, characters) for _, read, characters in rows]
    wholes, before = given[0], given[0]
    for number, (name, _, _) in enumerate(rows):
        y = 24 + number * row
        parts.append(_text(label - 10, y + 15, _short(name, 26), INK, anchor="end"))
        for column, value in enumerate(given[number]):
            x = label + column * (width + gap + 40)
            whole = wholes[column] or 1
            # Extraction can only shrink texts, while placeholders can make them longer than they were.
            scale = (width - 110) / max(whole, *(each[column] for each in given))
            parts.append(_bar(x, y + 3, before[column] * scale, row - 8, PALE, f"{name}: {before[column]:,} in"))
            parts.append(_bar(x, y + 3, value * scale, row - 8, KEPT, f"{name}: {value:,} out"))
            end = x + max(value, before[column]) * scale + 6
            parts.append(_text(end, y + 15, f"{count(value)} ({share(value, whole) or '0 %'})", MUTED))
        before = given[number]
    return _svg(total, 30 + len(rows) * row, parts, "What is left after each step")


def bars(values: Mapping[str, float], colour: str = REMOVED, name: str = "", total: float | None = None) -> str:
    """A horizontal bar per value, the largest first; values that are numbers themselves in their order. total: what the
    bars are shares of."""
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    if all(value.isdecimal() for value in values):
        ordered = sorted(values.items(), key=lambda item: int(item[0]))
    shown = ordered[:MOST_BARS]
    if len(ordered) > MOST_BARS:
        shown.append((f"{len(ordered) - MOST_BARS} more", sum(value for _, value in ordered[MOST_BARS:])))
    largest = max((value for _, value in shown), default=0) or 1
    whole = total or sum(values.values())
    parts = []
    for number, (label, value) in enumerate(shown):
        y = 2 + number * 22
        parts.append(_text(260, y + 14, _short(label, 40), INK, anchor="end", title=label))
        parts.append(_bar(268, y + 2, 260 * value / largest, 16, colour, f"{label}: {value:,}"))
        parts.append(_text(274 + 260 * value / largest, y + 14, f"{count(value)} ({share(value, whole)})", MUTED))
    return _svg(680, 8 + len(shown) * 22, parts, name or "counts")


def histogram(name: str, measure: Mapping[str, Any], kept: str = "kept", removed: str = "removed") -> str:
    """How a number is distributed over the documents that a step kept and those that it removed.

    Kept and removed stand on each other. Where kept are the documents of an earlier `removed` (of lengths: written and
    read), they stand in front of each other.
    """
    values, edges, is_log = _edges(measure)
    stacked = removed == "removed"
    sums = [[0, 0] for _ in edges[1:]]
    for value, *counts in zip(values, measure["kept"], measure["removed"]):
        place = math.log10(value) if is_log and value > 0 else value if not is_log else edges[0]
        bin_index = min(max(int((place - edges[0]) / (edges[1] - edges[0])), 0), len(sums) - 1)
        sums[bin_index][0] += counts[0]
        sums[bin_index][1] += counts[1]
    highest = max((pair[0] + pair[1] if stacked else max(pair) for pair in sums), default=0) or 1
    left, top, width, height = 46, 36, 290, 110
    step = width / len(sums)
    parts = [_text(0, 13, _short(name, 44), INK, weight="600", title=name)]
    parts += [_bar(left, 20, 10, 10, KEPT, kept), _text(left + 14, 29, kept, MUTED, size=11)]
    if any(back for _, back in sums):
        parts += [_bar(left + 70, 20, 10, 10, REMOVED if stacked else PALE, removed)]
        parts += [_text(left + 84, 29, removed, MUTED, size=11)]
    for share_of in (0.5, 1.0):
        y = top + height * (1 - share_of)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        if float(highest * share_of).is_integer():
            parts.append(_text(left - 5, y + 4, count(highest * share_of), MUTED, anchor="end", size=11))
    for index, (front, back) in enumerate(sums):
        x = left + index * step
        low, high = (_tick(edge, is_log) for edge in edges[index : index + 2])
        title = f"{low} to {high}: {front:,} {kept}, {back:,} {removed}"
        heights = height * front / highest, height * back / highest
        if not stacked:
            parts.append(_bar(x, top + height - heights[1], step - 1, heights[1], PALE, title))
        parts.append(_bar(x, top + height - heights[0], step - 1, heights[0], KEPT, title))
        if stacked:
            parts.append(_bar(x, top + height - heights[0] - heights[1], step - 1, heights[1], REMOVED, title))
    base = top + height
    parts.append(f'<line x1="{left}" x2="{left + width}" y1="{base}" y2="{base}" stroke="#AAAAAA"/>')
    for place in _ticks(edges, is_log):
        x = left + width * (place - edges[0]) / (edges[-1] - edges[0])
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}" stroke="#AAAAAA"/>')
        parts.append(_text(x, base + 16, _tick(place, is_log), MUTED, anchor="middle", size=11))
    return _svg(left + width + 24, base + 24, parts, name)


def merge_tables(said: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of what a merging step has to say, the tables: name -> value -> number."""
    return {
        name: {str(key): value for key, value in table.items()}
        for name, table in said.items()
        if isinstance(table, Mapping)
        and table
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in table.values())
    }


# ---- shapes ----


def _edges(measure: Mapping[str, Any]) -> tuple[list[float], list[float], bool]:
    """The values, the edges of the bins (of their logarithms, where they spread over decades), and which it is."""
    values = measure["values"]
    if not values:
        return [], [index / BINS for index in range(BINS + 1)], False
    is_log = values[0] > 0 and values[-1] / values[0] > 50
    low, high = (math.log10(value) if is_log else value for value in (values[0], values[-1]))
    if not is_log:  # what lies far out stands in the bins at the ends, so that the rest can be seen
        ends = [value for ends in measure["quantiles"].values() for value in ends]
        spread = 2 * (max(ends) - min(ends)) or high - low
        low, high = max(low, min(ends) - spread), min(high, max(ends) + spread)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    return values, [low + (high - low) * index / BINS for index in range(BINS + 1)], is_log


def _ticks(edges: Sequence[float], is_log: bool) -> list[float]:
    """Round places on an axis, about five."""
    low, high = edges[0], edges[-1]
    if is_log and high - low >= 1.2:
        every = max(1, round((high - low) / 5))
        return [float(place) for place in range(math.ceil(low), math.floor(high) + 1, every)]
    if is_log:
        return [math.log10(place) for place in _ticks([10**low, 10**high], False)]
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    every = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.8)
    first = math.ceil(low / every - 1e-9)
    return [index * every for index in range(first, math.floor(high / every + 1e-9) + 1)]


def _tick(place: float, is_log: bool) -> str:
    value = 10**place if is_log else place
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g} k"
    return f"{value + 0.0:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(title)}" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="system-ui, Noto Sans, Noto Sans CJK SC, PingFang SC, Microsoft YaHei, sans-serif">'
        + "".join(parts)
        + "</svg>"
    )


def _bar(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    if width <= 0 or height <= 0:
        return ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{max(height, 0.5):.1f}" fill="{colour}">'
        f"<title>{html.escape(title)}</title></rect>"
    )


def _text(
    x: float,
    y: float,
    words: str,
    colour: str,
    *,
    anchor: str = "start",
    weight: str = "400",
    size: int = 12,
    title: str = "",
) -> str:
    told = f"<title>{html.escape(title)}</title>" if title else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{told}{html.escape(words)}</text>'
    )


def _short(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.name }}: audit</title>
<style>
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
       color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin-bottom: .4em; }
svg { max-width: 100%; height: auto; vertical-align: top; }
.wide { overflow-x: auto; }
.many { display: flex; flex-wrap: wrap; gap: 1em 1.2em; margin: .8em 0; }
table { border-collapse: collapse; font-size: .92em; }
th, td { padding: .3em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #eee; }
th, td { white-space: nowrap; }
.dense { font-size: .85em; } .dense th, .dense td { padding: .3em .5em; }
th { font-weight: 600; color: #555; } .text { text-align: left; }
td.sample { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; min-width: 24em; }
.note { color: #666; } code { font-size: .92em; }
details { margin: .5em 0; } summary { cursor: pointer; color: #0072B2; }
</style>
</head>
<body>
<h1>{{ report.name }}</h1>
<p>{{ count(report.documents_read) }} documents ({{ count(report.characters_read) }} characters) were read from
{{ count(report.files.files) }} file{{ "s" if report.files.files != 1 }}; {{ count(report.documents_written) }}
({{ share(report.documents_written, report.documents_read) }}) were written,
{{ count(report.characters_written) }} characters
{%- if report.tokens_written is not none %}, {{ count(report.tokens_written) }} tokens{% endif %}.
{% if malformed %}{{ count(malformed) }} records could not be read.{% endif %}</p>

<h2>What is left after each step</h2>
{{ funnel | safe }}
<p class="note">Pale: what a step was given. Percentages are of what was read.</p>
<div class="wide"><table class="dense">
<tr><th class="text">step</th><th>documents in</th><th>out</th><th>removed</th><th>changed</th><th>characters in</th>
<th>out</th>{% if tokens %}<th>tokens in</th><th>out</th>{% endif %}
<th>core seconds</th><th>documents/s</th><th>MB/s</th></tr>
{% for step in report.steps %}
<tr><td class="text"><a href="#step-{{ step.index }}">{{ step.index }} {{ step.kind }}</a></td>
<td>{{ count(step.documents_in) }}</td><td>{{ count(step.documents_out) }}</td>
<td>{{ share(step.documents_in - step.documents_out, step.documents_in) }}</td><td>{{ count(step.changed) }}</td>
<td>{{ count(step.characters_in) }}</td><td>{{ count(step.characters_out) }}</td>
{% if tokens %}<td>{{ count(step.tokens_in) }}</td><td>{{ count(step.tokens_out) }}</td>{% endif %}
<td>{{ "%.1f" % step.seconds }}</td>
<td>{{ count((step.documents_in / step.seconds) | round) if step.seconds else "" }}</td>
<td>{{ "%.1f" % (step.characters_in / step.seconds / 1000000) if step.seconds else "" }}</td></tr>
{% endfor %}
{% for name, seconds in report.seconds.items() %}
<tr><td class="text note">{{ name }}</td><td></td><td></td><td></td><td></td><td></td><td></td>
{% if tokens %}<td></td><td></td>{% endif %}<td>{{ "%.1f" % seconds }}</td><td></td><td></td></tr>
{% endfor %}
</table></div>
<p class="note">Rates are those of one core; MB are millions of characters.
{% if tokens %}Tokens between the steps are estimated from a sample of the documents.{% endif %}</p>

<h2>Sources</h2>
<div class="wide"><table>
<tr><th class="text">source</th><th>documents</th><th>characters</th><th>sampled out</th><th>could not be read</th>
<th class="text">passed over</th></tr>
{% for name, source in report.sources.items() %}
<tr><td class="text">{{ name }}</td><td>{{ count(source.documents) }}</td><td>{{ count(source.characters) }}</td>
<td>{{ count(source.sampled_out) }}</td>
<td>{% for reason, number in source.malformed | dictsort %}{{ reason }}: {{ count(number) }}<br>{% endfor %}</td>
<td class="text">{% for reason, number in source.passed_over | dictsort %}{{ reason }}: {{ count(number) }}<br>
{% endfor %}
{% for reason, number in report.files.left_out.get(name, {}) | dictsort %}{{ reason }}: {{ count(number) }}<br>
{% endfor %}</td></tr>
{% endfor %}
</table></div>

<h2>Lengths</h2>
{{ (lengths or "There is nothing to draw.") | safe }}

{% for key, values in report.counts.items() %}
{% set numbers = {} %}
{% for value, sums in values.items() %}{% set _ = numbers.update({value: sums.documents}) %}{% endfor %}
<h2>Written documents by {{ key }}</h2>
{{ bars(numbers, "#0072B2", "documents by " ~ key) | safe }}
{% endfor %}

{% for step in report.steps %}
<h2 id="step-{{ step.index }}">{{ step.index }} {{ step.kind }}</h2>
<p>{{ count(step.documents_in) }} documents in, {{ count(step.documents_out) }} out,
{{ count(step.changed) if step.changed else "none" }} of them changed.
{% if step.settings %}<span class="note">Settings: {% for key, value in step.settings.items() %}<code>{{ key }}:
{{ value }}</code>{{ ", " if not loop.last }}{% endfor %}</span>{% endif %}</p>
{% if step.reasons %}
<h3>Why documents were removed</h3>
{{ bars(step.reasons, "#D55E00", "reasons", step.documents_in) | safe }}
<p class="note">Percentages are of the documents in.</p>
{% endif %}
{% if step.merge %}
<h3>All documents together</h3>
<table>
{% for key, value in step.merge.items() if value is number or value is string %}
<tr><td class="text">{{ key | replace("_", " ") }}</td><td>{{ count(value) if value is number else value }}</td></tr>
{% endfor %}
</table>
{% for key, table in merge_tables(step.merge).items() %}
<h3>{{ key | replace("_", " ") | capitalize }}</h3>
{{ bars(table, "#009E73", key) | safe }}
{% endfor %}
{% endif %}
{% if charts[loop.index0] %}
<div class="many">
{% for chart in charts[loop.index0] %}
{{ chart | safe }}
{% endfor %}
</div>
{% endif %}
{% if step.samples %}
<details><summary>Samples of what was removed</summary>
{% for reason, samples in step.samples.items() if samples %}
<h3>{{ reason }}</h3>
<div class="wide"><table>
<tr><th class="text">document</th><th class="text">detail</th><th class="text">text</th></tr>
{% for sample in samples %}
<tr><td class="text"><code>{{ sample.id }}</code></td><td class="text">{{ sample.detail }}</td>
<td class="sample">{{ sample.text }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
</details>
{% endif %}
{% endfor %}
</body>
</html>
"""
