"""Checkpoints: exact, whole or refused, never able to run code."""
import gzip
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import same
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import small_network
from torch import nn

import checkpoint
from resnet_factorized import build

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool, torch.complex64]


def random_tensor(dtype, shape, seed):
    """Every bit at random, so NaN, infinity and -0 too; for bool just 0 and 1."""
    size = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).view(shape)


@cache
def whole_file(kind):
    """(bytes of a plain or compact file, what it holds)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        (checkpoint.save if kind == "plain" else checkpoint.save_compact)(path, small_network())
        return path.read_bytes(), checkpoint.read(path)


def read_bytes(content, name="a.pt"):
    """What `read` makes of a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return checkpoint.read(path)


def refusal(path):
    """The message of the ValueError that reading `path` raises, which is one line or more."""
    with pytest.raises(ValueError) as problem:
        checkpoint.read(path)
    return str(problem.value)


def run_python(code, *arguments):
    """A fresh Python that runs `code`, with the default Ctrl-C."""
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen([sys.executable, "-c", start + code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# ---- exact

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**31)),
                max_size=4))
def test_reads_back_every_bit(tensors):
    state = {"weights": {str(index): random_tensor(*form) for index, form in enumerate(tensors)},
             "epoch": 3, "history": [{"loss": 0.25, "name": "a"}], "average": None}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "a.pt", state)
        assert same(checkpoint.read(Path(folder) / "a.pt"), {"format": checkpoint.FORMAT, **state})
        assert os.listdir(folder) == ["a.pt"]


def test_weights_are_those_of_the_model_and_no_view_of_them(tmp_path):
    model = build(groups=64)
    checkpoint.save(tmp_path / "a.pt", checkpoint.network_of(model, {"groups": 64}))
    weights = checkpoint.weights_of(model)
    with torch.no_grad():
        model.linear.bias.add_(1)
    assert same(checkpoint.read(tmp_path / "a.pt")["weights"], weights)


def test_transposed_and_shared_tensors_read_back(tmp_path):
    big = torch.arange(60.0).view(3, 4, 5)
    weights = {"turned": big.permute(2, 0, 1), "part": big[1], "last": torch.ones(2, 8, 3, 3).to(
        memory_format=torch.channels_last)}
    checkpoint.save(tmp_path / "a.pt", {"weights": weights})
    assert same(checkpoint.read(tmp_path / "a.pt")["weights"], weights)


def test_previous_is_the_one_before(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in range(4):
        checkpoint.save(last, {"epoch": epoch}, previous)
        assert checkpoint.read(last)["epoch"] == epoch
        assert previous.exists() == (epoch > 0)
        assert epoch == 0 or checkpoint.read(previous)["epoch"] == epoch - 1
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


def test_previous_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    for epoch in range(3):
        checkpoint.save(tmp_path / "last.pt", {"epoch": epoch}, tmp_path / "previous.pt")
    assert checkpoint.read(tmp_path / "last.pt")["epoch"] == 2
    assert checkpoint.read(tmp_path / "previous.pt")["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


# ---- damaged

@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["plain", "compact"]), st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(kind, position, bit):
    content, state = whole_file(kind)
    flipped = bytearray(content)
    flipped[position % len(content)] ^= 1 << bit
    try:
        found = read_bytes(bytes(flipped))
    except ValueError:
        return
    assert same(found, state)


def test_every_flipped_bit_of_a_directory_entry_is_refused_or_changes_nothing():
    """zipfile's checksums do not cover the directory at the end of the file, which torch.load believes."""
    content, state = whole_file("plain")
    start, wrong = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0")), []
    for position in range(start, content.index(b"PK", start + 4)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            try:
                if not same(read_bytes(bytes(flipped)), state):
                    wrong.append((position - start, bit))
            except ValueError:
                pass
    assert not wrong, f"read with other tensors after a flip of (byte, bit): {wrong}"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["plain", "compact"]), st.integers(0, 10**6))
def test_truncated_anywhere_is_refused(kind, length):
    content, _ = whole_file(kind)
    with pytest.raises(ValueError):
        read_bytes(content[:length % len(content)])


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x1f\x8b", b"\x1f\x8b\x08\0\0\0\0\0\0\xff"]))
def test_arbitrary_bytes_are_refused(content, start):
    with pytest.raises(ValueError):
        read_bytes(start + content)


