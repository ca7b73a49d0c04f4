"""Tables of settings: what they accept, and that flags, defaults, checks and resuming follow from them alone."""
import argparse
import ast
import math

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import experiment
import train
import train_pruning
from engine import commandline, settings
from engine.settings import Setting, line

TABLE = {"side": Setting(8, "pixels", low=1, high=32), "share": Setting(0.5, "a share", above=0, below=1),
         "name": Setting("a", "a word", choices=("a", "b"), clashes=((("b",), "on", (True,), "which is so"),)),
         "on": Setting(False, "a switch"), "many": Setting([1], "numbers", low=1, many="+", form=int),
         "path": Setting(None, "a file", form=str, fixed=True), "out": Setting(None, "a folder", form=str, free=True),
         "quiet": Setting(False, "say nothing", free=True), "held": Setting({}), "way": line("x", ("x", "y"))}


def parsed(*words):
    parser = commandline.training_parser("", TABLE)
    return vars(parser.parse_args(words))


def test_flags_follow_from_the_table():
    assert parsed() == {}
    assert parsed("--side", "4", "--share", "0.25", "--on", "--many", "2", "3", "--way", "y", "--quiet") == {
        "side": 4, "share": 0.25, "on": True, "many": [2, 3], "way": "y", "quiet": True}
    assert parsed("--no-on") == {"on": False}
    for words in (["--side", "4.5"], ["--name", "c"], ["--held", "1"], ["--no-quiet"], ["--many"]):
        with pytest.raises(ValueError, match=words[0]):
            parsed(*words)


def test_help_shows_the_defaults():
    shown = commandline.training_parser("", TABLE).format_help()
    for text in ("pixels (8)", "a share (0.5)", "a word (a)", "a switch (no)", "numbers (1)"):
        assert text in shown
    assert "say nothing\n" in shown and "None" not in shown and "held" not in shown


def test_defaults_are_fresh():
    one, other = settings.defaults_of(TABLE), settings.defaults_of(TABLE)
    one["many"].append(2)
    one["held"]["a"] = 1
    assert other["many"] == [1] and other["held"] == {} and TABLE["many"].default == [1]


@pytest.mark.parametrize("name, value, told", [
    ("side", 0, "--side 0: it must be at least 1 and at most 32"), ("side", 33, "--side 33: it must be at least 1"),
    ("share", 0.0, "--share 0.0: it must be above 0 and below 1"), ("share", 1, "--share 1: it must be above 0"),
    ("share", math.nan, "--share nan"), ("side", 8.0, "side 8.0: it must be a whole number"),
    ("side", True, "side True: it must be a whole number"), ("side", None, "side None"), ("side", "8", "side '8'"),
    ("on", 1, "on 1: it must be True or False"), ("name", "A", "name 'A' is unknown; choose from 'a', 'b'"),
    ("many", [1, 0], "--many 1 0: each must be at least 1"), ("many", 2, "many 2: it must be a whole number"),
    ("many", ["1"], "many"), ("path", 3, "path 3"), ("held", [], "held")])
def test_what_a_setting_may_not_be(name, value, told):
    with pytest.raises(ValueError) as problem:
        settings.check(TABLE, {**settings.defaults_of(TABLE), name: value})
    assert str(problem.value).startswith(told)


@given(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.booleans(), st.none(), st.lists(st.integers())),
       st.sampled_from(sorted(TABLE)))
def test_any_value_is_accepted_or_refused_in_one_line_that_names_it(value, name):
    try:
        settings.check(TABLE, {**settings.defaults_of(TABLE), name: value})
    except ValueError as problem:
        assert name in str(problem) and "\n" not in str(problem).replace(repr(value), "")
        return
    accepted = {"side": lambda: type(value) is int and 1 <= value <= 32,
                "share": lambda: type(value) in (int, float) and 0 < value < 1, "name": lambda: value in ("a", "b"),
                "on": lambda: type(value) is bool, "quiet": lambda: type(value) is bool,
                "many": lambda: all(type(each) is int and each >= 1 for each in value), "way": lambda: value in "xy",
                "path": lambda: value is None or type(value) is str, "out": lambda: value is None or isinstance(
                    value, str), "held": lambda: False}
    assert accepted[name](), (name, value)


