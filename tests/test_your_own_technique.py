"""docs/your-own-technique.md: what it says is done to a copy of the project, and both techniques train."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from sample_runs import ROOT

from engine import checkpoint

PAGE = (ROOT / "docs/your-own-technique.md").read_text()
TINY = ["--dataset", "digits", "--limit", "32", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--compile",
        "off", "--model", "lenet5-student"]      # two steps


def code_in(section):
    """The code blocks below a heading of the page."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0],
                      re.MULTILINE | re.DOTALL)


def below_the_last(path, start, text):
    """Write a text below the last line of a file that starts so."""
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith(start))
    path.write_text("".join([*lines[:last + 1], text, *lines[last + 1:]]))


def activate(path, group, value):
    """Move the # of a group's lines."""
    text = re.sub(rf"^({group} = )", r"# \1", path.read_text(), flags=re.MULTILINE)
    assert f'\n# {group} = "{value}"' in text
    path.write_text(text.replace(f'\n# {group} = "{value}"', f'\n{group} = "{value}"'))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with what the page says done to it."""
    folder = tmp_path_factory.mktemp("own") / "project"
    shutil.copytree(ROOT, folder, ignore=lambda parent, names: [
        name for name in names if parent == str(ROOT) and name not in ("engine", "models", "deploy", "benchmarks")
        and not name.endswith(".py") or name == "__pycache__"])
    file, line = code_in("A mixing")
    (folder / "set_stack_train.py").write_text(file)
    for script in ("train.py", "train_pruning.py"):
        below_the_last(folder / script, "# MIXING = ", line)
    function, line = code_in("A score")
    text = (folder / "pruning.py").read_text()
    assert "below `lamp_scores`" in PAGE and text.count("\n\n\nSCORES = ") == 1
    (folder / "pruning.py").write_text(text.replace("\n\n\nSCORES = ", f"\n\n\n{function.rstrip()}\n\n\nSCORES = "))
    below_the_last(folder / "train_pruning.py", "# SCORE = ", line)
    file, lines = code_in("A network")
    (folder / "models/narrow.py").write_text(file)
    first, second, third = lines.splitlines(keepends=True)
    below_the_last(folder / "models/__init__.py", "from models", first)
    below_the_last(folder / "models/__init__.py", '    "wrn-16-4": ', second)
    text = (folder / "models/__init__.py").read_text()
    (folder / "models/__init__.py").write_text(text.replace("    return WideResNet", f"{third}    return WideResNet"))
    return folder


def call(project, calls):
    """[error or None] of mains called one after the other, [script, words] each, in one process in the copy."""
    program = f"""
import importlib, json
found = []
for script, words in {calls!r}:
    try:
        found.append(importlib.import_module(script).main(words))
    except ValueError as problem:
        found.append(str(problem))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=project, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_of(out):
    """(settings, rows of history.csv) of a run."""
    return (json.loads((out / "config.json").read_text())["settings"],
            list(csv.DictReader((out / "history.csv").read_text().splitlines())))


def test_a_mixing_is_one_file_and_one_line(project, tmp_path):
    flags = {"none": ["--mixing", "none"], "own": ["--mixing", "stack", "--stack-least", "0.4"],
             "far": ["--stack-least", "0.5"], "typed": ["--mixing", "stak"]}
    *fine, far, typed = call(project, [["train", [*TINY, "--mix-probability", "1", *words, "--out",
                                                  str(tmp_path / name)]] for name, words in flags.items()])
    assert fine == [None, None] and far == "--stack-least 0.5: it must be at least 0 and below 0.5"
    assert "'stak'" in typed and "stack" in typed
    (plain, before), (settings, rows) = (run_of(tmp_path / name) for name in ("none", "own"))
    assert (settings["mixing"], settings["stack_least"], plain["stack_least"]) == ("stack", 0.4, 0.1)
    assert rows[0]["train_loss"] != before[0]["train_loss"]


def test_both_lines_are_active_in_one_run_that_is_resumed(project, tmp_path):
    activate(project / "train_pruning.py", "MIXING", "stack")
    activate(project / "train_pruning.py", "SCORE", "filter")
    resume = ["--resume", "--out", str(tmp_path / "run")]
    *fine, changed = call(project, [["train_pruning", words] for words in (
        [*TINY, "--epochs", "1", "1", "--sparsity", "0.7", *resume[1:]], resume, [*resume, "--stack-least", "0.3"])])
    assert fine == [None, None] and "stack_least: 0.1 then, 0.3 now" in changed
    settings, rows = run_of(tmp_path / "run")
    assert (settings["mixing"], settings["score"]) == ("stack", "filter") and settings["lines"]["score"] == "filter"
    assert len(rows) == 2 and float(rows[1]["sparsity"]) == pytest.approx(0.7, abs=1e-3)


def test_a_network_trains_loses_channels_and_weights_and_is_counted(project, tmp_path):
    tiny = [*TINY[:-1], "narrow", "--mixing", "none"]
    shrunk, sparse = str(tmp_path / "shrunk"), str(tmp_path / "sparse")
    assert call(project, [
        ["train_pruning", [*tiny, "--pruning", "filters", "--filter-interval", "1", "--filter-threshold", "0.9",
                           "--filter-stop", "1", "--out", shrunk]],
        ["train_pruning", [*tiny, "--epochs", "1", "1", "--sparsity", "0.5", "--out", sparse]],
        *(["profil", ["--checkpoint", f"{out}/model.pt", "--csv", f"{out}/layers.csv"]] for out in (shrunk, sparse)),
        ["export", ["--checkpoint", f"{shrunk}/model.pt", "--out", f"{shrunk}/model.onnx"]],
        ["test", ["--checkpoint", f"{shrunk}/model.pt"]],
        ["train", [*tiny, "--activation", "gelu", "--out", str(tmp_path / "other")]]]) == [None] * 6 + [
        "--activation gelu: narrow has no activation to choose; leave it out"]
    small, half = (checkpoint.read(f"{out}/model.pt")["weights"] for out in (shrunk, sparse))
    assert len(small["conv1.weight"]) < 32 == len(half["conv1.weight"]) and len(small["conv2.weight"]) < 64
    weights = torch.cat([half[name].flatten() for name in ("conv1.weight", "conv2.weight", "linear.weight")])
    assert (weights == 0).sum() / len(weights) == pytest.approx(0.5, abs=1e-3)
    assert (tmp_path / "shrunk/layers.csv").exists()


def test_two_files_of_one_setting_are_refused(project, tmp_path):
    shutil.copytree(project, tmp_path / "copy")
    text = (tmp_path / "copy" / "set_stack_train.py").read_text()
    (tmp_path / "copy" / "set_stack_train.py").write_text(text.replace('"stack_least"', '"lr"'))
    done = subprocess.run([sys.executable, "train.py", *TINY, "--dry-run"], cwd=tmp_path / "copy", text=True,
                          capture_output=True)
    assert done.returncode != 0 and "two files declare the setting 'lr'" in done.stderr


def test_a_flag_of_ones_own_mixing_says_so_while_another_one_is_active(project, tmp_path):
    done = subprocess.run([sys.executable, "train.py", *TINY, "--mixing", "none", "--stack-least", "0.4", "--dry-run"],
                          cwd=project, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stderr == "note: --stack-least 0.4 changes nothing without --mixing stack\n"
