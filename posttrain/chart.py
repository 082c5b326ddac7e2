"""Line charts as inline SVG: axes with units, a legend, and every line named at its end.

Colours are the CSS variables --c0 to --c7 of the page that holds the chart. Left out: scripts.
Next: report_page.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean, median

COLOURS = 8
_WIDTH, _HEIGHT = 380, 220
_LEFT, _TOP, _BOTTOM = 44, 20, 30
_LETTER = 6.2
"""Mean width of a letter at the charts' font size."""
_LINE = 13
"""Least distance between two labels."""
_MOST_POINTS = 200
_MOST_LABEL = 14

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0

    def label(self) -> str:
        """The name, cut to what fits beside the plot."""
        return self.name if len(self.name) <= _MOST_LABEL else f"{self.name[: _MOST_LABEL - 1]}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A small chart of a few lines over the same axis."""

    title: str
    unit: str
    series: tuple[Series, ...]
    x_unit: str = "step"
    x_names: tuple[str, ...] = ()
    """Names of the places 0, 1, ... where the axis has no numbers."""
    log: bool = False
    share: bool = False
    """Values are shares: the axis shows all of 0 to 1, so that charts can be compared."""


def figure(chart: Chart) -> str:
    """The chart as a <figure>; empty if no line has a point that can be drawn."""
    drawn = [s for s in (_drawable(s, log=chart.log) for s in chart.series) if s.points]
    if not drawn:
        return ""
    zeros = sum(y == 0 for s in chart.series for _, y in s.points) if chart.log else 0
    notes = [f"{zeros} steps at 0 are not drawn"] if zeros else []
    most = max(len(s.points) for s in drawn)
    drawn = [thin(s) for s in drawn]
    if most > _MOST_POINTS:
        notes.append(f"each point is the mean of up to {-(-most // _MOST_POINTS)} steps")
    note = f"<small>{'; '.join(notes)}</small>" if notes else ""
    legend = "".join(
        f'<li><svg viewBox="0 0 16 8" aria-hidden="true"><path d="M0 4H16" {_stroke(s)}/></svg> '
        f"{escape(s.name)} <b>{short(s.points[0][1])} &rarr; {short(s.points[-1][1])}</b></li>"
        for s in drawn
    )
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        f'{_svg(chart, drawn)}<ul class="legend">{legend}</ul>{note}</figure>'
    )


