"""A study's file: what would fail or mislead later is refused in one line before any work."""
import json
import math
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import experiment
import study
import train
import train_pruning
from studies import study_file

MAINS = {"train.py": train.main, "train_pruning.py": train_pruning.main}
SHORT = "--dataset digits --limit 32 --batch-size 16 --device cpu --compile off --epochs 1 --model lenet5 --mixing none"
ARM = {"group": "g", "name": "a", "run": "train.py"}
FACTOR = {"flag": "--lr", "values": [0.1, 0.2]}


def write_study(folder, content=None, name="small", **changes):
    """A study's file with one arm, or with any content."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"flags": SHORT, "seeds": [0], "arms": [ARM], **changes} if content is None else content
    path.write_text(json.dumps(whole))
    return path


def named(*names):
    return {"arms": [{**ARM, "name": name} for name in names]}


@pytest.mark.parametrize("changes, message", [
    (named("--"), "called '--'; a name needs a letter or a digit"),
    (named("a", "A"), "arms 'a' and 'A' would share a folder"),
    (named("a\nb"), "'a\\\\nb'; it must be one line of text"),
    ({"arms": [{**ARM, "group": "\ud800"}]}, "it must be one line of text"),
    ({"sedes": [1]}, "'sedes' is no part of a study"), ({"arms": [{**ARM, "kept": {}}]}, "'kept' is no part of an arm"),
    ({"arms": [{**ARM, "factors": 3}]}, "'factors' is no part of an arm"),
    ({"seeds": [0, True]}, "'seeds' holds 'True'"), ({"seeds": [0.5]}, "holds '0.5'"), ({"seeds": [-1]}, "'-1'"),
    ({"seeds": ["a"]}, "holds 'a'"),
    ({"title": 3}, "'title' must be text"),
    ({"flags": "--lr 'a"}, "arm 'a': No closing quotation"),
    ({"flags": "--epochs x"}, "arm 'a': .*invalid int value: 'x'"),
    ({"flags": "--help"}, "arm 'a': --help trains nothing"),
    ({"flags": "--dry-run"}, "arm 'a': --dry-run is set by study.py itself"),
    ({"arms": [{**ARM, "run": "train.py --seed 3"}]}, "--seed is set by study.py"),
    ({"arms": [{**ARM, "run": "train.py --model resnet9"}]}, "arm 'a': --model.*resnet9"),
    ({"arms": [{**ARM, "run": "train.py --lr -1"}]}, "arm 'a': --lr -1.0: it must be at least"),
    ({"arms": [{**ARM, "run": "train_pruning.py --epochs 1 1 --sparsity 2"}]}, "arm 'a': .*2"),
    ({"arms": [{**ARM, "against": ["a"]}]}, "which is no arm"),
    ({"arms": [{**ARM, "keep": ["history.csv"]}]}, "it must be an object of texts"),
    ({"arms": [{**ARM, "keep": {"history.csv": "table.csv"}}]}, "keeps a file as 'table.csv', which is no name of its"),
    ({"arms": [{**ARM, "keep": {"history.csv": "../x"}}]}, "keeps a file as '../x'"),
    ({"arms": [{**ARM, "keep": {"history.csv": "x"}}, {**ARM, "name": "b", "keep": {"model.pt": "x"}}]},
     "two files are kept as 'x', by 'a' and 'b'"),
    ({"arms": [{**ARM, "keep": {"history.csv": "x", "model.pt": "x"}}]}, "two files are kept as 'x'")])
def test_names_that_collide_and_flags_that_fail_are_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        study.main([str(write_study(tmp_path, **changes))])
    assert [path.name for path in tmp_path.iterdir()] == ["small.json"]       # before any work


@pytest.mark.parametrize("factors, message", [
    ([FACTOR], "factors must be an object"), ({}, "factors must be an object"), (None, "factors must be an object"),
    ({"a": 3}, "'a' a flag and two values"), ({"a": {**FACTOR, "values": 3}}, "'a' a flag and two values"),
    ({"a": {**FACTOR, "flag": "lr"}}, "'a' a flag"), ({"a": {**FACTOR, "flag": "--lr 3"}}, "'a' a flag"),
    ({"a": {"flag": "--mixing", "values": ["none", "mixup"]}}, "factor 'a' has values that are no numbers"),
    ({"a": {**FACTOR, "values": [0.1, True]}}, "values that are no numbers"),
    ({"a": {**FACTOR, "values": [0.1, math.inf]}}, "values that are no numbers"),
    ({"a": {**FACTOR, "values": [1, 1.0]}}, "factor 'a' has a value twice"),
    ({name: {**FACTOR, "values": list(range(1, 101))} for name in "abc"}, "more than 10,000 combinations")])
def test_malformed_factors_are_refused(factors, message, tmp_path):
    content = {"flags": SHORT, "seeds": [0], "run": "train.py", "factors": factors}
    with pytest.raises(ValueError, match=message):
        study.read_study(write_study(tmp_path, content))


def test_arms_beside_factors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="factors make the arms"):
        study.read_study(write_study(tmp_path, run="train.py", factors={"a": FACTOR}))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


def partly(*right):
    """One of the right values, or anything."""
    return st.sampled_from(right) | ANYTHING


ARMS = st.lists(partly(ARM) | st.fixed_dictionaries({}, optional={
    "group": partly("g"), "name": partly("a", "b"), "run": partly("train.py", "train_pruning.py --epochs 1 1"),
    "keep": partly({}, {"a": "b"}), "against": partly("a")}), max_size=3)
STUDIES = ANYTHING | st.fixed_dictionaries({}, optional={
    "flags": partly(SHORT), "seeds": st.lists(partly(0, 1), max_size=3) | ANYTHING, "arms": ARMS | ANYTHING,
    "title": partly("t"), "run": partly("train.py"),
    "factors": ANYTHING | st.dictionaries(st.text(max_size=3), partly(FACTOR) | st.fixed_dictionaries(
        {"flag": partly("--lr"), "values": partly([1, 2])}), max_size=2)})


@settings(deadline=None, max_examples=150)
@given(content=STUDIES)
def test_json_of_any_shape_is_a_study_or_one_line(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    try:
        found = study.read_study(path)
    except ValueError as problem:
        assert str(path) in str(problem)
    else:
        folders = {study.folder_of("x", arm, seed) for arm in found["arms"] for seed in found["seeds"]}
        assert len(folders) == len(found["arms"]) * len(found["seeds"])


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.json")), ids=lambda path: path.stem)
def test_settings_are_those_that_the_script_resolves(path, monkeypatch):
    class Resolved(Exception):
        pass

    def prepare(found, state, forced=False):
        raise Resolved(found)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(experiment, "prepare", prepare)
    found = study.read_study(path)
    for arm in found["arms"][:4]:
        script, *own = shlex.split(arm["run"].replace("{seed}", "7"))
        with pytest.raises(Resolved) as resolved:
            MAINS[script]([*shlex.split(found["flags"]), *own, "--seed", "7"])
        assert study_file.settings_of(found, arm, 7) == resolved.value.args[0]


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory):
    """The folder in which a study of one run was made."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_study("studies")
        (folder / "runs").mkdir()
        train.main([*shlex.split(SHORT), "--seed", "0", "--data", "data", "--out", "runs/small-a-s0"])
        (folder / "runs/small-a-s0/finished").touch()
        study.main(["studies/small.json"])
    return folder


