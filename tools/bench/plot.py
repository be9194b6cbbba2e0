"""Bar charts as SVG, written by hand: no plotting library has to be there. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Final, NamedTuple

WIDTH: Final = 900
_LABEL_WIDTH: Final = 170
_VALUE_WIDTH: Final = 90
_BAR_HEIGHT: Final = 16
_BAR_GAP: Final = 4
_TITLE_HEIGHT: Final = 34
_MARGIN: Final = 16
_COLOURS: Final = ("#9aa5b1", "#1f77b4")
"""Of a bar, and of one that stands out; both show on white and on black."""
_FONT: Final = "font-family='sans-serif' font-size='12' fill='#777'"


class Panel(NamedTuple):
    """One chart: a bar for each name, from the top down, on a scale of its own."""

    title: str
    values: Mapping[str, float]


def bar_chart(panels: Sequence[Panel], *, highlighted: Sequence[str] = ()) -> str:
    """Panels below one another, as one SVG document."""
    parts: list[str] = []
    top = _MARGIN
    for panel in panels:
        parts.append(_text(_MARGIN, top + 18, panel.title, weight="bold"))
        top += _TITLE_HEIGHT
        largest = max(panel.values.values(), default=0.0)
        for name, value in panel.values.items():
            assert value >= 0.0, (name, value)
            share = value / largest if largest > 0.0 else 0.0
            parts.append(_bar(top, name, value, share, is_highlighted=name in highlighted))
            top += _BAR_HEIGHT + _BAR_GAP
        top += _BAR_HEIGHT
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{top}'"
        f" viewBox='0 0 {WIDTH} {top}' role='img'>"
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _bar(top: int, name: str, value: float, share: float, *, is_highlighted: bool) -> str:
    left = _MARGIN + _LABEL_WIDTH
    room = WIDTH - left - _VALUE_WIDTH - _MARGIN
    width = round(room * share, 1)
    base = top + _BAR_HEIGHT - 4
    fill = f"fill='{_COLOURS[is_highlighted]}'"
    shown = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
    return "\n".join(
        [
            _text(left - 8, base, name, anchor="end"),
            f"<rect x='{left}' y='{top}' width='{width}' height='{_BAR_HEIGHT}' {fill}/>",
            _text(round(left + width + 6, 1), base, shown),
        ]
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f"<text x='{x}' y='{y}' text-anchor='{anchor}' font-weight='{weight}' {_FONT}>"
        f"{escape(words)}</text>"
    )
