"""The overview holds what test.py and profil.py find, and what others state, each where it belongs."""
import json
import os
import shutil

import pytest
from conftest import ROOT

import profil
import test as half_test
from benchmarks import overview

CITED = [{"name": "dense", "short": "dense", "accuracy": [95.3, 96.0], "parameters": 11_173_962, "macs": 555_422_720,
          "score": 1.99},
         {"name": "a claim", "short": "claim", "accuracy": [90.12], "about_parameters": 335_219,
          "parameters_removed": 0.97, "macs_removed": 0.88},
         {"name": "a score", "short": "score", "accuracy": [90.2], "score": 0.032, "aside": True,
          "link": "https://example.org"}]


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """An overview of one network, that of a run, and of what is cited above: what names them, what was written."""
    folder = tmp_path_factory.mktemp("overview")
    ours = [{"name": "ours to test, small", "short": "small", "file": str(trained / "model.pt"), "n": 1}]
    (folder / "named.json").write_text(json.dumps({"ours": ours, "cited": CITED}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overview, "NAMED", folder / "named.json")
        overview.main(["--out", str(folder / "out")])
    return folder


@pytest.fixture
def named(measured, monkeypatch):
    """What names the networks of that overview is in force; the folder that was written."""
    monkeypatch.setattr(overview, "NAMED", measured / "named.json")
    return measured / "out"


def test_a_row_is_what_the_scripts_find(named, trained, capsys):
    (row,) = json.loads((named / "overview.json").read_text())["ours"]
    capsys.readouterr()
    half_test.main(["--checkpoint", str(trained / "model.pt"), "--json"])
    tested = json.loads(capsys.readouterr().out)
    profil.main(["--checkpoint", str(trained / "model.pt"), "--json"])
    profile = json.loads(capsys.readouterr().out)
    assert row["accuracy"] == [tested["accuracy"]] and row["images"] == tested["images"]
    assert (row["parameters"], row["macs"], row["score"]) == (profile["nonzero"], profile["macs"],
                                                              profile["score_course"])
    assert row["bytes"] == os.path.getsize(trained / "model.pt")
    lines = (named / "overview.md").read_text().splitlines()
    assert f"**{tested['accuracy']:.2f} %** | 1 | {profile['nonzero']:,} |" in lines[2]
    assert lines[3:] == [
        "| dense, as cited | 95.3 to 96.0 % |  | 11,173,962 | 0 | 555,422,720 | 0 | 1.99 |  |",
        "| a claim, as cited | 90.12 % |  |  | 97.0 % |  | 88.0 % |  |  |",
        "| [a score](https://example.org), as cited | 90.2 % |  |  |  |  |  | 0.032 |  |"]
    assert (named / "overview_short.md").read_text().splitlines() == lines[:5]
    assert (named / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_draw_measures_nothing(named, tmp_path, monkeypatch):
    named = shutil.copytree(named, tmp_path / "out")
    monkeypatch.setattr(overview, "call", None)
    before = (named / "overview.md").read_bytes()
    (named / "overview.md").unlink()
    overview.main(["--out", str(named), "--draw"])
    assert (named / "overview.md").read_bytes() == before


def test_a_name_stands_below_its_point_or_above_where_that_is_asked(monkeypatch):
    drawn = []
    monkeypatch.setattr(overview.files, "save_figure", lambda path, figure: drawn.append(figure))
    row = {"file": "a.pt", "accuracy": [90.0], "parameters": 1000, "score": 0.1}
    overview.draw("a.png", [{**row, "short": "under"}, {**row, "short": "over", "above": True}])
    for axes in drawn[0].axes:
        heights = {text.get_text(): text.xyann[1] for text in axes.texts}
        assert heights["under"] < 0 < heights["over"]


def test_without_numbers_nothing_is_drawn(named, tmp_path):
    with pytest.raises(FileNotFoundError, match="leave out --draw"):
        overview.main(["--out", str(tmp_path / "out"), "--draw"])


def test_every_network_that_ships_is_in_it_as_it_is_now(tmp_path):
    held = json.loads((ROOT / "results/overview.json").read_text())["ours"]
    stated = json.loads((ROOT / "benchmarks/overview.json").read_text())["ours"]
    assert [row["file"] for row in held] == [row["file"] for row in stated]
    assert {row["file"] for row in held} == {f"pretrained/{path.name}" for path in (ROOT / "pretrained").iterdir()}
    for row, named_row in zip(held, stated, strict=True):
        assert row["bytes"] == (ROOT / row["file"]).stat().st_size and row["images"] == 10_000
        assert named_row.items() <= row.items()
    shutil.copy(ROOT / "results/overview.json", tmp_path)
    overview.main(["--out", str(tmp_path), "--draw"])
    for name in ("overview.md", "overview_short.md"):
        assert (tmp_path / name).read_text() == (ROOT / "results" / name).read_text()
