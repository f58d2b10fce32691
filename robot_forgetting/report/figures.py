"""Figures as inline SVG: real text, colours that colour-blind eyes tell apart, ink that follows the page's theme."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from robot_forgetting.report.runs import BASE

if TYPE_CHECKING:  # matplotlib takes a second to import: tables without figures do without
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow (invisible on white) and black (the ink); markers differ as well.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT = "#010203", "#010204"  # stand-ins, replaced by the page's own colours
ON_PAPER = {"currentColor": "#000000", "var(--faint)": "#555555"}  # in files of their own

RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robot_forgetting",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a name with a dollar is a name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's own defaults, then ``RC``: a `matplotlibrc` in the working folder changes nothing."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


class Colours:
    """A colour and a marker per method, the same in all figures and tables of a page."""

    def __init__(self, methods: Sequence[str]):
        self.methods = [method for method in dict.fromkeys(methods) if method != BASE]

    def colour(self, method: str) -> str:
        return INK if method not in self.methods else PALETTE[self.methods.index(method) % len(PALETTE)]

    def marker(self, method: str) -> str:
        return "*" if method not in self.methods else MARKERS[self.methods.index(method) % len(MARKERS)]


def canvas(size: tuple[float, float], columns: int = 1, rows: int = 1, **options) -> tuple[Figure, list]:
    """A figure of that width and height in inches, and its axes row by row; options are those of ``subplots``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).ravel())


def crosses(axes, rows: Sequence[dict], names: tuple[str, str], style: dict) -> None:
    """Large markers with their 95 % intervals."""
    for row in rows:
        errors = []
        for name in names:
            low = row.get(f"{name}_low")
            errors.append(
                None if low is None else [[max(row[name] - low, 0)], [max(row[f"{name}_high"] - row[name], 0)]]
            )
        options = {"markersize": 8, **style}
        axes.errorbar(row[names[0]], row[names[1]], xerr=errors[0], yerr=errors[1], elinewidth=0.9, zorder=3, **options)


def percent(axes, *, x: bool = False, y: bool = False) -> None:
    for axis in (axes.xaxis,) * x + (axes.yaxis,) * y:
        axis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g} %")


def points_axis(axis) -> None:
    """Ticks in points: 0.05 is 5."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}".replace("-", "\N{MINUS SIGN}"))


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element: theme colours, unique ids, a title for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    head = re.match(r"<svg[^>]*>", text).group()
    opened = (
        re.sub(r'(width|height)="[\d.]+pt"', "", head)[:-1] + f' role="img" aria-label="{title}"><title>{title}</title>'
    )
    return text.replace(head, opened, 1)


def on_paper(svg: str) -> str:
    """An inline figure as a file of its own: black ink on white, with a size."""
    for ink, colour in ON_PAPER.items():
        svg = svg.replace(ink, colour)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    svg = svg.replace("<svg", f'<svg width="{width}pt" height="{height}pt" style="background:#fff"', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n'


def pdf(figure: Figure) -> bytes:
    """The figure, which ``svg`` has laid out, without dates."""
    buffer = io.BytesIO()
    figure.set_layout_engine("none")  # doing it again takes as long as drawing
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return buffer.getvalue()