@pytest.mark.parametrize("position", [0.3, 0.5, 0.8])
def test_damage_in_a_tensor_names_the_member(tmp_path, position):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"weights": {"a": torch.ones(5000), "b": torch.ones(5000), "c": torch.ones(5000)}})
    with zipfile.ZipFile(path) as archive:
        inside = int(position * path.stat().st_size)
        member = [entry for entry in archive.infolist() if entry.header_offset < inside][-1].filename
    content = bytearray(path.read_bytes())
    content[inside] ^= 1
    path.write_bytes(content)
    message = refusal(path)
    assert "model.pt" in message and "damaged" in message and member in message


@pytest.mark.parametrize("content, told", [
    (b"", "empty"),
    (gzip.compress(b""), "empty"),
    (b"<!DOCTYPE html>\n<html><body>404</body>", "<!DOCTYPE html>"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "version https://git-lfs"),
    (b"\n", "starts with"),
    (pickle.dumps({"a": 1}), "starts with"),
    (b"\xff\xfe\x00", "starts with"),
])
def test_what_is_no_checkpoint_is_told(tmp_path, content, told):
    (tmp_path / "model.pt").write_bytes(content)
    message = refusal(tmp_path / "model.pt")
    assert told in message and str(tmp_path / "model.pt") in message and "\n" not in message


def test_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    assert "no checkpoint" in refusal(tmp_path / "a.pt")


def test_absent_file_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*nothing\.pt"):
        checkpoint.read(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("state", [{}, {"weights": {}}, {"format": "1"}, [1, 2], torch.ones(2)])
def test_a_torch_file_without_format_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    assert "is not a checkpoint of this project" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("weights", [3, torch.ones(2), ["a"], {"a": {}}, {"a": {"shape": [2], "kept": 1}},
                                     {"a": {"shape": [9], "kept": torch.zeros(1, dtype=torch.uint8),
                                            "values": torch.ones(1)}}])
def test_weights_of_another_form_are_refused(tmp_path, weights):
    torch.save({"format": 1, "weights": weights}, tmp_path / "a.pt")
    assert "a.pt" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("compressed", [False, True])
def test_newer_format_names_both(tmp_path, compressed):
    buffer = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT + 41, "weights": {}}, buffer)
    (tmp_path / "a.pt").write_bytes(gzip.compress(buffer.getvalue()) if compressed else buffer.getvalue())
    message = refusal(tmp_path / "a.pt")
    assert f"format {checkpoint.FORMAT + 41}" in message and f"up to {checkpoint.FORMAT}" in message


def test_compressed_bomb_is_refused_without_expanding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGEST", 10_000)
    (tmp_path / "a.pt").write_bytes(gzip.compress(b"PK" + bytes(10**6)))
    assert "10,000 bytes" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_last_offers_a_whole_previous(tmp_path, damage):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in range(2):
        checkpoint.save(last, {"epoch": epoch, "a": torch.ones(500)}, previous)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes({"truncated": content[:700], "flipped": content, "empty": b""}[damage])
    message = refusal(last)
    command = message[message.index("cp "):]
    assert command == f"cp {previous} {last}"
    subprocess.run(command.split(), check=True)
    assert checkpoint.read(last)["epoch"] == 0


def test_damaged_previous_is_not_offered(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    last.write_bytes(b"")
    previous.write_bytes(b"PK\x03\x04")
    assert "cp " not in refusal(last)
    previous.unlink()
    assert "cp " not in refusal(last)
    checkpoint.save(previous, {"epoch": 0})
    last.rename(tmp_path / "model.pt")
    assert "cp " not in refusal(tmp_path / "model.pt")


# ---- code

class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("compressed", [False, True])
def test_code_is_refused_named_and_never_runs(tmp_path, compressed):
    buffer = io.BytesIO()
    torch.save({"format": 1, "weights": {"a": torch.ones(2)}, "b": Bomb(tmp_path / "ran")}, buffer)
    content = buffer.getvalue()
    (tmp_path / "a.pt").write_bytes(gzip.compress(content) if compressed else content)
    message = refusal(tmp_path / "a.pt")
    assert f"{os.system.__module__}.system" in message and "refused" in message
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run code"


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_bare_pickle_never_runs(tmp_path, legacy):
    if legacy:
        torch.save(Bomb(tmp_path / "ran"), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    else:
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert "no checkpoint" in refusal(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "a.pt")


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
import sys, torch, checkpoint
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
    checkpoint.remove_partial(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"last.pt", "previous.pt"}


STOPPED = """
import os, signal, sys, torch, checkpoint
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
    checkpoint.remove_partial(tmp_path)
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
