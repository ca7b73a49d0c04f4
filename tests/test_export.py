import pytest
import torch

import checkpoint
import export
from train import load_network


def test_the_compact_file_holds_the_rounded_network(trained, tmp_path, capsys):
    target = tmp_path / "folder" / "small.pt.gz"
    export.main(["--checkpoint", str(trained / "model.pt"), "--out", str(target)])
    whole, _ = load_network(trained / "model.pt")
    small, state = load_network(target)
    assert state["dataset"] == "digits"
    for (name, ours), theirs in zip(whole.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(ours.half().float() if ours.is_floating_point() else ours, theirs), name
    assert (trained / "model.pt").stat().st_size > 12 * target.stat().st_size
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(whole(images), small(images), atol=0.05, rtol=0.01)


def test_last_pt_exports_as_well(trained, tmp_path):
    before, after = export.export(trained / "last.pt", tmp_path / "last.pt.gz")
    assert after < before
    assert checkpoint.read(tmp_path / "last.pt.gz")["dataset"] == "digits"


def test_overflow_is_refused_and_nothing_is_saved(trained, tmp_path):
    state = checkpoint.read(trained / "model.pt")
    state["weights"]["linear.weight"][0, 0] = 1e6
    checkpoint.save(tmp_path / "large.pt", {name: value for name, value in state.items() if name != "format"})
    with pytest.raises(ValueError, match=r"linear.weight \(largest 1e\+06\)"):
        export.export(tmp_path / "large.pt", tmp_path / "large.pt.gz")
    assert not (tmp_path / "large.pt.gz").exists()
