"""Dice against leakage as a drawing that follows the page's colours, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from splitpeer.report.model import Point

WIDTH, HEIGHT = 800, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 25, 75
AROUND = ((18, -16), (-18, -16), (-18, 18), (18, 18), (0, -22), (0, 24), (28, 0), (-28, 0))
"""Positions of a point's number, relative to the point."""


def svg(points: Sequence[Point]) -> Markup:
    """Leakage to the right, Dice upwards; points carry their number in the table, the front is a line."""
    low_x, high_x = _range([p.leakage for p in points] + [p.floor for p in points if p.floor is not None])
    low_y, high_y = _range([p.dice for p in points])

    def x(value: float) -> float:
        return LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    front = sorted((p for p in points if p.front), key=lambda p: (p.leakage, p.dice))
    parts = [
        f'<svg class="frontier" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="frontier-title">',
        f'<title id="frontier-title">Dice against leakage of {len(points)} configurations, {len(front)} of them on '
        "the front; the table below holds the same figures.</title>",
    ]
    for value in _ticks(low_x, high_x):
        parts.append(
            f'<line class="grid" x1="{x(value):.1f}" y1="{TOP}" x2="{x(value):.1f}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 26}" text-anchor="middle">{value:.1f}</text>'
        )
    for value in _ticks(low_y, high_y):
        parts.append(
            f'<line class="grid" x1="{LEFT}" y1="{y(value):.1f}" x2="{WIDTH - RIGHT}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 10}" y="{y(value) + 7:.1f}" text-anchor="end">{value:.1f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">'
                 "leakage: worst likeness (SSIM)</text>")  # fmt: skip
    parts.append(f'<text transform="translate(24 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
                 "Dice</text>")  # fmt: skip
    floors = [p.floor for p in points if p.floor is not None]
    if floors:
        at = x(sum(floors) / len(floors))
        parts.append(f'<line class="floor" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
    if len(front) > 1:
        line = " ".join(f"{x(p.leakage):.1f},{y(p.dice):.1f}" for p in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    taken = [(x(p.leakage), y(p.dice)) for p in points]
    for number, point in enumerate(points, 1):
        at_x, at_y = x(point.leakage), y(point.dice)
        parts.append(
            f'<circle class="{"on" if point.front else "off"}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="8"/>'
        )
        label = max(((at_x + dx, at_y + dy) for dx, dy in AROUND), key=lambda place: _nearest(place, taken))
        taken.append(label)
        parts.append(f'<text x="{label[0]:.1f}" y="{label[1] + 7:.1f}" text-anchor="middle">{number}</text>')
    return Markup("\n".join([*parts, "</svg>"]))  # noqa: S704 - numbers alone are put in


def _nearest(place: tuple[float, float], taken: Sequence[tuple[float, float]]) -> float:
    """Distance to the nearest other sign, up to where more room is no better."""
    return min(*(float((abs(place[0] - a) ** 2 + abs(place[1] - b) ** 2) ** 0.5) for a, b in taken), 22.0)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A tenth-aligned range around the values, a little wider."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return int(10 * low - 0.5) / 10 if low > 0.05 else 0.0, min(int(10 * high + 1.5) / 10, 1.05)


def _ticks(low: float, high: float) -> list[float]:
    step = 0.1 if high - low <= 0.8 else 0.2
    first = round(low / step + 0.4999)
    return [round(i * step, 1) for i in range(first, int(high / step + 1e-6) + 1)]
