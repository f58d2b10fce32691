"""Pieces of a page: tables, figures and notes. What is not ``Markup`` is text, and is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

Content = str | int | Markup
TABLE = Markup(
    '<div class="scroll"><table>\n<caption>{}</caption>\n<thead>{}</thead>\n<tbody>{}\n</tbody></table></div>\n'
)


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, its CSS class, how many columns it spans, and how dark it is (0 to 1)."""

    content: Content
    css: str = ""
    span: int = 1
    shade: float | None = None


def join(parts: Iterable[Content], between: str = "") -> Markup:
    return Markup(between).join(parts)


def of(text: Content, css: str = "") -> Markup:
    """A second, fainter line in a cell; nothing for no text."""
    return Markup('<span class="of{}">{}</span>').format(f" {css}" * bool(css), text) if text else Markup()


def wrapped(text: Content) -> Markup:
    """A second line in a cell that may break."""
    return of(text, "wrap")


def strong(text: Content, *more: Content) -> Markup:
    return join([Markup("<b>{}</b>").format(text), *more])


def one(text: Content) -> Markup:
    """What shall not break."""
    return Markup('<span class="one">{}</span>').format(text)


def swatch(colour: str, name: Content) -> Markup:
    """A method's name behind its colour."""
    return Markup('<span class="swatch" style="background:{}"></span>{}').format(colour, name)


def badge(text: Content) -> Markup:
    return Markup('<span class="badge">{}</span>').format(text)


def table(caption: Content, head: Sequence, lines: Iterable[Sequence]) -> Markup:
    """A table; nothing without lines.

    head: a text per column, a pair with what is to stand below it, or a ``Cell``
    lines: sequences of cells, the first of which heads its line
    """
    body = [_row(_cell(cell, "td" if i else "th", "row") for i, cell in enumerate(line)) for line in lines]
    if not body:
        return Markup()
    return TABLE.format(caption, _row(_cell(_titled(column), "th", "col") for column in head), join(body))


def columns(caption: Content, rows: Iterable[dict], shown: dict[object, Callable[[dict], Content | Cell]]) -> Markup:
    """``table`` of rows, from {what heads a column: what it shows of a row}."""
    return table(caption, list(shown), ([show(row) for show in shown.values()] for row in rows))


def _row(cells: Iterable[Markup]) -> Markup:
    return Markup("\n<tr>{}</tr>").format(join(cells))


def _titled(column) -> Content | Cell:
    if isinstance(column, tuple):
        return join([column[0], Markup('<span class="role">{}</span>').format(column[1])])
    return column


def _cell(content: Content | Cell, tag: str, scope: str) -> Markup:
    cell = content if isinstance(content, Cell) else Cell(content)
    scope = f' scope="{scope}"' * (tag == "th")
    css = f' class="{cell.css}"' if cell.css else ""
    span = f' colspan="{cell.span}"' if cell.span > 1 else ""
    shade = "" if cell.shade is None else f' style="background:rgba(0,114,178,{0.5 * cell.shade:.2f})"'
    return Markup(f"<{tag}{scope}{css}{span}{shade}>{{}}</{tag}>").format(cell.content)


def pictured(figure: Content, caption: Content, wide: bool = False) -> Markup:
    """A figure with its caption; nothing without a figure."""
    if not figure:
        return Markup()
    css = Markup(' class="wide"') if wide else ""
    return Markup("<figure{}>{}<figcaption>{}</figcaption></figure>\n").format(css, figure, caption)


def paragraph(text: Content, css: str = "") -> Markup:
    """A paragraph; nothing for no text."""
    css = Markup(' class="{}"').format(css) if css else ""
    return Markup("<p{}>{}</p>\n").format(css, text) if text else Markup()


def note(text: Content) -> Markup:
    return paragraph(text, "note")


def bullets(items: Iterable[Content], tag: str = "ul") -> Markup:
    return Markup("<ul>{}</ul>\n").format(join(Markup("<li>{}</li>").format(item) for item in items))


def definitions(pairs: Iterable[tuple[Content, Content | Sequence[Content]]]) -> Markup:
    """A list of terms, each with its meaning, or several."""
    lines = []
    for term, meanings in pairs:
        meanings = meanings if isinstance(meanings, (list, tuple)) else [meanings]
        lines += [Markup("<dt>{}</dt>").format(term), *(Markup("<dd>{}</dd>").format(text) for text in meanings)]
    return Markup("<dl>\n{}\n</dl>\n").format(join(lines))


def folded(summary: Content, content: Content) -> Markup:
    """What opens when it is clicked on; nothing without content."""
    return Markup("<details><summary>{}</summary>{}</details>\n").format(summary, content) if content else Markup()
