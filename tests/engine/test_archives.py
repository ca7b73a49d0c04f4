"""Arrays in an `.npz`: they come back as NumPy itself reads them, and nothing half written stays."""
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine import archives

TYPES = st.one_of(arrays.integer_dtypes(), arrays.unsigned_integer_dtypes(), arrays.floating_dtypes(),
                  arrays.boolean_dtypes())
ANY = arrays.arrays(TYPES, arrays.array_shapes(min_dims=0, max_dims=4, max_side=5))


@given(ANY, ANY, st.booleans(), st.booleans())
def test_arrays_come_back_as_numpy_reads_them(first, second, by_columns, packed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.npz"
        given_arrays = {"first": np.asfortranarray(first) if by_columns else first, "second": second}
        if packed:
            np.savez_compressed(path, **given_arrays)
        else:
            archives.write(path, given_arrays)
        found = archives.read(path, ("second", "first"))
        with np.load(path) as expected:
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name], strict=True)
                np.testing.assert_array_equal(array, given_arrays[name], strict=True)
                assert array.flags.writeable


def test_an_array_that_is_not_asked_for_is_not_read(tmp_path):
    np.savez(tmp_path / "any.npz", wanted=np.arange(3), other=np.array([{}], dtype=object))
    assert list(archives.read(tmp_path / "any.npz", ["wanted"])) == ["wanted"]
    with pytest.raises(ValueError, match="any.npz is not an .npz of plain arrays"):
        archives.read(tmp_path / "any.npz", ["wanted", "other"])


def test_a_missing_array_and_a_missing_file_are_named(tmp_path):
    np.savez(tmp_path / "any.npz", wanted=np.arange(3))
    with pytest.raises(ValueError, match="any.npz has no array called third; it must hold wanted, third"):
        archives.read(tmp_path / "any.npz", ["wanted", "third"])
    with pytest.raises(ValueError, match="absent.npz cannot be read: No such file"):
        archives.read(str(tmp_path / "absent.npz"), ["wanted"])


def test_a_path_as_text_is_named_with_the_size_of_what_is_damaged(tmp_path):
    path = tmp_path / "any.npz"
    archives.write(path, {"wanted": np.arange(30)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="any.npz is damaged .*; 100 bytes"):
        archives.read(str(path), ["wanted"])


def test_writing_that_was_killed_leaves_nothing_beside_the_next_file(tmp_path, monkeypatch):
    def fail(source, target):
        raise KeyboardInterrupt
    path, content = tmp_path / "any.npz", {"wanted": np.arange(3)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            archives.write(path, content)
    assert not path.exists()
    archives.write(path, content)
    assert [file.name for file in tmp_path.iterdir()] == ["any.npz"]
    np.testing.assert_array_equal(np.load(path)["wanted"], content["wanted"])
