"""The rating page as text; test_page_in_browser.py uses it."""

import json
import re
from html.parser import HTMLParser

from imagen_jax.evals.rating import page
from tests.evals.rating import shown_studies


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes, text up to the next tag)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.found:
            self.found[-1][2] += data


def rendered(caption=shown_studies.CAPTION):
    study = shown_studies.make_study([shown_studies.make_trial(0, caption=caption)], [[[0, 0]]])
    return study, page.render(study).decode()


def test_a_text_of_the_study_cannot_end_the_script():
    """Catches JSON in the page without an escaped "<", and JSON escaped as HTML."""
    caption = "</script><img src=x onerror=alert(1)> <!-- a & b \u2028 \N{SNOWMAN}"
    study, text = rendered(caption)
    elements = Elements(text).found
    (content,) = [text for _, attrs, text in elements if attrs.get("id") == "study"]
    assert json.loads(content) == study
    assert [tag for tag, *_ in elements].count("script") == 2
    assert "img" not in {tag for tag, *_ in elements}


def test_the_page_uses_no_outside_resource():
    """Catches a style, script, font or icon that the page would fetch."""
    _, text = rendered()
    assert not re.findall(r"https?:|\burl\(|@import|\bimport\(|\bfetch\(|XMLHttpRequest", text)
    links = [
        (tag, value)
        for tag, attrs, _ in Elements(text).found
        for name, value in attrs.items()
        if name in {"src", "href", "srcset", "action", "formaction", "data"}
    ]
    assert links == [("link", "data:,")]


def test_the_page_names_no_system():
    """Catches the name of the project or of a generator: the comparison would not be blind."""
    _, text = rendered()
    assert not re.findall(r"imagen|jax|drawn by|generator|diffusion", text.lower())


def test_style_and_script_are_not_escaped():
    """Catches a script whose quotes or "&&" became HTML entities."""
    _, text = rendered()
    elements = Elements(text).found
    assert not re.findall(r"&(#\d+|amp|lt|gt|quot);", text)
    assert '"use strict";' in [text for tag, _, text in elements if tag == "script"][1]
    assert "--cell" in next(text for tag, _, text in elements if tag == "style")


def test_a_caption_has_the_direction_of_its_letters():
    """Catches Arabic or Hebrew whose punctuation stands at the wrong end."""
    _, text = rendered()
    (caption,) = [attrs for _, attrs, _ in Elements(text).found if attrs.get("id") == "caption"]
    assert caption["dir"] == "auto"
