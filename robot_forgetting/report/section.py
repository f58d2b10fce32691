"""``Section``: one part of a page over run folders. A section of your own is one file: see docs/plug_ins.md."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from markupsafe import Markup

from robot_forgetting.report import words
from robot_forgetting.report.comparison import SETTING, checkpoint_points
from robot_forgetting.report.figures import INK, Colours
from robot_forgetting.report.markup import Content, pictured, swatch, table
from robot_forgetting.report.media import Embedder
from robot_forgetting.report.runs import BASE, Group, Run, group

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GroupedRuns:
    """Run folders, read once and grouped, with what the rows of several sections are made of."""

    def __init__(self, runs: Sequence[Run]):
        self.all = list(runs)
        self.groups: list[Group] = group(runs)

    @cached_property
    def checkpoints(self) -> list[dict]:
        """See ``comparison.checkpoint_points``."""
        return checkpoint_points(self.groups)


@dataclass
class Part:
    """What a section shows at once: the runs of one setting (policy, new task, measured or shipped), or all of a page.

    tables: every table of the page by name, see ``Section.rows``; setting: None for all runs
    title: "" where the page's title says it; intro: what stands before the first section
    """

    id: str
    groups: Sequence[Group]
    tables: dict
    colours: Colours
    setting: tuple[str, str, str | None] | None = None
    title: str = ""
    intro: Markup = Markup()
    embedder: Embedder = field(default_factory=Embedder)

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def rows(self, name: str) -> list[dict]:
        """The rows of a table that are of this setting; none where there is no such table."""
        rows = self.tables.get(name, [])
        return rows if self.setting is None else [row for row in rows if self.setting == setting_of(row)]

    @property
    def trained(self) -> bool:
        """Whether some run has a fine-tuned policy, or is to have one."""
        return any(group.method != BASE for group in self.groups)

    def measure_name(self, measure: str) -> str:
        """Its title, as the runs declare it."""
        declared = (run.state.get("measures") or {} for run in self.runs)
        title = next((found[measure].get("title") for found in declared if isinstance(found.get(measure), dict)), None)
        return str(title or words.measure_name(measure))

    def who(self, row: dict) -> Markup:
        """What a row of a method is headed by."""
        return swatch(self.colours.colour(row["method"]).replace(INK, "currentColor"), row["variant"])


class Section(ABC):
    """A part of the page: rows for the JSON file, a figure, and HTML. What is left out of a subclass is as here.

    name: of the section and of its table, unlike those of the others; title: its heading; alt: its figure in words
    trained: shown only where something was trained; once: once a page, for all runs, else once for each setting
    """

    name: str
    title: str
    alt = ""
    trained = False
    once = False

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        """Tables of report.json by name, made of plain values. No HTML here, no matplotlib.

        A row that has ``**group.keys`` belongs to the setting of these runs, see ``Part.rows``.
        """
        return {}

    def figure(self, part: Part) -> Figure | None:
        """A matplotlib figure, drawn with ``figures.canvas`` inside ``figures.drawing``; None without one."""
        return None

    def html(self, part: Part, figure: Markup) -> Content:
        """What stands below the heading; empty: no section. ``figure``: what was drawn, as SVG.

        Text is escaped; ``report.markup`` has tables and notes. This one: the figure, and the table of this name.
        """
        rows = part.rows(self.name)
        keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
        lines = [[part.who(row) if "variant" in row else "", *(words.plain(row.get(k)) for k in keys)] for row in rows]
        head = ["policy", *(key.replace("_", " ") for key in keys)]
        return pictured(figure, self.caption(part)) + table(self.caption(part) if not figure else "", head, lines)

    def caption(self, part: Part) -> str:
        return ""

    def heading(self, part: Part) -> str:
        return self.title


HIDDEN = ("policy", "new_task", "method", "variant", "shipped")  # of a setting, or in front of the line


def setting_of(row: dict) -> tuple:
    return tuple(row.get(key) for key in SETTING)
