"""The page on which a person rates pictures: one HTML file with its style, script and study."""

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import jinja2

TITLE = "Comparison of pictures"


def render(study: Mapping[str, Any]) -> bytes:
    """Returns the page of one run as UTF-8 HTML.

    The page needs no server and no resource except the pictures. It names no system.

    study: version, study, run, order, questions, trials, pictures, schedules, consent and warning.
    `pictures` maps the token of each set to URLs relative to the page, or to data URIs. `schedules`
    lists for each rater (index in `trials`, whether the sides are swapped) in order.
    """
    folder = importlib.resources.files("imagen_jax") / "assets" / "rating"
    read = lambda name: (folder / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    # Without "<", no text of the study can end the script element.
    content = json.dumps(dict(study), allow_nan=False).replace("<", r"\u003c")
    page = environment.from_string(read("page.html")).render(
        title=TITLE,
        style=read("page.css"),
        script=read("session.js") + "\n" + read("page.js"),
        study_json=content,
    )
    return page.encode()
