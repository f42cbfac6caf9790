"""The page says what report.md says, needs nothing beside it, and shows text as text."""

import re
from html.parser import HTMLParser

import pytest
from report_helpers import leave_out_plots, row, text_of, write_run

from evals import html
from runtime.files import write_jsonl

OWN = (
    "html meta title style body h1 h2 h3 p div table tr th td ul li strong code img details summary"
)


class Page(HTMLParser):
    """The tags, attributes and text of a page; every tag that is opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.cells, self.open = set(), [], [], []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.cells += [""] if tag in ("td", "th") else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] in (["td"], ["th"]) or self.open[-2:-1] == ["td"]:
            self.cells[-1] += data


def page_of(folder) -> tuple[str, str]:
    """Write a report. -> its Markdown, its page"""
    return text_of(str(folder)), (folder / "report.html").read_text()


def test_the_page_holds_every_cell_and_picture_of_the_report(tmp_path):
    """Two forms of one report must not say different things."""
    text, page = page_of(tmp_path if write_run(tmp_path) else None)
    cells = []
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            cells += [cell.strip().replace("**", "") for cell in line.split("|")[1:-1]]
    assert len(cells) > 100 and Page(page).cells == cells
    assert page.count("<img ") == text.count("![](") == 4
    for title in re.findall("^#+ (.*)", text, re.M):
        assert title in Page(page).text


def test_the_page_needs_no_other_file(tmp_path):
    """It is sent by mail, and read without network and next to nothing."""
    page = page_of(tmp_path if write_run(tmp_path) else None)[1]
    sources = [value for name, value in Page(page).attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 4 and all(x.startswith("data:image/png;base64,") for x in sources)
    assert "http" not in page and "url(" not in page and "@import" not in page
    assert Page(page).tags <= set(OWN.split())
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


HOSTILE = ["<script>alert(1)</script>", "</code></table><b>x", "**a", "` ** `", "a | b", "&lt;"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_models_and_names_of_runs_stay_text(tmp_path, monkeypatch, text):
    """What a model says is no page: it is shown, and does nothing."""
    leave_out_plots(monkeypatch)
    example = {"question": text, "text": text, "answer": text, "false_equation": text}
    rows = [row("problems", "dpo", "exact_match", "greedy", 0.1, examples=[example])]
    rows += [row("problems", text, "exact_match", "greedy", 0.2, stage=text)]
    write_run(tmp_path, rows, said=text)
    write_jsonl(str(tmp_path / text.replace("/", "") / "metrics.jsonl"), [])
    page = page_of(tmp_path)[1]
    assert Page(page).tags <= set(OWN.split())
    assert text.strip("` ") in [cell.strip() for cell in Page(page).cells]
    assert {name for name, _ in Page(page).attributes} <= {"lang", "charset", "name", *ATTRIBUTES}


ATTRIBUTES = ("content", "class", "src", "alt")


def test_code_keeps_its_stars_and_bold_goes_around_it():
    assert html.inline("**`a ** b`** 2 ** 3") == (
        "<strong><code>a &#42;&#42; b</code></strong> 2 ** 3"
    )
    assert html.inline(r"a \| b < c") == "a | b &lt; c"
