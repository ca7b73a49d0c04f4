"""Technique lines, recipes, flags: what a run is asked for, and what is refused before it trains."""
import importlib.util
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from sample_runs import run_script

import set_pruning_train
import train
import train_pruning
from engine import checkpoint, commandline

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--dataset", "digits", "--device", "cpu", "--compile", "off"]
GROUPS = ("model", "groups", "shuffle", "mixing", "weights", "schedule", "averaging")


def dry_run(main, capsys, *flags):
    """The settings that `main` prints for these flags."""
    main([*SHORT, "--dry-run", "--batch-size", "2", "--limit", "4", *flags])
    printed = capsys.readouterr().out
    return json.loads(printed[printed.index("{\n"):])


# ---- technique lines

def read_lines(path):
    """The lines of a script, checked by its own table of settings."""
    return commandline.read_lines(path, {"train.py": train, "train_pruning.py": train_pruning}[path.name].SETTINGS)


def commented_lines(script):
    """[(group, value as text)] of the lines that are not active."""
    block = (ROOT / script).read_text().split("# ---- techniques", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^# ([A-Z]+) = (\S+)", block, re.MULTILINE)


def activate(text, group, value):
    """The script's text with the line `group = value` active in place of the one that was."""
    text = re.sub(rf"^({group} = )", r"# \1", text, flags=re.MULTILINE)
    return text.replace(f"# {group} = {value} ", f"{group} = {value} ").replace(f"# {group} = {value}\n",
                                                                               f"{group} = {value}\n")


def load_script(path, monkeypatch):
    """A copied script as a module."""
    spec = importlib.util.spec_from_file_location(f"edited_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# networks are built alike in both scripts, whose lines are the same (below); the large ones run in one of them
LARGE = ("resnet34", "resnet50", "resnet101", "resnet152", "resnet110", "wrn-16-4", "wrn-28-10")
LINES = [(script, group, value) for script in ("train.py", "train_pruning.py")
         for group, value in commented_lines(script) if script == "train.py" or value.strip('"') not in LARGE]


@pytest.mark.parametrize(("script", "group", "value"), LINES)
def test_every_commented_line_runs_when_it_is_active(script, group, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edited = tmp_path / script
    text = (ROOT / script).read_text()
    if group.lower() not in GROUPS[:3]:                        # a small network, by its line as well
        text = activate(text, "MODEL", '"resnet20"')
    edited.write_text(activate(text, group, value))
    active = read_lines(edited)[0]
    assert repr(active[group.lower()]).replace("'", '"') == value
    masked = script == "train_pruning.py" and active["pruning"] not in set_pruning_train.SHRINKING
    one_round = script == "train.py" or active["pruning"] in ("filters", "l1_cycle")
    rounds = ["1"] if one_round else ["1", "1"]
    size = ["4", "2"] if group == "MODEL" else ["16", "8"]           # two steps
    load_script(edited, monkeypatch).main([*SHORT, "--epochs", *rounds, "--limit", size[0], "--batch-size", size[1],
                                           "--out", "run", *(["--sparsity", "0.7"] if masked else [])])
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert {name: settings[name] for name in active} == active
    state = checkpoint.read(tmp_path / "run" / "model.pt")
    built = state["architecture"]
    assert [built["name"], *([built["groups"], built["shuffle"]] if "groups" in built else [])] == [
        active[name] for name in GROUPS[:3 if "groups" in built else 1]]
    last = checkpoint.read(tmp_path / "run" / "last.pt")
    assert (last["average"] is None) == (active["averaging"] == "none")
    assert len(last["history"]) >= len(rounds) and all(math.isfinite(row["train_loss"]) for row in last["history"])
    zeros = sum(int((weight == 0).sum()) for name, weight in state["weights"].items() if name in last["masks"])
    total = sum(mask.numel() for mask in last["masks"].values())
    assert zeros == (round(0.7 * total) if masked else 0)


@pytest.mark.parametrize("script", ["train.py", "train_pruning.py"])
def test_lines_offer_every_choice_and_one_is_active(script):
    active, choices = read_lines(ROOT / script)
    assert set(GROUPS) <= set(active)
    assert all(active[group.lower()] == values[0] and len(values) > 1 for group, values in choices.items())
    assert choices["MODEL"][:5] == ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert {"lenet5", "lenet5-student", "cifar-quick", "mobilenet", "resnet20", "resnet56"} <= set(choices["MODEL"])
    assert choices["GROUPS"] == [8, 4, 1] and choices["SCHEDULE"] == ["one-cycle", "cosine", "plateau"]


def test_both_scripts_have_the_same_lines_for_training():
    (active, choices), (more, more_choices) = (read_lines(ROOT / script)
                                               for script in ("train.py", "train_pruning.py"))
    assert active == {group: more[group] for group in active}
    assert choices == {group: more_choices[group] for group in choices}
    assert set(more) - set(active) == {"pruning", "score"}


@pytest.mark.parametrize(("script", "group"), sorted({line[:2] for line in LINES}))
def test_two_or_no_active_lines_are_refused_with_the_group_and_its_choices(script, group, tmp_path, monkeypatch):
    text, edited = (ROOT / script).read_text(), tmp_path / script
    choices = read_lines(ROOT / script)[1][group]
    none = re.sub(rf"^({group} = )", r"# \1", text, flags=re.MULTILINE)
    both = re.sub(rf"^# ({group} = )", r"\1", text, count=1, flags=re.MULTILINE)
    for changed, count in ((none, 0), (both, 2)):
        edited.write_text(changed)
        with pytest.raises(ValueError, match=f"{script} has {count} active {group} lines") as error:
            read_lines(edited)
        assert all(repr(choice) in str(error.value) for choice in choices)
        with pytest.raises(ValueError, match=f"{count} active {group}"):
            load_script(edited, monkeypatch).main([*SHORT, "--dry-run"])


def edited(tmp_path, script, *changes):
    """A copy of the scripts in which `script` has its lines changed: (old, new), each of which must be there."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("engine", "models", "deploy"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / script).read_text()
    for old, new in changes:
        assert re.search(old, text, re.MULTILINE), old
        text = re.sub(old, new, text, count=1, flags=re.MULTILINE)
    (tmp_path / script).write_text(text)
    return tmp_path / script


def test_a_line_commented_without_a_space_is_still_a_choice(tmp_path):
    """As many editors comment a line."""
    script = edited(tmp_path, "train.py", ("^MIXING = ", "#MIXING = "), ("^# MIXING = ", "#MIXING = "))
    with pytest.raises(ValueError, match="train.py has 0 active MIXING lines.*'cutmix', 'mixup', 'cutout', 'none'"):
        read_lines(script)


def test_two_active_lines_from_the_shell(tmp_path):
    script = edited(tmp_path, "train_pruning.py", ("^# GROUPS = 1 ", "GROUPS = 1 "))
    code, line = run_script(script.name, *SHORT, "--out", tmp_path / "run", folder=tmp_path)
    assert code == 2 and "2 active GROUPS lines" in line and "8, 4, 1" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train.main, train_pruning.main])
def test_flags_override_lines(main, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = dry_run(main, capsys)
    assert [lines[group] for group in GROUPS] == ["resnet18", 8, True, "cutmix", "float", "one-cycle", "ema"]
    flags = dry_run(main, capsys, "--model", "resnet34", "--groups", "4", "--no-shuffle", "--mixing", "none",
                    "--weights", "binary", "--schedule", "cosine", "--averaging", "none")
    assert [flags[group] for group in GROUPS] == ["resnet34", 4, False, "none", "binary", "cosine", "none"]
    assert flags["lines"] == lines["lines"]


@pytest.mark.parametrize("main", [train.main, train_pruning.main])
@pytest.mark.parametrize("name", ["resnet32", "wrn-16-2", "resnet8-4-6-8"])
def test_networks_without_a_line_of_their_own_are_chosen_by_flag(main, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dry_run(main, capsys, "--model", name)["model"] == name


@pytest.mark.parametrize("flags", [["--mixing", "mixdown"], ["--model", "resnet19"], ["--schedule", "step"],
                                   ["--averaging", "mean"], ["--groups", "eight"], ["--groups", "3"]])
def test_flags_with_another_value_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=flags[1]):
        train.main([*SHORT, "--dry-run", *flags])


# ---- settings

def test_published_recipe_is_the_original_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, given = train_pruning.main, [*SHORT, "--dry-run", "--limit", "40"]
    main([*given, "--recipe", "published"])
    printed = capsys.readouterr().out
    settings = json.loads(printed[printed.index("{\n"):])
    expected = {"batch_size": 32, "lr": 0.01, "momentum": 0.5, "nesterov": False, "weight_decay": 1e-5,
                "label_smoothing": 0.0, "mixing": "cutmix", "mix_probability": 1.0, "mix_alpha": 1.0,
                "schedule": "plateau", "averaging": "none", "shuffle": False, "groups": 8, "model": "resnet18",
                "epochs": [100, 25, 125], "sparsity": [0.7, 0.7], "recipe": "published"}
    assert {name: settings[name] for name in expected} == expected
    flags = dry_run(main, capsys, "--recipe", "published", "--lr", "0.02", "--shuffle", "--averaging", "ema")
    assert (flags["lr"], flags["shuffle"], flags["averaging"]) == (0.02, True, "ema")


def test_published_recipe_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    passes = []

    def evaluate(model, batches, device, dtype):
        passes.append(batches)
        return 2.5, 10.0
    monkeypatch.setattr(train, "evaluate", evaluate)
    train.main([*SHORT, "--recipe", "published", "--epochs", "1", "--limit", "64", "--out", "run"])
    state = checkpoint.read("run/last.pt")
    group = state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.01, 0.5, False, 1e-5)
    assert state["average"] is None and state["schedule"]["best"] == 2.5
    assert len(passes) == 3 and isinstance(passes[0], torch.utils.data.DataLoader)       # after training: four passes
    assert len(passes[0].dataset) == 64 and passes[1] is passes[2] is not passes[0]


@pytest.mark.parametrize("recipe", ["ours", "published"])
def test_batch_larger_than_the_set_is_refused_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="batch size 32 is larger than the 16 training images"):
        train.main([*SHORT, "--recipe", recipe, "--epochs", "1", "--limit", "16", "--batch-size", "32", "--out", "run"])
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("flag", ["--mix-alpha", "--mix-probability", "--lr", "--weight-decay", "--label-smoothing"])
def test_settings_that_are_not_finite_are_refused(flag, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{flag} {value}"):
        train.main([*SHORT, "--dry-run", "--limit", "4", "--batch-size", "2", flag, value])


@pytest.mark.parametrize("main", [train.main, train_pruning.main])
def test_dry_run_writes_nothing(main, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dry_run(main, capsys, "--out", "there", "--data", "data")
    assert settings["out"] == "there" and settings["dry_run"] is True
    assert not list(tmp_path.rglob("*"))


def test_dry_run_says_how_long_it_will_take(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_pruning.main([*SHORT, "--dry-run", "--limit", "64", "--batch-size", "32"])
    printed = capsys.readouterr().out
    assert "64 images an epoch, 100 + 25 + 125 epochs" in printed
    assert re.search(r"estimated time for all rounds: [\d.]+ min at \d+ images/s", printed)
