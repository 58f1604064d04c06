"""Charts as inline SVG, coloured by the page's CSS variables: lines over steps, points with intervals, bars.

`picture` makes charts a file of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 34, 44
MAX_POINTS = 600  # a longer series is thinned to means of equal stretches
CHARACTER = 6.6  # width of a letter, on the generous side
LABEL_GAP = 15  # least distance of two labels, one above the other
PICTURE_STYLE = """
svg { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.title { font-size: 14px; font-weight: 600; } .title, .value { fill: #1c1c1a; } .tick, .label { fill: #5d5c57; }
.grid { stroke: #e4e3de; } .axis { stroke: #a9a8a2; } .column { fill: #2468b8; } .paper { fill: #fdfdfc; }
"""


@dataclass(frozen=True)
class Series:
    """One line: values over steps. A value that is not finite leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    """Number of the page's series colour."""
    faint: bool = False
    """Drawn thin and pale, without a legend entry (raw values behind a smoothed line)."""


@dataclass(frozen=True)
class LineChart:
    """A panel of lines."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    y_range: tuple[float, float] | None = None
    """Fixed ends of the y axis; None fits the data."""
    events: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Name -> steps at which a thin upright line stands."""


@dataclass(frozen=True)
class IntervalPoint:
    """A value with its interval; `low` and `high` may be missing."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class BarChart:
    """A panel of upright bars over named columns."""

    title: str
    x_label: str
    y_label: str
    bars: Sequence[tuple[str, int]]
    """(name, count of 0 or more) of each column; at least one."""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Value -> pixel."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw_lines(chart: LineChart) -> str:
    """A line chart; its series must hold at least one finite value."""
    finite = [(x, y) for series in chart.series for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    x_ticks = make_ticks(min(x for x, _ in finite), max(x for x, _ in finite), whole=True)
    ends = chart.y_range or (min(y for _, y in finite), max(y for _, y in finite))
    y_ticks = make_ticks(*ends)
    x_axis = Axis(
        min(x for x, _ in finite), max(max(x for x, _ in finite), min(x for x, _ in finite) + 1), LEFT, WIDTH - RIGHT
    )
    y_axis = Axis(min(ends[0], y_ticks[0]), max(ends[1], y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    parts = [_frame(chart, y_axis, y_ticks), _x_ticks(x_axis, x_ticks)]
    for name, steps in chart.events.items():
        parts += [
            f'<line class="event" x1="{x_axis(step):.1f}" x2="{x_axis(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            f"<title>{escape(name)}, step {step:g}</title></line>"
            for step in steps
        ]
    for series in chart.series:
        parts += _polylines(series, x_axis, y_axis)
    parts.append(
        _legend(
            [(series.label, f"s{series.colour}") for series in chart.series if not series.faint], list(chart.events)
        )
    )
    return _wrap(chart.title, parts)


def draw_intervals(title: str, y_label: str, points: Sequence[IntervalPoint], lines: Mapping[str, float]) -> str:
    """Points with error bars over named columns, and level lines (label -> value) written at the right."""
    labels = [f"{value:.3f} {label}" for label, value in lines.items()]
    right = round(24 + max(map(len, labels)) * CHARACTER) if labels else RIGHT
    width = WIDTH * 2
    ends = [end for point in points for end in (point.low, point.high, point.value) if end is not None] + [
        *lines.values()
    ]
    y_ticks = make_ticks(0.0, max(ends))
    y_axis = Axis(0.0, max(y_ticks[-1], max(ends)), HEIGHT - BOTTOM, TOP)
    chart = LineChart(title, "after stage", y_label, [])
    parts = [_frame(chart, y_axis, y_ticks, width, right)]
    places = _spread([y_axis(value) for value in lines.values()])
    for label, value, place in zip(labels, lines.values(), places, strict=True):
        y = y_axis(value)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}">'
            f"<title>{escape(label)}</title></line>"
        )
        parts.append(f'<path class="lead" d="M{width - right} {y:.1f}L{width - right + 10} {place:.1f}"/>')
        parts.append(f'<text class="ink" x="{width - right + 14}" y="{place + 4:.1f}">{escape(label)}</text>')
    column = (width - right - LEFT) / max(len(points), 1)
    for index, point in enumerate(points):
        parts += _interval(point, LEFT + column * (index + 0.5), y_axis)
    return _wrap(title, parts, width)


def draw_bars(chart: BarChart) -> str:
    """Bars with their counts above them, twice as wide as lines."""
    width = WIDTH * 2
    y_ticks = make_ticks(0.0, max(count for _, count in chart.bars))
    y_axis = Axis(0.0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_frame(LineChart(chart.title, chart.x_label, chart.y_label, []), y_axis, y_ticks, width)]
    column = (width - RIGHT - LEFT) / len(chart.bars)
    for index, (name, count) in enumerate(chart.bars):
        x, y = LEFT + column * (index + 0.5), y_axis(count)
        parts += [
            f'<rect class="column" x="{x - column * 0.4:.1f}" y="{y:.1f}" width="{column * 0.8:.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(name)}: {count:,}</title></rect>',
            f'<text class="value" text-anchor="middle" x="{x:.1f}" y="{y - 4:.1f}">{_short(count, 100_000)}</text>',
            f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(name)}</text>',
        ]
    return _wrap(chart.title, parts, width)


def picture(charts: Sequence[str], width: int = WIDTH * 2) -> str:
    """Charts of one width below one another as the content of an .svg file, on a light background."""
    height = HEIGHT * len(charts)
    placed = [
        chart.replace("<svg ", f'<svg y="{HEIGHT * index}" width="{width}" height="{HEIGHT}" ', 1)
        for index, chart in enumerate(charts)
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">'
        f'<style>{PICTURE_STYLE}</style><rect class="paper" width="{width}" height="{height}"/>{"".join(placed)}</svg>\n'
    )


def make_ticks(low: float, high: float, *, whole: bool = False, count: int = 5) -> list[float]:
    """About `count` round numbers (steps of 1, 2 or 5 times a power of ten) that lie around low .. high.

    With `whole`, only whole numbers inside the range.
    """
    if high <= low:
        high = low + (1.0 if whole or low == 0 else abs(low) * 0.1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, step)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def smooth(values: Sequence[float], fraction: float = 0.04) -> list[float]:
    """Centred running mean over `fraction` of the series (at least 1 value); what is not finite is left out of the mean."""
    half = max(0, round(len(values) * fraction / 2))
    result = []
    for index, value in enumerate(values):
        window = [v for v in values[max(0, index - half) : index + half + 1] if math.isfinite(v)]
        result.append(sum(window) / len(window) if math.isfinite(value) else math.nan)
    return result


def _thin(series: Series) -> list[tuple[float, float]]:
    pairs = list(zip(series.x, series.y, strict=True))
    size = math.ceil(len(pairs) / MAX_POINTS)
    if size <= 1:
        return pairs
    stretches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]


def _polylines(series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    """One polyline a stretch of finite values; a lone point becomes a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in _thin(series):
        if math.isfinite(y):
            runs[-1].append((x_axis(x), min(max(y_axis(y), y_axis.end), y_axis.start)))
        elif runs[-1]:
            runs.append([])
    kind = f"s{series.colour}{' faint' if series.faint else ''}"
    drawn = []
    for run in filter(None, runs):
        if len(run) == 1:
            drawn.append(f'<circle class="dot {kind}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3"/>')
            continue
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
        drawn.append(
            f'<polyline class="line {kind}" points="{points}"><title>{escape(series.label)}</title></polyline>'
        )
    return drawn


def _interval(point: IntervalPoint, x: float, y_axis: Axis) -> list[str]:
    parts = []
    text = f"{point.label}: {point.value:.3f}"
    if point.low is not None and point.high is not None:
        low, high = y_axis(point.low), y_axis(point.high)
        path = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 7:.1f} {low:.1f}h14M{x - 7:.1f} {high:.1f}h14"
        parts.append(f'<path class="bar s1" d="{path}"/>')
        text += f" (95% interval {point.low:.3f} to {point.high:.3f})"
    y = y_axis(point.value)
    parts.append(f'<circle class="dot s1" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(text)}</title></circle>')
    parts.append(f'<text class="value" x="{x + 12:.1f}" y="{y + 4:.1f}">{point.value:.3f}</text>')
    parts.append(
        f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}">{escape(point.label)}</text>'
    )
    return parts


def _frame(chart: LineChart, y_axis: Axis, y_ticks: Sequence[float], width: int = WIDTH, right: int = RIGHT) -> str:
    """Title, grid lines with their numbers, both axis labels."""
    parts = [f'<text class="title" x="{LEFT - 46}" y="16">{escape(chart.title)}</text>']
    for tick in y_ticks:
        y = y_axis(tick)
        kind = "axis" if abs(y - (HEIGHT - BOTTOM)) < 0.1 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{_short(tick)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(14 {middle:.0f}) rotate(-90)">'
        f"{escape(chart.y_label)}</text>"
    )
    parts.append(
        f'<text class="label" text-anchor="middle" x="{(LEFT + width - right) / 2:.0f}" y="{HEIGHT - 8}">'
        f"{escape(chart.x_label)}</text>"
    )
    return "".join(parts)


def _short(value: float, limit: int = 10_000) -> str:
    """A number that takes little room: from `limit` on in thousands (k), millions (M) or billions (G), with three digits."""
    if abs(value) < limit:
        return f"{value:,}" if isinstance(value, int) else f"{value:g}"
    power = min(math.floor(math.log10(float(f"{abs(value):.2e}")) / 3), 3)
    return f"{value / 1000**power:.3g}{'kMG'[power - 1]}"


def _x_ticks(x_axis: Axis, ticks: Sequence[float]) -> str:
    return "".join(
        f'<text class="tick" text-anchor="middle" x="{x_axis(tick):.1f}" y="{HEIGHT - BOTTOM + 17}">{tick:g}</text>'
        for tick in ticks
    )


def _legend(entries: Sequence[tuple[str, str]], events: Sequence[str]) -> str:
    """Keys at the top right, for two series or more, or where events are drawn."""
    items = [(label, f'class="line {kind}"') for label, kind in entries] if len(entries) > 1 else []
    items += [(name, 'class="event"') for name in events]
    x, parts = float(WIDTH - RIGHT), []
    for label, kind in reversed(items):
        x -= CHARACTER * len(label)
        parts.append(f'<text class="ink" x="{x:.0f}" y="16">{escape(label)}</text>')
        x -= 22
        parts.append(f'<path {kind} d="M{x:.0f} 12h16"/>')
        x -= 14
    return "".join(parts)


def _spread(places: Sequence[float]) -> list[float]:
    """Moves labels apart, in their order from top to bottom, so that neighbours keep `LABEL_GAP`."""
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + LABEL_GAP)
    return moved


def _wrap(title: str, parts: Sequence[str], width: int = WIDTH) -> str:
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
