"""The Makefile's commands for a GPU: a Python of one's own, one run, nine minutes."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

TARGETS = ["gpu-check", "headline-speed", "headline", "headline-table", "demo"]


def make(folder, *arguments):
    """(exit code, what it prints) of make in a folder that has the project's Makefile and nothing else."""
    shutil.copy(ROOT / "Makefile", folder)
    own = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=own)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_python_of_ones_own_needs_no_registry(target, tmp_path):
    code, printed = make(tmp_path, "-n", target, "RUN=python3")
    assert code == 0 and "python3 " in printed
    assert "pip" not in printed and ".venv" not in printed
    (tmp_path / "requirements.txt").touch()
    code, printed = make(tmp_path, "-n", target)
    assert code == 0 and "-m pip install" in printed and ".venv/bin/python " in printed


def test_one_arm_and_one_seed_are_one_command(tmp_path):
    name = "ResNet-20 12-24-48, 3 bits, 25 % pruned, distilled"
    _, printed = make(tmp_path, "-n", "headline", "RUN=python3", f"ARM={name}", "SEED=3")
    assert "9m python3 study.py studies/headline.json --arms" in printed
    words = shlex.split(printed.split(";")[0].replace("\\\n", ""))
    assert words[words.index("--arms"):] == ["--arms", name, "--seeds", "3"]
    _, printed = make(tmp_path, "-n", "headline", "RUN=python3")
    assert "--arms" not in printed and "--seeds" not in printed


def test_a_command_ends_in_time_and_says_that_it_goes_on(tmp_path):
    begun = time.monotonic()
    (tmp_path / "study.py").write_text("import time\ntime.sleep(60)\n")
    code, printed = make(tmp_path, "--silent", "headline", f"RUN={sys.executable}", "MINUTES=0.01")
    assert code == 0 and "stopped after 0.01 minutes: the same command resumes" in printed
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_command_that_ends_earlier_keeps_its_exit_code(left, tmp_path):
    (tmp_path / "study.py").write_text(f"raise SystemExit({left})\n")
    code, printed = make(tmp_path, "--silent", "headline", f"RUN={sys.executable}")
    assert (code == 0) == (left == 0) and "goes on" not in printed


@pytest.mark.parametrize("settings, kept", [({"dataset": "digits", "epochs": [4, 2, 5]}, False),
                                            ({"dataset": "digits", "epochs": [30]}, True),
                                            ({"dataset": "cifar10", "epochs": [4, 2, 5]}, True), (None, True)])
def test_a_demo_replaces_a_demo_alone(settings, kept, tmp_path):
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    if settings:
        (run / "config.json").write_text(json.dumps({"settings": settings}, indent=1))
    code, printed = make(tmp_path, "demo", "RUN=true")
    assert run.exists() == kept and (code != 0) == kept
    assert ("error: runs/demo holds something else than a demo; move it away" in printed) == kept


def test_ctrl_c_reaches_what_make_runs(tmp_path):
    """As from a terminal: the foreground's group of processes hears it, and `timeout` must leave study.py in it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "study.py").write_text("""
import pathlib, signal, time
signal.signal(signal.SIGINT, lambda *given: pathlib.Path("heard").touch())
pathlib.Path("begun").touch()
while not pathlib.Path("heard").exists():
    time.sleep(0.05)
""")
    own = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    process = subprocess.Popen(["make", "headline", f"RUN={sys.executable}"], cwd=tmp_path, env=own,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(30)
    while not (tmp_path / "heard").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "heard").exists()
