"""Videos of the same initial state before and after."""

from __future__ import annotations

from markupsafe import Markup

from robot_forgetting.report import words
from robot_forgetting.report.markup import Content, join, note
from robot_forgetting.report.media import comparisons
from robot_forgetting.report.runs import BASE
from robot_forgetting.report.section import Part, Section

VIDEO = Markup(
    '<video controls loop muted playsinline preload="auto" aria-label="{task}, {who}: {outcome}" src="{uri}"></video>'
)
TASK = Markup('\n<h4>{} <span class="sub">({})</span></h4>\n<div class="videos">{}</div>\n')
LEFT_OUT = Markup('<p class="note">left out to keep the page small: <span class="path">{run}/videos/{name}</span></p>')


class Videos(Section):
    name, title = "videos", "Before and after"

    def heading(self, part: Part) -> str:
        return self.title if part.trained else "Videos"

    def html(self, part: Part, figure: Markup) -> Content:
        rows = comparisons(part.groups)
        if not rows:
            return note("No videos were recorded." * part.trained)
        said = "One test initial state per task, the first that was recorded, not picked by its outcome. A video shows "
        return note(f"{said}what happened once, not how often.") + join(_task(row, part) for row in rows)


def _task(row: dict, part: Part) -> Markup:
    about = [words.role_name(row["role"]), row["instruction"] and f"“{row['instruction']}”", f"seed {row['seed']}"]
    videos = join(_video(row, one, part) for one in row["videos"])
    return TASK.format(row["task"], ", ".join(filter(None, about)), videos)


def _video(row: dict, one: dict, part: Part) -> Markup:
    outcome, uri = "success" if one["success"] else "failure", part.embedder.uri(one["path"])
    shown = (VIDEO if uri else LEFT_OUT).format(
        task=row["task"], who=one["who"], outcome=outcome, uri=uri, run=one["run"], name=one["path"].name
    )
    label = "base policy" if one["who"] == BASE else f"after {one['who']}"
    return Markup("\n<figure>{}<figcaption><b>{}</b>: {}</figcaption></figure>").format(shown, label, outcome)
