"""The page of a run's report: one HTML file that needs nothing else, not even a network."""

import base64
import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megalm.metrics.plot import COLOURS, MARKERS, MUTED, STYLE, plot_runs

SHOWN = 600
"""Characters of a text that the page shows; report.json has all of them."""
MOST_CLASSES = 40
"""Classes of a confusion matrix that the page shows."""


def draw(run: Path, report: Mapping[str, Any]) -> str:
    """The page, of a run folder and its report (sft.report.gather)."""
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    matrices = {
        name: shades(corpus["confusion"])
        for name, corpus in report["corpora"].items()
        if corpus["confusion"] and len(corpus["labels"]) <= MOST_CLASSES
    }
    return page.render(
        report=report,
        curves=_inline(curves(run)),
        scores=_inline(scores) if (scores := plot_evaluations(report)) else None,
        columns=columns(report["evaluations"]),
        matrices=matrices,
        name=run.resolve().name,
        said=said,
        number=number,
    )


def curves(run: Path) -> bytes:
    """Training and held-out loss, learning rate and gradient norm, as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "curves.png"
        plot_runs([run], picture, x="steps")
        return picture.read_bytes()


def plot_evaluations(report: Mapping[str, Any]) -> bytes | None:
    """A panel for each metric over steps, a line for each corpus, and where the best evaluation stands; a PNG, or None
    where there is nothing to draw."""
    found = report["evaluations"]
    known = {
        metric
        for each in found
        for metric, values in each["metrics"].items()
        if any(value is not None and math.isfinite(value) for value in values.values())
    }
    names = sorted(known, key=lambda name: (name != report["metric"], name))
    if not names:
        return None
    corpora = list(dict.fromkeys(corpus for each in found for values in each["metrics"].values() for corpus in values))
    across = min(len(names), 3)
    down = -(-len(names) // across)
    with rc_context(STYLE | {"font.sans-serif": ["DejaVu Sans"]}):
        size = (max(4.2, 3.4 * across), 2.7 * down + 0.3)
        figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for panel, name in zip(axes, names):
            for index, corpus in enumerate(corpora):
                points = [
                    (each["step"], value)
                    for each in found
                    if (value := each["metrics"].get(name, {}).get(corpus)) is not None and math.isfinite(value)
                ]
                panel.plot(
                    [step for step, _ in points],
                    [value for _, value in points],
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)] if len(points) <= 40 else None,
                    markersize=4,
                    linewidth=1.4,
                    label=_ascii(corpus, index),
                )
            if report["best_step"] is not None:
                panel.axvline(report["best_step"], color=MUTED, linestyle=(0, (3, 3)), linewidth=1)
            panel.set_title(name + (" (selects)" if name == report["metric"] else ""), loc="left", fontsize=10)
            panel.set_xlabel("steps")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for panel in axes[len(names) :]:
            panel.set_visible(False)
        if len(corpora) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(corpora))
        output = io.BytesIO()
        figure.savefig(output, format="png")
    return output.getvalue()


def _ascii(name: str, index: int) -> str:
    """A corpus in a picture, whose font has no Chinese; the page's table has its name."""
    return name if name.isascii() else f"corpus {index + 1}"


def shades(confusion: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each cell, the share of its row: what a reader sees whatever the classes' sizes."""
    return [[count / total if (total := sum(row)) else 0.0 for count in row] for row in confusion]


def columns(evaluated: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The (metric, corpus) pairs of all evaluations, in their order."""
    return list(
        dict.fromkeys(
            (metric, corpus) for each in evaluated for metric, values in each["metrics"].items() for corpus in values
        )
    )


def said(value: Any) -> str:
    """A reference or a prediction, for a reader."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _inline(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: report</title>
<style>
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif;
       color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin-bottom: .4em; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92em; }
th, td { padding: .3em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #eee; }
th { font-weight: 600; color: #555; } .text { text-align: left; } td.text { overflow-wrap: anywhere; }
tr.best td { background: #e8f3ea; font-weight: 600; }
.wrong { color: #b3261e; } .right { color: #1a7f37; } .note { color: #666; }
.matrix td { text-align: center; min-width: 2.4em; border: 1px solid #fff; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{% if report.task %}Task {{ report.task }}, {% endif %}{{ report.steps }} steps
{%- if report.stopped_early %}, stopped early{% endif %}.
{% if report.best_step is not none %}
The best evaluation by {{ report.metric }} ({{ "greater" if report.greater_is_better else "less" }} is better) is
that of step {{ report.best_step }}.
{% endif %}</p>

<h2>Learning curves</h2>
<img alt="Loss, learning rate and gradient norm over steps" src="{{ curves }}">

<h2>Model selection</h2>
{% if scores %}
<img alt="Metrics of the evaluations over steps" src="{{ scores }}">
<p class="note">The dashed line stands at the best evaluation.</p>
<div class="wide"><table>
<tr><th>step</th>{% for metric, corpus in columns %}<th>{{ metric }}<br>{{ corpus }}</th>{% endfor %}<th></th></tr>
{% for each in report.evaluations %}
<tr{% if each.step == report.best_step %} class="best"{% endif %}><td>{{ each.step }}</td>
{% for metric, corpus in columns %}<td>{{ number(each.metrics.get(metric, {}).get(corpus)) }}</td>{% endfor %}
<td>{{ "best" if each.step == report.best_step }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p>The run has not been evaluated yet.</p>
{% endif %}

{% for name, corpus in report.corpora.items() %}
<h2>{{ name }}</h2>
<p>{{ corpus.right }} of {{ corpus.rows }} rows are exactly right after step {{ report.predictions_step }}.</p>
{% if corpus.per_class %}
<h3>Scores per class</h3>
<div class="wide"><table>
<tr><th class="text">class</th><th>precision</th><th>recall</th><th>F1</th><th>support</th></tr>
{% for label, scores in corpus.per_class.items() %}
<tr><td class="text">{{ label }}</td><td>{{ number(scores.precision) }}</td><td>{{ number(scores.recall) }}</td>
<td>{{ number(scores.f1) }}</td><td>{{ scores.support }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if name in matrices %}
<h3>Confusion matrix</h3>
<p class="note">Rows are what is true, columns what was predicted; the shade is the share of the row.</p>
<div class="wide"><table class="matrix">
<tr><th></th>{% for label in corpus.labels %}<th>{{ label }}</th>{% endfor %}</tr>
{% for label in corpus.labels %}
{% set row = loop.index0 %}
<tr><th class="text">{{ label }}</th>
{% for count in corpus.confusion[row] %}
{% set share = matrices[name][row][loop.index0] %}
<td style="background: rgba(0, 114, 178, {{ "%.2f" % share }}); color: {{ "#fff" if share > 0.55 else "#222" }}">
{{- count }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% elif corpus.confusion %}
<p class="note">The confusion matrix of {{ corpus.labels | length }} classes is in report.json.</p>
{% endif %}
<h3>Worst examples</h3>
<table>
<tr><th class="text">text</th><th class="text">reference</th><th class="text">prediction</th><th>confidence</th>
<th>loss</th><th class="text">where</th></tr>
{% for row in corpus.worst %}
<tr><td class="text">{{ said(row.text) }}</td><td class="text">{{ said(row.reference) }}</td>
<td class="text {{ "right" if row.is_right else "wrong" }}">{{ said(row.prediction) }}</td>
<td>{{ number(row.confidence) }}</td><td>{{ number(row.loss) }}</td>
<td class="text">{{ row.file or "" }}{% if row.row %}:{{ row.row }}{% endif %}</td></tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""
