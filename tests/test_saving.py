"""Saving: whole or not at all, on full disks, through kills and Ctrl-C."""
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from engine import checkpoint, files

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, *arguments):
    """A fresh Python that runs `code`, with the default Ctrl-C."""
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# ---- saving fails

def assert_refused_and_intact(path, action, needed):
    """`action` raises one error that names `needed` bytes; the old file at `path` is whole and alone."""
    before = path.read_bytes()
    with pytest.raises(RuntimeError) as problem:
        action()
    message = str(problem.value)
    assert f"{needed:,} bytes are needed" in message and path.name in message and "intact" in message
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    return message


def size_of(state):
    """Bytes of a checkpoint's file."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "a.pt", state)
        return (Path(folder) / "a.pt").stat().st_size


@pytest.mark.parametrize("count", [10, 100_000])
def test_full_disk_keeps_the_old_file(tmp_path, count):
    path, new = tmp_path / "last.pt", {"a": torch.ones(count)}
    checkpoint.save(path, {"epoch": 1})
    (tmp_path / "last.pt.partial").symlink_to("/dev/full")
    message = assert_refused_and_intact(path, lambda: checkpoint.save(path, new, tmp_path / "previous.pt"),
                                        size_of(new))
    assert "No space left on device" in message


def limited_to(size, action):
    """Do `action` while no file may grow beyond `size` bytes."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 1000, 300_000])
def test_save_cut_off_by_the_system_keeps_the_old_file(tmp_path, size):
    path, new = tmp_path / "last.pt", {"a": torch.ones(100_000)}
    checkpoint.save(path, {"epoch": 1})
    message = assert_refused_and_intact(
        path, lambda: limited_to(size, lambda: checkpoint.save(path, new, tmp_path / "previous.pt")), size_of(new))
    assert "File too large" in message


def test_full_disk_without_hard_links_leaves_no_temporary_file(tmp_path, monkeypatch):
    """The old file, which must be copied, is larger than the new one, and only the copy does not fit."""
    path, new = tmp_path / "last.pt", {"epoch": 2}
    checkpoint.save(path, {"a": torch.ones(100_000)})
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    assert_refused_and_intact(
        path, lambda: limited_to(50_000, lambda: checkpoint.save(path, new, tmp_path / "previous.pt")), size_of(new))


def test_what_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    path, new = tmp_path / "last.pt", {"epoch": 2}
    checkpoint.save(path, {"epoch": 1})
    needed, honest = size_of(new), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (honest(self)[:-1] + b"x" if "partial" in self.name
                                                          else honest(self)))
    message = assert_refused_and_intact(path, lambda: checkpoint.save(path, new), needed)
    assert "read back" in message


def test_first_save_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "last.pt.partial").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match="bytes are needed") as problem:
        checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    assert "intact" not in str(problem.value)
    assert os.listdir(tmp_path) == []


def test_save_below_a_file_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((RuntimeError, OSError), match="file"):
        checkpoint.save(tmp_path / "file" / "last.pt", {"epoch": 1})


# ---- interrupted saves

SAVES = """
import sys, torch
from engine import checkpoint
path = sys.argv[1]
print("ready", flush=True)
for epoch in range(2, 10**6):
    checkpoint.save(path + "/last.pt", {"epoch": epoch, "a": torch.full((3_000_000,), float(epoch))},
                    path + "/previous.pt")
"""


def test_killed_while_saving_leaves_whole_files(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1, "a": torch.ones(10)})
    process = run_python(SAVES, tmp_path)
    process.stdout.readline()
    while not (tmp_path / "last.pt.partial").exists():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for path in {tmp_path / "last.pt", *tmp_path.glob("previous.pt")}:
        state = checkpoint.read(path)
        assert bool((state["a"] == state["epoch"]).all())
    files.remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"last.pt", "previous.pt"}


STOPPED = """
import os, signal, sys, torch
from engine import checkpoint
def at(real, point):
    def call(*arguments):
        if sys.argv[2] == point:
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        return real(*arguments)
    return call
os.fsync = at(os.fsync, "sync")
os.replace = at(os.replace, "rename")
os.link = at(os.link, "link")
try:
    checkpoint.save(sys.argv[1] + "/last.pt", {"epoch": 2}, sys.argv[1] + "/previous.pt")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("point", ["sync", "link", "rename"])
def test_killed_at_each_step_of_a_save(tmp_path, point):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    process = run_python(STOPPED, tmp_path, point, "SIGKILL")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.read(tmp_path / "last.pt")["epoch"] == 1
    assert list(tmp_path.glob("*.partial"))
    files.remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"last.pt", "previous.pt"}


def interrupting(monkeypatch, name, count=1):
    """Make os.<name> press Ctrl-C `count` times before it does its work."""
    real = getattr(os, name)

    def call(*arguments):
        for _ in range(count):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)
    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name, count", [("fsync", 1), ("link", 1), ("replace", 2)])
def test_ctrl_c_waits_for_the_save(tmp_path, monkeypatch, name, count):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    interrupting(monkeypatch, name, count)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "last.pt", {"epoch": 2}, tmp_path / "previous.pt")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert checkpoint.read(tmp_path / "last.pt")["epoch"] == 2
    assert checkpoint.read(tmp_path / "previous.pt")["epoch"] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_ctrl_c_in_another_process_waits_for_the_save(tmp_path):
    checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    process = run_python(STOPPED, tmp_path, "sync", "SIGINT")
    output, errors = process.communicate()
    assert (process.returncode, output, errors) == (0, "interrupted\n", "")
    assert checkpoint.read(tmp_path / "last.pt")["epoch"] == 2
    assert checkpoint.read(tmp_path / "previous.pt")["epoch"] == 1


def test_ctrl_c_that_the_program_ignores_stays_ignored(tmp_path, monkeypatch):
    interrupting(monkeypatch, "replace")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        checkpoint.save(tmp_path / "last.pt", {"epoch": 1})
    except KeyboardInterrupt:
        pytest.fail("an ignored Ctrl-C interrupted")
    finally:
        signal.signal(signal.SIGINT, handler)