def test_settings_that_do_not_go_together():
    both = {**settings.defaults_of(TABLE), "name": "b", "on": True}
    with pytest.raises(ValueError, match="--name b does not go with --on, which is so"):
        settings.check(TABLE, both)
    settings.check(TABLE, {**both, "on": False})
    settings.check(TABLE, {**both, "name": "a"})


def test_a_name_that_two_tables_have_is_refused():
    with pytest.raises(ValueError, match="two files declare the setting 'side'"):
        settings.joined(TABLE, {"side": Setting(1)})


def test_a_run_older_than_a_setting_has_its_default_and_goes_on():
    old = {"settings": {"side": 4, "lines": {}}}
    found = settings.to_resume(TABLE, old, {"way": "x"}, {"out": "r"})
    assert (found["side"], found["share"], found["way"], found["lines"]) == (4, 0.5, "x", {"way": "x"})
    assert settings.to_resume(TABLE, old, {"way": "x"}, {"out": "r", "share": 0.5})["share"] == 0.5
    with pytest.raises(ValueError, match=r"r has other settings \(way: x then, y now\)"):
        settings.to_resume(TABLE, old, {"way": "y"}, {"out": "r"})
    with pytest.raises(ValueError, match="began with path None; --path p comes too late"):
        settings.to_resume(TABLE, old, {"way": "x"}, {"out": "r", "path": "p", "force": True})


def test_a_line_that_says_something_else_now_is_told_with_the_flag_that_goes_on():
    table = {"way": line("new", ("new", "old"), fixed=True), "wide": line(True, (True, False), fixed=True),
             "out": TABLE["out"]}
    begun = {"settings": {"wide": False, "way": "old", "lines": {"wide": False, "way": "old"}}}
    with pytest.raises(ValueError, match="began with way old; --way new comes too late, .*: go on with --way old$"):
        settings.to_resume(table, begun, {"way": "new", "wide": False}, {"out": "r"})
    assert settings.to_resume(table, begun, {"way": "new", "wide": False}, {"out": "r", "way": "old"})["way"] == "old"
    with pytest.raises(ValueError, match="began with wide False; .*: go on with --no-wide$"):
        settings.to_resume(table, begun, {"way": "old", "wide": True}, {"out": "r"})
    with pytest.raises(ValueError, match="start a new run with another --out$"):
        settings.to_resume(table, begun, {"way": "old", "wide": False}, {"out": "r", "way": "new"})


# ---- the tables of this project

@pytest.mark.parametrize("script", [train, train_pruning])
def test_every_default_is_accepted_and_every_flag_has_help(script):
    defaults = settings.defaults_of(script.SETTINGS)
    for name, setting in script.SETTINGS.items():
        settings.check_value(setting, defaults[name], name)
        if defaults[name] not in (None, [], {}, "none"):
            settings.check_value(setting, defaults[name], name, line=True)
    actions = commandline.training_parser("", script.SETTINGS)._actions
    assert [action.dest for action in actions if not action.help or action.help == argparse.SUPPRESS] == []


def test_lines_are_the_defaults_of_the_tables():
    lines = commandline.lines_of(train.__file__, train.SETTINGS)
    assert lines == {name: train.DEFAULTS[name] for name in lines}


def test_train_has_the_settings_of_pruning_without_their_flags():
    assert train.DEFAULTS.keys() == train_pruning.SETTINGS.keys()
    with pytest.raises(ValueError, match="--sparsity"):
        commandline.training_parser("", train.SETTINGS).parse_args(["--sparsity", "0.5"])


