"""Pages from the templates in this folder; all extend frame.html, which has the head and the style."""

from __future__ import annotations

from importlib import resources

import jinja2
from markupsafe import Markup


def template(name: str, functions: dict) -> jinja2.Template:
    """The template of that file name; ``functions``: what it may call. It needs ``title`` and ``subtitle``."""
    files = resources.files("robot_forgetting.report")

    def text(file: str) -> str:
        return (files / file).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"css": Markup(text("style.css")), **functions}
    return environment.get_template(name)
