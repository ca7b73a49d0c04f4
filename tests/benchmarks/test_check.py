"""The check for a GPU, on the CPU: its runs, what it finds, and what it says where there is no GPU."""
import json
import warnings

import pytest
import torch

import train
from benchmarks import check
from engine import commandline

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Networks and convolutions that are quick to try."""
    monkeypatch.setattr(check, "COMMON", check.COMMON + " --model resnet8-4-4-4")
    monkeypatch.setattr(check, "STAGES", ((16, 4),))
    monkeypatch.setattr(check, "BATCHES", (2,))


def test_techniques_run_resume_and_are_timed(small, tmp_path, capsys):
    check.main(["--device", "cpu", "--techniques", "polynomial, LAMP", "a teacher", "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["technique"] for row in found["techniques"]] == ["rounds", "polynomial, LAMP", "a teacher"]
    assert all(row["milliseconds"] > 0 and row["waits"] == 0 for row in found["techniques"])
    (row,) = found["convolutions"]
    assert set(row["times"]) == {f"{form} {layout}" for form in ("grouped", "dense") for layout in check.LAYOUTS}
    assert "16 channels,  4 x 4 , batch   2:" in capsys.readouterr().out


def test_one_that_fails_ends_nothing_and_is_named_at_the_end(small, monkeypatch, capsys):
    real = train.MIXINGS["mixup"]
    monkeypatch.setitem(train.MIXINGS, "mixup", lambda *given: real(given[0].int(), *given[1:]) + "no kernel")
    with pytest.raises(RuntimeError, match="1 of 3 fail on cpu; mixup, one draw an image: "):
        check.main(["--device", "cpu", "--techniques", "mixup, one draw an image", "Muon"])
    printed = capsys.readouterr().out
    assert "Muon: runs" in printed and "mixup, one draw an image: " in printed


def test_a_run_that_does_not_resume_to_the_bit_is_found(small, tmp_path, monkeypatch):
    assert "failed" not in check.check_technique("rounds", tmp_path, CPU)
    check.check_resume(tmp_path / "rounds", tmp_path / "same")
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda run, images, *more: real(run, images + 1e-3, *more))
    with pytest.raises(RuntimeError, match="a resumed run differs in .* tensors, the first is conv1.weight"):
        check.check_resume(tmp_path / "rounds", tmp_path / "other")


def test_waits_are_counted_and_the_mode_is_undone(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def act():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert check.count_waits(act, torch.device("cuda")) == 3 and modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        check.count_waits(lambda: 1 / 0, torch.device("cuda"))
    assert modes == ["warn", "default"] * 2


def test_flags_of_every_technique_are_accepted(tmp_path, monkeypatch):
    """Those that the tests above leave out too: all must reach the point where a run is prepared."""
    class Accepted(Exception):
        pass

    def prepare(settings, state, forced=False):
        raise Accepted("accepted")
    monkeypatch.setattr(check.experiment, "prepare", prepare)
    monkeypatch.setattr(check.experiment.checkpoint, "find", lambda path: path)
    (tmp_path / "cycle.json").write_text(json.dumps(check.CYCLE))
    for name in check.TECHNIQUES:
        assert check.check_technique(name, tmp_path, CPU)["failed"] == "accepted", name


def test_without_a_gpu_it_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is absent; present: .*cpu"):
        check.main([])
    assert commandline.pick_device("auto").type != "cuda"
