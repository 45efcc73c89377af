"""Draws ``throughput.svg`` beside this file: throughput against the number of distinct adapters in a batch.

    python tests/bench/throughput_picture.py

Solid lines are `distinct`'s, from ``distinct.json``. Dashed ones are other servers', from ``elsewhere.json``,
which names their machine; all are ratios to the same server's base model at as many streams.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 60, 500, 50, 340
MOST_ADAPTERS = 32
COLOURS = ("#1b6ca8", "#c8502d", "#6b7280", "#8a6d1b", "#5b7f3a")


class Line(NamedTuple):
    label: str
    points: Sequence[tuple[int, float]]
    """Distinct adapters, and throughput as a part of the base's."""
    is_ours: bool


def lines() -> list[Line]:
    """Ours first."""
    ours: dict[str, list[tuple[int, float]]] = {}
    for row in json.loads((FOLDER / "distinct.json").read_text())["rows"]:
        if row["adapters"]:
            ours.setdefault(row["family"], []).append((row["adapters"], row["throughput_to_base"]))
    elsewhere = json.loads((FOLDER / "elsewhere.json").read_text())["servers"]
    others = [Line(own["label"], [(n, r) for n, r in own["throughput_to_base"]], False) for own in elsewhere]
    return [Line(f"Timbre, {family}", points, True) for family, points in ours.items()] + others


def place(adapters: int, ratio: float) -> tuple[float, float]:
    """Where a point is drawn: logarithmic across, linear up, from nothing to the base's own throughput."""
    x = LEFT + (RIGHT - LEFT) * math.log2(adapters) / math.log2(MOST_ADAPTERS)
    return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * min(ratio, 1.05), 1)


def drawn(every: Iterable[Line]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13"><title>Throughput against distinct adapters in a batch</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="28" font-size="15">Throughput as a part of the base model\'s alone</text>',
    ]
    for percent in range(0, 101, 25):
        _, y = place(1, percent / 100)
        parts.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="#374151">{percent} %</text>')
    for adapters in (1, 2, 4, 8, 16, 32):
        x, _ = place(adapters, 0)
        parts.append(f'<text x="{x}" y="{BOTTOM + 20}" text-anchor="middle" fill="#374151">{adapters}</text>')
    parts.append(f'<text x="{LEFT}" y="{BOTTOM + 44}" fill="#374151">distinct adapters in the batch</text>')
    note = "dashed: measured elsewhere, see elsewhere.json"
    parts.append(f'<text x="{RIGHT + 14}" y="{BOTTOM + 44}" font-size="10" fill="#374151">{note}</text>')
    for index, line in enumerate(every):
        colour = COLOURS[index % len(COLOURS)]
        style = f'stroke="{colour}" stroke-width="2"' + ("" if line.is_ours else ' stroke-dasharray="6 4"')
        points = [place(*point) for point in line.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        parts.append(f'<path d="{path}" fill="none" {style}/>')
        parts += (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points)
        y = TOP + 20 + 22 * index
        parts.append(f'<path d="M{RIGHT + 14} {y - 4}h24" {style}/>')
        parts.append(f'<text x="{RIGHT + 44}" y="{y}">{escape(line.label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    (FOLDER / "throughput.svg").write_text(drawn(lines()))
