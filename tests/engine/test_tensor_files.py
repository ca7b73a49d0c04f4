"""Safetensors files: they round-trip, and damage anywhere in them shows."""
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from engine import checkpoint, tensor_files

NETWORK = {"architecture": {"name": "a"}, "widths": {"conv": [1, 2]}, "dataset": "digits",
           "weights": {"conv.weight": torch.arange(18.0).reshape(2, 1, 3, 3), "steps": torch.tensor(3),
                       "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}}
WHOLE = tensor_files.to_bytes(NETWORK, 1)


def same(state):
    """Whether a file's dictionary is that of NETWORK."""
    theirs, ours = state["weights"], NETWORK["weights"]
    return (state["format"] == 1 and all(state[name] == NETWORK[name] for name in NETWORK if name != "weights")
            and theirs.keys() == ours.keys() and all(theirs[name].dtype == ours[name].dtype for name in ours)
            and all(torch.equal(theirs[name], ours[name]) for name in ours))


def test_a_network_comes_back_and_safetensors_itself_reads_its_tensors():
    assert same(tensor_files.read("a.safetensors", WHOLE))
    assert torch.equal(load(WHOLE)["conv.weight"], NETWORK["weights"]["conv.weight"])


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 7))
def test_a_bit_that_flipped_is_an_error_or_changes_nothing(position, bit):
    content = bytearray(WHOLE)
    content[position] ^= 1 << bit
    try:
        state = tensor_files.read("a.safetensors", bytes(content))
    except ValueError as problem:
        assert "a.safetensors" in str(problem)
        return
    assert same(state) or state["format"] != 1       # the version is told by whoever reads the dictionary


@given(st.integers(len(WHOLE) - 72 - 6, len(WHOLE) - 1), st.integers(0, 7))
def test_a_flipped_bit_of_a_weight_is_told(position, bit):
    content = bytearray(WHOLE)
    content[position] ^= 1 << bit
    with pytest.raises(ValueError, match="a.safetensors is damaged: its SHA-256 is"):
        tensor_files.read("a.safetensors", bytes(content))


def test_files_without_a_checksum_are_read(tmp_path):
    structure = json.dumps({name: NETWORK[name] for name in ("architecture", "widths", "dataset")})
    (tmp_path / "a.safetensors").write_bytes(save(NETWORK["weights"], {"format": "1", "network": structure}))
    assert same(checkpoint.read(tmp_path / "a.safetensors"))
