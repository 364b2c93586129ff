"""Links between the documents lead to files and headings that exist."""

import re

import pytest

from tests import tiny

PAGES = sorted([*tiny.ROOT.glob("*.md"), *(tiny.ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def headings(page):
    """The anchors of a page, formed as GitHub does."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    plain = lambda title: re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", plain(title)).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Catches a page or heading that was renamed while others still link to it."""
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if ":" in target:  # a URL
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or path.suffix != ".md" or anchor in headings(path), (target, anchor)