@pytest.mark.parametrize("changes, message", [
    ({"arms": [{**ARM, "run": "train.py --lr 0.05"}]}, "lr: 0.15 then, 0.05 now"),
    ({"flags": SHORT.replace("--batch-size 16", "")}, "batch_size: 16 then, 64 now")])
def test_a_run_with_other_settings_than_its_arm_is_refused(finished_study, changes, message, monkeypatch):
    monkeypatch.chdir(finished_study)
    before = Path("results/small/runs.csv").read_bytes()
    path = write_study("studies", **changes)
    for flags in ([], ["--finished"]):
        with pytest.raises(ValueError, match=f"runs/small-a-s0 .*arm 'a' has now .*{message}"):
            study.main([str(path), *flags])
    assert Path("results/small/runs.csv").read_bytes() == before
    study.main([str(write_study("studies"))])            # as it was: accepted, from another folder's view too
    assert len(Path("results/small/runs.csv").read_text().splitlines()) == 2


def test_two_study_files_of_one_name_are_refused(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study)
    other = write_study("other", **named("b"))
    with pytest.raises(ValueError, match="results/small holds the table of studies/small.json, not of other/small.jso"):
        study.main([str(other)])
    assert not Path("runs/small-b-s0").exists()
    study.main(["./studies/../studies/small.json"])
    Path("results/small/study.json").write_text('{"study": "gone/small.json"}')      # a file that was moved
    study.main(["studies/small.json"])
    assert json.loads(Path("results/small/study.json").read_text()) == {"study": "studies/small.json"}


def test_the_steps_of_an_l1_cycle_are_no_other_setting():
    stored = {"pruning": "l1_cycle", "epochs": [8, 2, 2], "lr": 0.1}
    assert study_file.differences(stored, {"pruning": "l1_cycle", "epochs": [8], "lr": 0.1, "new_one": 3}) == []
    assert study_file.differences(stored, {"pruning": "l1_cycle", "epochs": [9], "lr": 0.1}) == ["epochs: [8] then, "
                                                                                               "[9] now"]
