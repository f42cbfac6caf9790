"""The docs: every link, name and excerpt in them is true.

python tests/test_docs.py  # where code has moved: writes its new lines into the links
"""

import re
import sys
import textwrap
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent  # helpers cannot be imported when this is run
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE_SPAN = r"`(?:[^`\n]|\n(?!\n))+`"
BLOCK = re.compile(r"^```.*?^```$", re.M | re.S)
NO_PROSE = re.compile(rf"^```.*?^```$|^    .*?$|{CODE_SPAN}", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
LINES = re.compile(r"L(\d+)(?:-L(\d+))?")
EXCERPT = re.compile(
    r"\((?P<path>[^()\s#]+\.py)#L(?P<first>\d+)(?:-L(?P<last>\d+))?\)\n+```python\n(?P<code>.*?)\n```$",
    re.M | re.S,
)
# Files in backquotes: with their folder, or a program by its bare name
NAME = re.compile(r"(?<![\w/.<>*-])((?:[\w-]+/)+[\w-]+\.(?:py|md)|[\w-]+\.py)(?![\w/*])")
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"data", "out"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found, seen = set(), Counter()
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", BLOCK.sub("", text), re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


@pages
def test_every_link_leads_to_a_file_and_a_heading_or_a_line_of_it(page):
    """A reader who follows a link and finds nothing does not follow the next one."""
    for target in LINK.findall(NO_PROSE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):  # another site
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if lines := LINES.fullmatch(anchor):
            first, last = int(lines[1]), int(lines[2] or lines[1])
            assert 1 <= first <= last <= len(path.read_text().splitlines()), target
        elif anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pages
def test_formulas_are_written_so_that_markdown_leaves_them_alone(page):
    """It eats the backslash before a mark, and a formula in a line must end in that line.

    So whatever needs more stands in a block that is fenced as math.
    """
    prose = NO_PROSE.sub("", page.read_text(encoding="utf-8"))
    assert "$$" not in prose
    for paragraph in prose.split("\n\n"):
        for formula in paragraph.split("$")[1::2]:
            assert "\n" not in formula and not re.search(r"\\[^\sA-Za-z]", formula), formula


@pages
def test_every_file_that_is_named_exists(page):
    """A renamed recipe must not live on in the docs."""
    spans = re.findall(CODE_SPAN, BLOCK.sub("", page.read_text(encoding="utf-8")))
    names = {name for span in spans for name in NAME.findall(span)}
    ours = [name for name in names if "/" not in name or name.partition("/")[0] in FOLDERS]
    wrong = [name for name in ours if not (ROOT / name).is_file()]
    assert not [name for name in wrong if "/" in name or not any(ROOT.glob(f"*/{name}"))]


@pages
def test_every_excerpt_is_what_the_file_says_at_these_lines(page):
    """Code in the docs is read as the code; python tests/test_docs.py mends line numbers."""
    text, lost = renewed(page)
    assert not lost, f"no longer in the file: {lost}"
    assert text == page.read_text(encoding="utf-8"), "run: python tests/test_docs.py"


def renewed(page: Path) -> tuple[str, list[str]]:
    """Return a page with the lines at which its excerpts stand now, and the links without one."""
    lost = []

    def renew(found: re.Match) -> str:
        file, code = (page.parent / found["path"]).resolve(), found["code"].splitlines()
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        parts = {i: "\n".join(lines[i : i + len(code)]) for i in range(len(lines))}
        there = [i for i, part in parts.items() if textwrap.dedent(part) == found["code"]]
        if not there:
            lost.append(f"{found['path']}#L{found['first']}")
            return found[0]
        first = 1 + min(there, key=lambda i: abs(i + 1 - int(found["first"])))
        last = first + len(code) - 1
        if (first, last) == (int(found["first"]), int(found["last"] or found["first"])):
            return found[0]
        head, _, tail = found[0].partition(")")
        path, span = head.partition("#")[0], f"L{first}-L{last}" if code[1:] else f"L{first}"
        return f"{path}#{span}){tail}"

    return EXCERPT.sub(renew, page.read_text(encoding="utf-8")), lost


def test_an_installation_has_every_module_and_what_it_needs():
    """CONTRIBUTING.md: pip install -e . gives all programs and folders of code."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    own = about["tool"]["setuptools"]
    assert own["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    assert own["packages"] == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    needs = (ROOT / "requirements.txt").read_text().split()
    checks = ("pytest==", "hypothesis==", "ruff==")
    assert about["project"]["dependencies"] == [x for x in needs if not x.startswith(checks)]


if __name__ == "__main__":
    for page in PAGES:
        text, lost = renewed(page)
        page.write_text(text, encoding="utf-8")
        print("".join(f"{page.name}: {link} is no longer in the file\n" for link in lost), end="")
    sys.exit(any(renewed(page)[1] for page in PAGES))
