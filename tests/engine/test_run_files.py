"""What a run wrote, of any shape: read as it is, or one line that names the file."""
import json

import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import report
from engine import run_files

CONFIG = {"settings": {"dataset": "digits", "mixing": "none", "recipe": "ours", "seed": 0, "sparsity": [0.9]},
          "architecture": {"name": "resnet18", "groups": 8, "shuffle": True}, "device": "cpu"}
ROW = dict.fromkeys(report.COLUMNS_OF_HISTORY, 1.0)
PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner,
                                                                                 max_size=2), max_leaves=4)


def write_run(folder, config=CONFIG, history=None, report_=None):
    """The files of a run, with any content; history: text, or None for a table of one epoch."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "history.csv").write_text(pd.DataFrame([ROW]).to_csv(index=False) if history is None else history,
                                        newline="")
    (folder / "report.json").unlink(missing_ok=True)
    if report_ is not None:
        (folder / "report.json").write_text(json.dumps(report_))
    return folder


def changed(**parts):
    """CONFIG with other settings."""
    return {**CONFIG, "settings": {**CONFIG["settings"], **parts}}


@pytest.mark.parametrize("config, message", [
    ({}, "'settings' must be an object, not 'None'"), ([], "it holds a list, not a JSON object"),
    ({**CONFIG, "settings": []}, "'settings' must be an object"), ({**CONFIG, "device": 3}, "'device' must be text"),
    (changed(seed="0"), "'seed' must be a whole number"), (changed(sparsity=["a"]), "0 must be a number, not 'a'"),
    (changed(pruning=["l1"]), "'pruning' must be text"), (changed(cycle_settings="x"), "'cycle_settings' must be an"),
    ({**CONFIG, "architecture": {}}, "'name' must be text"),
    ({**CONFIG, "architecture": {"name": "resnet18", "groups": "8"}}, "'groups' must be a whole number")])
def test_a_config_of_another_shape_is_named(config, message, tmp_path):
    with pytest.raises(ValueError, match=f"run/config.json is damaged: .*{message}"):
        report.main([str(write_run(tmp_path / "run", config)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()                   # one line before any work


HEADER = ",".join(ROW)


@pytest.mark.parametrize("history, message", [
    ("", "it is no table: No columns"), (HEADER + "\n", "has no row: no epoch of that run has ended"),
    ("round,epoch\n1,1\n", "it has no column 'seconds'"),
    (HEADER + "\n" + ",".join(["nan"] * len(ROW)) + "\n", "round holds 'nan', not a number"),
    (HEADER + "\n" + "1," * (len(ROW) - 1) + "x\n", "sparsity holds 'x', not a number"),
    (HEADER + "\n1\n" + "1," * 40 + "\n", "it is no table"),
    (HEADER + "\n" + "1," * len(ROW) + "1\n", "a row has more values than there are columns"),
    (HEADER + ",pflop\n" + "1," * len(ROW) + "y\n", "pflop holds 'y', not a number")])
def test_a_history_of_another_shape_is_named(history, message, tmp_path):
    with pytest.raises(ValueError, match=f"run/history.csv .*{message}"):
        report.main([str(write_run(tmp_path / "run", history=history)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, message", [
    ([], "it holds a list"), ({"test": 3}, "'test' must be an object"), ({"test": None}, "'test' must be an object"),
    ({"test": {"accuracy": "90"}}, "'accuracy' must be a number"), ({"test": {"bytes": 3}}, "'bytes' must be an"),
    ({"profile": {"nonzero": True}}, "'nonzero' must be a number"), ({"profile": {"layers": 3}}, "'layers' must be"),
    ({"profile": {"layers": [3]}}, "'name' must be text"),
    ({"profile": {"layers": [{"name": "a", "weights": 0, "zero_weights": 0}]}}, "0 of 0 weights of a are zero")])
def test_a_report_of_another_shape_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"run/report.json is damaged: .*{message}"):
        report.main([str(write_run(tmp_path / "run", report_=content)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_is_whole_is_read(tmp_path):
    run = report.read_run(write_run(tmp_path / "run", report_={"test": {"accuracy": 90}}))
    assert (run["test_accuracy"], run["pruning"], run["epochs"]) == (90, "90 %", "1")
    for folder in sorted(config.parent for config in (ROOT / "results").glob("*/config.json")):
        assert report.read_run(folder)["run"] == folder.name


def somewhere(whole):
    """A dictionary with anything in the place of one of its values, at any depth."""
    places = st.sampled_from(sorted(whole, key=str))
    return st.builds(lambda place, value: {**whole, place: value}, places, PLAIN) | PLAIN


@settings(deadline=None, max_examples=150)
@given(config=somewhere(CONFIG) | somewhere(CONFIG["settings"]).map(lambda found: {**CONFIG, "settings": found})
       | somewhere(CONFIG["architecture"]).map(lambda found: {**CONFIG, "architecture": found}),
       report_=st.none() | st.fixed_dictionaries({}, optional={"test": PLAIN, "profile": PLAIN | somewhere(
           {"nonzero": 3, "layers": [{"name": "a", "weights": 3, "zero_weights": 1}]})}),
       history=st.none() | st.text(alphabet="1.,-\n\"ax", max_size=30)
       | st.lists(st.sampled_from(["1", "-3", "x", "", "inf", "1e400", '"']), min_size=len(ROW), max_size=len(ROW))
       .map(lambda cells: HEADER + "\n" + ",".join(cells) + "\n"))
def test_files_of_any_shape_make_a_table_or_one_line(config, report_, history, tmp_path_factory):
    folder = write_run(tmp_path_factory.getbasetemp() / "any", config, history, report_)
    try:
        runs = [report.read_run(folder)]
    except ValueError as problem:
        assert str(folder) in str(problem)
    else:
        assert report.markdown_of(report.table_of(runs)).count("\n") == 3
        assert report.same_run(runs[0], runs[0]) and len(report.times_of(runs)) == 1


def test_a_whole_number_may_be_large_but_not_infinite(tmp_path):
    with pytest.raises(ValueError, match="'accuracy' must be a number"):
        run_files.read_report(write_run(tmp_path / "run", report_={"test": {"accuracy": 10**400}}))


@pytest.mark.parametrize("other", ["notes.md", "notes.png"])
def test_numbers_do_not_write_over_pages_that_are_not_theirs(other, tmp_path):
    target = tmp_path / "notes.json"
    (tmp_path / other).write_text("written by hand")
    with pytest.raises(ValueError, match=f"{other} would be written over"):
        run_files.check_target(target, beside=(".md", ".png"))
    target.write_text("{}")                                     # its numbers of an earlier time
    run_files.check_target(target, beside=(".md", ".png"))
