"""``write_page``: sections over run folders become one HTML page, and a JSON file with its tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from robot_forgetting.errors import UserError, unknown
from robot_forgetting.machine.files import disk, plain, write_atomic, write_json
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.records.run_folder import SCHEMA_VERSION, RunFolder, find_runs
from robot_forgetting.report import figures, words
from robot_forgetting.report.curve_section import Curves
from robot_forgetting.report.divergence_section import Divergence
from robot_forgetting.report.forgetting_section import Forgetting
from robot_forgetting.report.front_section import Fronts
from robot_forgetting.report.layer_section import Layers
from robot_forgetting.report.markup import badge, join, paragraph
from robot_forgetting.report.matrix_section import Matrix
from robot_forgetting.report.media import Embedder
from robot_forgetting.report.predictor_section import Predictors, plotted
from robot_forgetting.report.provenance_section import Provenance, Terms
from robot_forgetting.report.reading import reading
from robot_forgetting.report.runs import Run, load
from robot_forgetting.report.section import GroupedRuns, Part, Section
from robot_forgetting.report.success_section import Success
from robot_forgetting.report.video_section import Videos

# The sections of a page, in its order. One more is one file and one line here.
SECTIONS: tuple[type[Section], ...] = (
    Matrix,
    Success,
    Forgetting,
    Fronts,
    Divergence,
    Predictors,
    Layers,
    Curves,
    Videos,
    Provenance,
    Terms,
)


@dataclass
class Page:
    """What a page is made of: parts, each shown by every section, then the sections that stand once a page.

    notes: asked when all else is rendered; files: figures are files, too, for a paper
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    parts: Sequence[Part]
    whole: Part
    tables: dict
    lead: Sequence[str | Markup]
    notes: Callable[[], Sequence[str]]
    files: bool = False


def write_report(run_folders: Sequence[Path], output: Path | None = None, sections: Sequence = ("standard",)) -> Path:
    """Writes the page and, beside it, a JSON file of the same name with every table; returns the page's path.

    run_folders: run folders, or folders that hold some
    output: the page's file, or a folder for report.html; default report.html here
    sections: see ``chosen``
    """
    folders, output = places(run_folders, output)
    return write_page(standard_page(folders, chosen(sections)), output)


def read_tables(run_folders: Path | Sequence[Path], sections: Sequence = ("standard",)) -> dict:
    """Every table of report.json by name, from a run folder, a folder of them, or several; no HTML, no matplotlib."""
    return rows_of(GroupedRuns([load(folder) for folder in places(run_folders)[0]]), chosen(sections))


def places(run_folders: Path | Sequence[Path], output: Path | None = None) -> tuple[list[RunFolder], Path]:
    """The run folders, and the page's file; ``UserError`` where there are none."""
    run_folders = [run_folders] if isinstance(run_folders, str | Path) else run_folders
    if not run_folders:
        raise UserError("no run folder given; name some, as in: robot-forgetting report runs/demo")
    output = Path("report.html" if output is None else output)
    if output.is_dir() or not output.suffix:
        output = output / "report.html"
    return find_runs(run_folders), output


def chosen(sections: Sequence[str | type[Section]]) -> list[Section]:
    """Sections by name, "standard" for all of this package's, or by class or dotted name (``my_module.MySection``)."""
    found: list[Section] = []
    known = {section.name: section for section in SECTIONS}
    for section in sections:
        if section == "standard":
            found += [one() for one in SECTIONS]
            continue
        if isinstance(section, str) and "." in section:
            section = load_object(section, "sections")
        elif isinstance(section, str):
            if section not in known:
                raise unknown("section", section, ["standard", *known])
            section = known[section]
        if not (isinstance(section, type) and issubclass(section, Section)):
            raise UserError(f"sections: {section} is no subclass of robot_forgetting.report.section.Section")
        found.append(section())
    return found


def rows_of(runs, sections: Sequence[Section]) -> dict:
    """The tables of all sections by name; a table that two sections give is the first one's."""
    tables: dict = {"schema_version": SCHEMA_VERSION}
    for section in sections:
        tables = {**section.rows(runs), **tables}
    return plain(tables)


def standard_page(folders: Sequence[RunFolder], sections: Sequence[Section]) -> Page:
    """The page of ordinary runs: a part for each setting, measured before shipped."""
    runs = GroupedRuns([load(folder) for folder in folders])
    # The lead and some sections read the tables of others, whichever are shown.
    tables = rows_of(runs, [*sections, *(one() for one in SECTIONS)])
    colours, embedder = figures.Colours([one.method for one in runs.groups]), Embedder()
    parts = []
    for setting in dict.fromkeys(group.setting for group in runs.groups):
        groups = [group for group in runs.groups if group.setting == setting]
        part = Part(f"s{len(parts)}", groups, tables, colours, setting, embedder=embedder)
        policy, new_task, shipped = setting
        part.title = f"{new_task} with {policy}" + (", shipped results" if shipped else "")
        if shipped:
            source = f" These numbers were not measured in this run; source: {shipped}."
            part.intro = paragraph(badge("shipped") + source) + join(map(paragraph, lead(part)))
        parts.append(part)
    leading = [part for part in parts if not part.setting[2]] or parts
    measured = sum(run.shipped is None for run in runs.all)
    subtitle = f"Report of {time.strftime('%Y-%m-%d %H:%M')}; {words.plural(measured, 'run')} measured here"
    if measured < len(runs.all):
        subtitle += f", {len(runs.all) - measured} shipped with the repository (marked)"
    return Page(
        title="What was learned, and what was forgotten",
        subtitle=subtitle,
        sections=sections,
        parts=parts,
        whole=Part("", runs.groups, tables, colours),
        tables=tables,
        lead=[text for part in leading for text in _titled(part, lead(part), len(leading) > 1)],
        notes=lambda: notes(runs.all, embedder),
    )


