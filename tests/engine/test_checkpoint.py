"""Checkpoints: exact, whole or refused, never able to run code."""
import gzip
import io
import os
import pickle
import subprocess
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_runs import same
from samples import small_network
from torch import nn

from engine import checkpoint
from resnet_factorized import build

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
    (gzip.compress(b"", mtime=0), "empty"),
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
