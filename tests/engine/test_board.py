"""What --tensorboard writes is what history.csv has, once, also where a run goes on."""
import importlib.util

import pandas as pd
import pytest
from sample_runs import ROUNDS

import train_pruning
from engine import board


def shown(folder):
    """{column: [(epoch, value)]} as TensorBoard shows the files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_run_shows_its_history(tmp_path):
    train_pruning.main([*ROUNDS, "--tensorboard", "--out", str(tmp_path / "run")])
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    found = shown(tmp_path / "run" / "tensorboard")
    assert found.keys() == set(history.columns) - {"epoch"}
    for name, values in found.items():
        assert [epoch for epoch, _ in values] == list(history["epoch"])
        assert [value for _, value in values] == pytest.approx(list(history[name]), rel=1e-6)


def test_rows_that_are_trained_again_take_the_place_of_their_first(tmp_path):
    rows = [{"epoch": epoch, "train_loss": float(epoch)} for epoch in range(1, 5)]
    first = board.opened(tmp_path, 1)
    for row in rows:
        board.add(first, row)
    first.close()
    second = board.opened(tmp_path, 3)             # a run that was killed goes on after its second epoch
    for row in rows[2:]:
        board.add(second, {**row, "train_loss": 10.0})
    second.close()
    assert shown(tmp_path) == {"train_loss": [(1, 1.0), (2, 2.0), (3, 10.0), (4, 10.0)]}


def test_a_run_may_begin_it_when_it_goes_on(tmp_path, monkeypatch):
    real, seen = train_pruning.fit, []

    def once(run):
        if seen:
            raise KeyboardInterrupt
        seen.append(real(run))
    monkeypatch.setattr(train_pruning, "fit", once)
    with pytest.raises(KeyboardInterrupt):
        train_pruning.main([*ROUNDS, "--out", str(tmp_path / "run")])
    monkeypatch.undo()
    train_pruning.main(["--resume", "--tensorboard", "--out", str(tmp_path / "run")])
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert [epoch for epoch, _ in shown(tmp_path / "run" / "tensorboard")["train_loss"]] == list(history["epoch"])[2:]


def test_without_its_package_nothing_is_trained(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else real(name))
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train_pruning.main([*ROUNDS, "--tensorboard", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