def test_the_engine_knows_no_technique_by_name():
    words = {name for module in experiment.TECHNIQUES.values() for name in getattr(module, "SETTINGS", {})}
    words |= {value for name in ("mixing", "weights", "pruning", "score", "optimizer")
              for value in train_pruning.SETTINGS[name].choices} - {"none"}
    words |= {f"--{word.replace('_', '-')}" for word in words}
    words -= {"weights", "optimizer", "lr"}     # also parts of a checkpoint, and what torch calls a rate
    for path in (ROOT / "engine").glob("*.py"):
        held = {node.value for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        held -= {"run_plots": {"sparsity"}, "costs": {"macs"}}.get(path.stem, set())     # a column, and a unit
        assert path.stem == "run_files" or not held & words, (path.name, held & words)      # the form of files


# ---- a flag whose technique is off

ONLY = [(name, setting, pair) for name, setting in train_pruning.SETTINGS.items() if setting.help
        for pair in setting.only]
UNLESS = [(name, setting, pair) for name, setting in train_pruning.SETTINGS.items() if setting.help
          for pair in setting.unless]
OTHER = {float: 0.125, int: 3, bool: True, str: "a"}


def other_than_default(setting):
    """A value that a setting may have besides its default."""
    if setting.choices:
        return next(value for value in setting.choices if value != setting.default)
    value = not setting.default if setting.kind is bool else OTHER[setting.kind]
    return [value] if setting.many else value


@pytest.mark.parametrize("name, setting, pair", ONLY, ids=[f"{name}-{pair[0]}" for name, _, pair in ONLY])
def test_a_flag_says_so_where_it_changes_nothing_and_only_there(name, setting, pair):
    value, (other, values) = other_than_default(setting), pair
    rival = train_pruning.SETTINGS[other]
    wake = values or (other_than_default(rival),)
    choices = rival.choices or ((True, False) if rival.kind is bool else ())
    sleep = (*(set(choices) - set(values)), *([] if values else [rival.default]))
    assert wake and sleep
    awake = {another: theirs[0] for another, theirs in setting.only if theirs}
    for theirs in (*wake, *sleep):
        mixed = {**train.DEFAULTS, **awake, name: value, other: theirs}
        told = settings.idle(train_pruning.SETTINGS, mixed, {name: value})
        assert len(told) == (theirs in sleep)
        need = f"--{'no-' * (values == (False,))}{other}".replace("_", "-")
        assert all(sentence.startswith(f"{settings.flag_of(name, value)} ") and f"without {need}" in sentence
                   for sentence in told)
        assert settings.idle(train_pruning.SETTINGS, mixed, {}) == []


@pytest.mark.parametrize("name, setting, pair", UNLESS, ids=[f"{name}-{pair[0]}" for name, _, pair in UNLESS])
def test_a_flag_says_so_beside_a_number_that_switches_its_technique_off(name, setting, pair):
    value, (other, off) = other_than_default(setting), pair
    awake = {another: theirs[0] if theirs else other_than_default(train_pruning.SETTINGS[another])
             for another, theirs in setting.only}
    for theirs, expected in ((off, [f"{settings.flag_of(name, value)} changes nothing beside "
                                    f"{settings.flag_of(other, off)}"]), (off + 0.25, [])):
        mixed = {**train.DEFAULTS, **awake, name: value, other: theirs}
        assert settings.idle(train_pruning.SETTINGS, mixed, {name: value}) == expected


def test_numbers_that_switch_a_technique_off_are_known():
    assert {(name, other) for name, _, (other, _) in UNLESS} == {
        ("teacher", "distillation_weight"), ("teacher_views", "distillation_weight"),
        ("temperature", "distillation_weight"), ("mixing", "mix_probability"), ("mix_alpha", "mix_probability"),
        ("mix_per_sample", "mix_probability"), ("mixing", "mix_alpha"), ("mix_probability", "mix_alpha"),
        ("mix_per_sample", "mix_alpha"), ("resize", "resize_until")}


def test_settings_that_belong_to_a_technique_are_marked_in_its_table():
    marked = {name: setting for name, setting, _ in ONLY}
    assert {"weight_bits", "muon_lr", "mix_alpha", "resize_until", "temperature", "morph_budget", "filter_stop",
            "stop_loss", "prune_end", "minimum_density", "binary_scale", "ema_decay", "peak"} <= marked.keys()
    assert marked["prune_end"].only == (("pruning", ("polynomial", "constant")),)       # its own mark, not the table's
    assert not marked.keys() & {"lr", "momentum", "epochs", "batch_size", "weights", "groups"}
