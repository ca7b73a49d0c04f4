"""Insert tables from results/ into README.md and docs/, between two marker lines.

    <!-- table results/recipe/table.md -->
    <!-- end -->

`fill` puts the file's content between them. A marker may list the titles of the columns to
keep: `<!-- table results/recipe/table.md: arm, n, test %, exported file -->`. If two columns
have the same title, the one to the right of the column named before is taken ("MACs,
fewer"), else the first.
`python report.py --pages` does this for all pages; study.py and report.py do it after they
have written results.
"""
import re
from pathlib import Path

from engine import files

MARKED = re.compile(r"^<!-- table (\S+?)(?:: *([^\n]*?))? *-->\n(.*?)^<!-- (end|table .*?) -->$",
                    re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- *table\b.*$", re.MULTILINE)


def fill(page_text, root):
    """The page with the tables that its markers name filled in, read from below `root`.

    ValueError for a marker that cannot be read, has no end, or names an unknown column; FileNotFoundError for a
    missing table.
    """
    filled, found = [], MARKER.findall(page_text)

    def put(match):
        path, columns, _, end = match.groups()
        if end != "end":
            raise ValueError(f"the table {path} has no <!-- end --> before the next one")
        filled.append(match.start())
        head = match.group(0).split("\n", 1)[0]
        return f"{head}\n\n{table_of(Path(root) / path, columns)}\n\n<!-- end -->"
    text = MARKED.sub(put, page_text)
    if len(found) != len(filled):
        raise ValueError(f"{len(found)} tables are marked and {len(filled)} can be filled; the lines are "
                         "<!-- table PATH --> or <!-- table PATH: columns --> and, below, <!-- end -->; there are "
                         f"{'; '.join(found)}")
    return text


def table_of(path, columns=None):
    """The content of a Markdown file, with only the named columns of its table if `columns` is given."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no table at {path}")
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    if not columns:
        return "\n".join(lines)
    rows = {place: cells_of(line) for place, line in enumerate(lines) if line.startswith("|")}
    chosen = places_of(path, next(iter(rows.values()), []), columns)
    for place, cells in rows.items():
        if len(cells) <= max(chosen):
            raise ValueError(f"{path} has a row of {len(cells)} cells below {len(next(iter(rows.values())))} titles: "
                             f"{lines[place][:60]}")
        lines[place] = "".join(f"|{cells[column]}" for column in chosen) + "|"
    return "\n".join(lines)


def cells_of(line):
    """The cells of a row, including blanks; a bar after a backslash does not separate cells."""
    return re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))


def places_of(path, titles, columns):
    """Indices of the columns in a text of titles separated by ", "; ValueError for an unknown title."""
    places, titles = [], [title.strip() for title in titles]
    longest_first = sorted(set(titles), key=len, reverse=True)       # a title may contain ", " itself
    while columns:
        name = next((title for title in longest_first if f"{columns}, ".startswith(f"{title}, ")), None)
        if name is None:
            raise ValueError(f"{path} has no column {columns!r}; there are {'; '.join(titles)}")
        columns = columns[len(name) + 2:]
        found = [place for place, title in enumerate(titles) if title == name]
        places.append(next((place for place in found if places and place > places[-1]), found[0]))
    return places


def pages_of(root="."):
    """The existing pages among README.md and docs/*.md below a folder."""
    return [page for page in (Path(root) / "README.md", *sorted(Path(root).glob("docs/[!.]*.md"))) if page.is_file()]


def write_pages(root="."):
    """Fill the tables of all pages, write those that changed, and return them.

    ValueError, after the others are written, that names each page which cannot be filled.
    """
    changed, problems = [], []
    for page in pages_of(root):
        try:
            before = page.read_text(encoding="utf-8")
            after = fill(before, root)
        except (ValueError, OSError) as problem:
            problems.append(f"{page}: {problem}")
            continue
        if after != before:
            files.write(page, after.encode())
            changed.append(page)
    if problems:
        raise ValueError("; ".join(problems))
    return changed


def update(out, root="."):
    """Fill the pages if `out` is below results/, where their tables come from; failures are only a note."""
    if Path(out).resolve().is_relative_to((Path(root) / "results").resolve()):
        with files.noted():
            for page in write_pages(root):
                print(f"written: tables in {page}")