def lead(part: Part) -> list[str]:
    """The paragraphs that say what was found in a part."""
    policy, new_task, _ = part.setting
    quantity = plotted(part.rows("checkpoints"))
    wanted = quantity.as_predictor().items() if quantity else None
    fit = next((row for row in part.rows("predictors") if wanted and wanted <= row.items()), None)
    tables = (part.rows(name) for name in ("success", "forgetting", "matched"))
    return reading(policy, new_task, *tables, fit, part.rows("curves"))


def _titled(part: Part, texts: Sequence[str], several: bool) -> list[str | Markup]:
    if not several:
        return list(texts)
    return [Markup("<b>{}.</b> {}").format(part.title, texts[0]), *texts[1:]]


def notes(runs: Sequence[Run], embedder: Embedder) -> list[str]:
    """What a reader has to know before the numbers: runs that are not finished, bases that differ, videos left out."""
    said = []
    for run in runs:
        if run.status != "finished":
            reached = f"evaluated up to iteration {run.final[1]}" if run.final else "no fine-tuned policy evaluated yet"
            why = f" ({run.state['error']})" if run.state.get("error") else ""
            said.append(f"Run {run.id} is {run.status}{why}: {reached}; its numbers are not final.")
    seen: dict[tuple, bool] = {}
    differing = 0
    for run in runs:
        for (stage, _, task, _, decode), seeds in run.outcomes.items():
            for seed, success in seeds.items() if stage == 0 else ():
                key = (run.policy, run.state.get("fingerprint"), run.shipped, task, decode, seed)
                differing += seen.setdefault(key, success) != success
    if differing:
        where = words.plural(differing, "episode")
        said.append(f"The base policy's outcome differs between runs on {where}; the first run counts.")
    if embedder.left_out:
        left_out = words.plural(embedder.left_out, "video")
        said.append(f"{left_out} left out to keep the page small; see the run folders.")
    return said


def write_page(page: Page, output: Path) -> Path:
    """Writes ``output``, the JSON file of the same name, and the figures of a page that has ``files``."""
    html, drawn = render(page)
    with disk(output.parent):
        (output.parent / "figures" if drawn else output.parent).mkdir(parents=True, exist_ok=True)
    for name, content in drawn.items():
        write_atomic(output.parent / "figures" / name, content)
    write_json(output.with_suffix(".json"), page.tables)
    write_atomic(output, html)
    count = words.plural(len(page.tables["runs"]), "run")
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB, {count}); open it in a browser")
    return output


def render(page: Page) -> tuple[str, dict[str, str | bytes]]:
    """The page as text, and {file name: content} of its figures."""
    body, links, drawn = [], [], {}
    for part in [*page.parts, page.whole]:
        shown = []  # id, heading, HTML
        for section in page.sections:
            if section.once == (part is page.whole) and (part.trained or not section.trained):
                name = f"{part.id}-{section.name}" if part.id else section.name
                content = _section(section, part, name, drawn if page.files else None)
                shown.append((name, section.heading(part), content))
        shown = [one for one in shown if one[2]]
        several = part.title and len(page.parts) > 1
        links += [(part.id, part.title)] if several else [one[:2] for one in shown if one[1]]
        if part.title:
            inner = join(_SUBSECTION.format(*one) for one in shown)
            body.append(_SECTION.format(part.id, part.title, part.intro + inner))
        else:
            body += [_SECTION.format(*one) if one[1] else one[2] for one in shown]
    template = (resources.files("robot_forgetting.report") / "page.html").read_text(encoding="utf-8")
    css = (resources.files("robot_forgetting.report") / "style.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    filled = environment.from_string(template).render(
        page=page, notes=page.notes(), links=links, body=join(body), css=Markup(css)
    )
    return filled, drawn


_SUBSECTION = Markup('<h3 id="{}">{}</h3>\n{}')
_SECTION = Markup('<section id="{}">\n<h2>{}</h2>\n{}</section>\n')


def _section(section: Section, part: Part, name: str, files: dict | None) -> Markup:
    """A section's HTML with its figure drawn; into ``files``, if there are to be some, the figure as SVG and PDF."""
    with figures.drawing():
        figure, svg = section.figure(part), ""
        if figure is not None:
            svg = figures.svg(figure, name, section.alt or section.heading(part))
            if files is not None:
                files |= {f"{name}.svg": figures.on_paper(svg), f"{name}.pdf": figures.pdf(figure)}
    return Markup.escape(section.html(part, Markup(svg)))
