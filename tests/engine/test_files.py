"""Files that several processes write at once."""
import select
import subprocess
import sys

import pytest
from conftest import ROOT

from engine import files

MERGES = """
import sys
from engine import files
for number in range(20):
    files.merge_json(sys.argv[1], {f"{sys.argv[2]}{number}": number})
"""


def test_processes_that_write_one_report_at_once_lose_nothing_of_each_other(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    writers = [subprocess.Popen([sys.executable, "-c", MERGES, str(tmp_path / "report.json"), name], cwd=ROOT)
               for name in "abc"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    held = files.read_json(tmp_path / "report.json")
    assert held == {f"{name}{number}": number for name in "abc" for number in range(20)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "report.json"]


def test_a_report_is_written_where_no_run_is(tmp_path):
    files.merge_json(tmp_path / "report.json", {"a": 1})
    files.merge_json(tmp_path / "report.json", {"b": 2})
    assert files.read_json(tmp_path / "report.json") == {"a": 1, "b": 2}


# ---- locks

HOLDS = """
import os, sys
from engine import files
with files.locked(sys.argv[1], create=True):
    print("held", flush=True)
    sys.stdin.read()
    if sys.argv[2] == "renamed":
        os.replace(sys.argv[1], sys.argv[1] + ".whole")
"""


def begin(path, way="kept"):
    """A process that holds the lock on `path` from when it says so until its input ends."""
    return subprocess.Popen([sys.executable, "-c", HOLDS, str(path), way], cwd=ROOT, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def waits(process):
    """Whether a process has not come to hold its lock after a while."""
    return not select.select([process.stdout], [], [], 3)[0]


@pytest.mark.parametrize("way", ["kept", "renamed"])
def test_a_second_process_waits_and_then_holds_the_file_that_stands_there(tmp_path, way):
    first = begin(tmp_path / "a", way)
    assert first.stdout.readline() == "held\n"
    second = begin(tmp_path / "a")
    assert waits(second)
    first.communicate()
    assert second.stdout.readline() == "held\n" and (tmp_path / "a").exists()
    third = begin(tmp_path / "a")
    assert waits(third)
    second.communicate()
    assert third.communicate()[0] == "held\n"
    assert (tmp_path / "a.whole").exists() == (way == "renamed")


def test_nobody_waits_for_a_file_that_is_not_there(tmp_path):
    with files.locked(tmp_path / "a"), files.locked(tmp_path / "a"):
        assert not list(tmp_path.iterdir())
