"""Tables in pages: what results/ holds is what README.md and docs/ show."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

import report
from engine import tables

TABLE = ("| arm | n | test %, exported file | parameters | fewer | MACs | fewer |\n|---|---|---|---|---|---|---|\n"
         "| a \\| b | 1 | 90.0 | 10 | 0 % | 20 | 1 % |\n| c | 2 | 91.0 | 5 | 50 % | 10 | 51 % |\n\nFailed: c.\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a table and three pages, one without markers."""
    (tmp_path / "results" / "x").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "x" / "table.md").write_text(TABLE)
    (tmp_path / "README.md").write_text("before\n<!-- table results/x/table.md -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "docs" / "a.md").write_text(
        "<!-- table results/x/table.md: arm, test %, exported file -->\n<!-- end -->\n"
        "<!-- table results/x/table.md: MACs, fewer -->\n\nx\n\n<!-- end -->")
    (tmp_path / "docs" / "b.md").write_text("nothing\n<!-- another comment -->\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_fills_all_pages_and_nothing_else(root, capsys):
    report.main(["--pages"])
    assert "README.md, docs/a.md" in capsys.readouterr().out
    assert (root / "README.md").read_text() == (
        f"before\n<!-- table results/x/table.md -->\n\n{TABLE.strip()}\n\n<!-- end -->\nafter\n")
    assert (root / "docs" / "a.md").read_text() == (
        "<!-- table results/x/table.md: arm, test %, exported file -->\n\n| arm | test %, exported file |\n|---|---|\n"
        "| a \\| b | 90.0 |\n| c | 91.0 |\n\nFailed: c.\n\n<!-- end -->\n"
        "<!-- table results/x/table.md: MACs, fewer -->\n\n| MACs | fewer |\n|---|---|\n| 20 | 1 % |\n| 10 | 51 % |\n"
        "\nFailed: c.\n\n<!-- end -->")
    assert (root / "docs" / "b.md").read_text() == "nothing\n<!-- another comment -->\n"
    report.main(["--pages"])
    assert "up to date" in capsys.readouterr().out
    assert sorted(path.name for path in root.rglob("*.*")) == ["README.md", "a.md", "b.md", "table.md"]


@pytest.mark.parametrize("page, message", [
    ("<!-- table results/y/table.md -->\n<!-- end -->", "there is no table at results/y/table.md"),
    ("<!-- table results/x/table.md: speed -->\n<!-- end -->", "table.md has no column 'speed'; there are arm; n; te"),
    ("<!-- table results/x/table.md: arm, , n -->\n<!-- end -->", "has no column ', n'"),
    ("<!-- table results/x/short.md: n -->\n<!-- end -->", "short.md has a row of 1 cells below 2 titles: | a |"),
    ("<!-- table results/x/table.md -->\n", "1 tables are marked and 0 can be filled"),
    ("<!-- table -->\n<!-- end -->", "1 tables are marked and 0"),
    ("<!-- table a b -->\n<!-- end -->", "1 tables are marked and 0"),
    ("<!-- table results/x/table.md -->\n\n<!-- table results/x/table.md -->\n<!-- end -->", "has no <!-- end --> be")])
def test_a_marker_that_cannot_be_filled_is_named_with_its_page(root, page, message):
    (root / "README.md").write_text(page)
    (root / "results" / "x" / "short.md").write_text("| arm | n |\n|---|---|\n| a |\n")
    with pytest.raises(ValueError, match=f"README.md: .*{message}"):
        report.main(["--pages"])
    assert (root / "README.md").read_text() == page


def test_a_table_that_was_written_is_filled_in_and_one_elsewhere_is_not(root, capsys):
    before = (root / "README.md").read_text()
    tables.update(root / "elsewhere")
    assert (root / "README.md").read_text() == before
    (root / "docs" / "a.md").write_text("<!-- table none.md -->\n<!-- end -->")
    (root / "docs" / "b.md").write_text(before)
    tables.update(root / "results" / "x")                    # one bad page costs no result
    assert "| c | 2 |" in (root / "README.md").read_text() == (root / "docs" / "b.md").read_text()
    assert "note: docs/a.md: there is no table at none.md" in capsys.readouterr().err


CELLS = st.text(alphabet="ab% .,\\|", max_size=6).map(lambda text: text.replace("\\", "").replace("|", "\\|"))


@given(before=st.text(alphabet="a\n|<!->", max_size=30), rows=st.lists(st.lists(CELLS, min_size=3, max_size=3),
                                                                       min_size=1, max_size=3))
def test_filling_twice_is_filling_once_and_leaves_the_rest(before, rows, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    lines = ["| x | y | z |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    (root / "any.md").write_text("\n".join(lines) + "\n")
    page = f"{before}\n<!-- table any.md: z, x -->\n<!-- end -->\nafter"
    filled = tables.fill(page, root)
    assert tables.fill(filled, root) == filled
    assert filled.startswith(before) and filled.endswith("\n<!-- end -->\nafter")
    shown = filled.removeprefix(before).splitlines()
    assert [line for line in shown if line.startswith("|")][2:] == [f"| {row[2]} | {row[0]} |" for row in rows]