def thin(series: Series, limit: int = _MOST_POINTS) -> Series:
    """At most `limit` points: each the mean of as many neighbours."""
    points = series.points
    size = -(-len(points) // limit)
    if size > 1:
        parts = [points[i : i + size] for i in range(0, len(points), size)]
        points = tuple((fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts)
    return Series(name=series.name, points=points, colour=series.colour)


def spread(series: Sequence[Series]) -> list[Series]:
    """Lines too many to tell apart as three: the lowest, the middle and the highest of each step."""
    if len(series) <= COLOURS:
        return list(series)
    by_x: dict[float, list[float]] = {}
    for x, y in (point for s in series for point in s.points):
        by_x.setdefault(x, []).append(y)
    found = sorted(by_x.items())
    picks: dict[str, Callable[[list[float]], float]] = {"lowest": min, "median": median, "highest": max}
    return [
        Series(name=name, colour=i, points=tuple((x, pick(values)) for x, values in found))
        for i, (name, pick) in enumerate(picks.items())
    ]


def short(value: float) -> str:
    """A number in few letters: 0.912, 1,234, 3e-8."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _drawable(series: Series, *, log: bool) -> Series:
    """Without what has no place: not finite, or not above zero on a logarithmic axis."""
    points = tuple(
        (x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    )
    return Series(name=series.name, points=points, colour=series.colour)


def _svg(chart: Chart, series: Sequence[Series]) -> str:
    labels = [s.label() for s in series] if len(series) > 1 else [short(series[0].points[-1][1])]
    right = _WIDTH - 10 - _LETTER * max(map(len, labels))
    low, high, y_ticks = _y_axis(chart, [y for s in series for _, y in s.points])
    x_low, x_high, x_ticks = _x_axis(chart, [x for s in series for x, _ in s.points])
    scale = math.log10 if chart.log else float
    y_at = _between(scale(low), scale(high), _HEIGHT - _BOTTOM, _TOP)
    x_at = _between(x_low, x_high, _LEFT, right)
    parts = [f'<text class="unit" x="2" y="11">{escape(chart.unit)}</text>']
    for tick in y_ticks:
        y = y_at(scale(tick))
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick, name in x_ticks:
        at = f'x="{x_at(tick):.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle"'
        parts.append(f"<text {at}>{escape(name)}</text>")
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{right:.1f}"/>')
    middle = (_LEFT + right) / 2
    unit = escape(chart.x_unit)
    parts.append(f'<text class="unit" x="{middle:.1f}" y="{_HEIGHT - 3}" text-anchor="middle">{unit}</text>')
    ends = []
    for s in series:
        places = [(x_at(x), y_at(scale(y))) for x, y in s.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line" d="M{path}" {_stroke(s)}><title>{escape(s.name)}</title></path>')
        if len(places) <= 8:
            fill = f'style="fill:var(--c{s.colour % COLOURS})"'
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" {fill}/>' for x, y in places]
        ends.append(places[-1][1])
    for s, label, y in zip(series, labels, _apart(ends), strict=True):
        fill = f'style="fill:var(--c{s.colour % COLOURS})"'
        parts.append(f'<text class="end" x="{right + 5:.1f}" y="{y + 3.5:.1f}" {fill}>{escape(label)}</text>')
    name = escape(f"{chart.title}, {chart.unit} by {chart.x_unit}", quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _stroke(series: Series) -> str:
    dash = ";stroke-dasharray:5 3" if series.colour >= COLOURS else ""
    return f'style="stroke:var(--c{series.colour % COLOURS}){dash}"'


def _y_axis(chart: Chart, values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = min(values), max(values)
    if chart.log:
        return _decades(low, high)
    if chart.share and high <= 1 and low >= 0:
        low, high = 0.0, 1.0
    elif low >= 0 and low < 0.6 * high:
        low = 0.0  # a line that falls to nothing should be seen to
    ticks = _ticks(low, high, 5)
    step = ticks[1] - ticks[0]
    if ticks[0] - low > 1e-9 * step:
        ticks.insert(0, ticks[0] - step)
    if high - ticks[-1] > 1e-9 * step:
        ticks.append(ticks[-1] + step)
    return ticks[0], ticks[-1], ticks


def _decades(low: float, high: float) -> tuple[float, float, list[float]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = -(-(last - first) // 5)
    return 10.0**first, 10.0**last, [10.0**e for e in range(first, last + 1, every)]


def _x_axis(chart: Chart, values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    if chart.x_names:
        margin = 0.3  # names are wide
        ticks = [(float(i), name) for i, name in enumerate(chart.x_names)]
        return -margin, len(ticks) - 1 + margin, ticks
    low, high = min(values), max(values)
    if low == high:
        return low - 1, high + 1, [(low, short(low))]
    if 0 < low < 0.1 * high:
        low = 0.0  # counted from one, or the mean of the first steps
    steps = [tick for tick in _ticks(low, high, 5) if tick == round(tick)]
    return low, high, [(tick, short(tick)) for tick in steps]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between low and high, at least two of them."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):  # a flat line, in the middle
        half = abs(high) / 2 or 1.0
        low, high = low - half, high + half
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def _between(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _apart(places: Sequence[float]) -> list[float]:
    """The places moved as little as keeps labels from lying on one another, inside the plot."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + _LINE)
    over = moved[order[-1]] - (_HEIGHT - _BOTTOM + 2)
    if over > 0:
        moved[order[-1]] -= over
        for after, before in zip(order[::-1], order[-2::-1]):
            moved[before] = min(moved[before], moved[after] - _LINE)
    return moved
