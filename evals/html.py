"""report.html: the Markdown of a report as one page that needs no other file and no network.

It knows the Markdown that report.py writes, and no other; everything else is shown as it stands.
"""

import base64
import os
import re
from html import escape
from itertools import groupby

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 72rem; margin: 0 auto; padding: 0 1rem 3rem; color: #1c1e21;
  background: #fff; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #8886 }}
img {{ display: block; width: 100%; max-width: 40rem; margin: 1rem 0; border-radius: 6px }}
.table {{ overflow-x: auto; margin: 1rem 0 }}
table {{ border-collapse: collapse; font-size: 0.9rem; overflow-wrap: normal }}
th, td {{ padding: 0.3rem 0.7rem; border-bottom: 1px solid #8886; text-align: left }}
td:first-child {{ min-width: 6rem }}
.number {{ white-space: nowrap }}
code {{ padding: 0.1em 0.3em; border-radius: 4px; background: #8882 }}
summary {{ padding: 0.5rem 0; font-weight: bold; cursor: pointer }}
@media (prefers-color-scheme: dark) {{ body {{ color: #dcdee1; background: #16181b }} }}
</style>
<body>
{body}
</body>
</html>
"""


def page(markdown: str, folder: str) -> str:
    """Return a page of a report; its pictures are read from the folder."""
    lines = [line for line in markdown.split("\n") if line and not line.startswith("<!--")]
    parts = []
    for mark, group in groupby(lines, lambda line: line[:2]):
        if mark == "| ":
            parts.append(table(list(group)))
        elif mark == "- ":
            items = [f"<li>{inline(line[2:])}</li>" for line in group]
            parts.append("\n".join(["<ul>", *items, "</ul>"]))
        else:
            parts += [convert(line, folder) for line in group]
    return PAGE.format(title=escape(lines[0].lstrip("# ")), body="\n".join(parts))


def convert(line: str, folder: str) -> str:
    """Return a line that is neither of a table nor of a list."""
    if heading := re.fullmatch("(#{1,3}) (.*)", line):
        level = len(heading[1])
        return f"<h{level}>{inline(heading[2])}</h{level}>"
    if image := re.fullmatch(r"!\[\]\(([\w.-]+)\.png\)", line):
        with open(os.path.join(folder, f"{image[1]}.png"), "rb") as f:
            data = base64.b64encode(f.read()).decode()
        return f'<img alt="{image[1]}" src="data:image/png;base64,{data}">'
    if fold := re.fullmatch("<details><summary>(.*)</summary>", line):
        return f"<details><summary>{inline(fold[1])}</summary>"
    return line if line == "</details>" else f"<p>{inline(line)}</p>"


def table(lines: list[str]) -> str:
    """Return a table in a box of its own, in which it moves where it is wider than the page."""
    head, _, *rows = [re.split(r" ?(?<!\\)\| ?", line)[1:-1] for line in lines]
    text = ["".join(f"<th>{inline(name)}</th>" for name in head)]
    text += ["".join(map(table_cell, row)) for row in rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in text)
    return f'<div class="table"><table>\n{body}\n</table></div>'


def table_cell(text: str) -> str:
    kind = ' class="number"' if re.match(r"\**[-+]?\d", text) else ""
    return f"<td{kind}>{inline(text)}</td>"


def inline(text: str) -> str:
    """Return a line with its bold text and its code, in which no star is bold."""
    text = escape(text.replace("\\|", "|"))
    text = re.sub("`([^`]*)`", lambda m: f"<code>{m[1].replace('*', '&#42;')}</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
