"""What stands beside a result never costs it, and every file is whole or is not there."""
import errno
import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import filter_pruning
import morphnet
import networks
import profil
import test as half_test
from benchmarks import deployment, inference
from engine import checkpoint, files
from engine.settings import defaults_of

FILTERS = {"conv1": torch.rand(6), "conv2": torch.rand(5)}
STEPS = [{"step": step, "parameters": 10 - step, "loss": 1.0, "seconds": 1.0} for step in range(3)]
RESULT = {"accuracy": 50.0, "images": 4, "confusion": [[1, 1], [1, 1]], "classes": [{"name": "a"}, {"name": "b"}]}
ROWS = [{"network": "LeNet-5", "way": "eager", "batch": 1, "images_per_second": {"median": 5.0},
         "milliseconds": {"median": 200.0}}]
FORM = [{"network": "a", "form": "PyTorch", "accuracy": 50.0, "bytes": 9, "milliseconds": {"median": 1.0}}]
PICTURES = {"test": lambda path: half_test.draw_confusion(path, RESULT),
            "norms": lambda path: filter_pruning.draw_norms(path, FILTERS, defaults_of(filter_pruning.CYCLE)),
            "cycle": lambda path: filter_pruning.draw_cycle(path, STEPS),
            "widths": lambda path: morphnet.draw_widths(path, {"a": 4}, {"a": 2}),
            "inference": lambda path: inference.draw_inference(path, ROWS),
            "deployment": lambda path: deployment.draw(path, FORM)}


def fill_disk(*paths):
    """Let the disk be full for these files: what is written for each goes to /dev/full."""
    for path in paths:
        path.with_name(path.name + ".partial").symlink_to("/dev/full")


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_a_picture_is_whole_or_the_one_before_it_stays(draw, tmp_path):
    path = tmp_path / "picture.png"
    fill_disk(path)
    with pytest.raises(RuntimeError, match=r"picture.png could not be written \(No space left on device\): [\d,]+ "):
        draw(path)
    assert list(tmp_path.iterdir()) == []
    draw(path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG") and whole.endswith(b"IEND\xaeB`\x82")
    fill_disk(path)
    with pytest.raises(RuntimeError, match="the previous picture.png is intact"):
        draw(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_the_ending_says_which_kind_of_picture(tmp_path):
    figure = Figure()
    files.save_figure(tmp_path / "a.svg", figure)
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    files.save_figure(tmp_path / "a", figure)
    assert (tmp_path / "a").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", ["file/picture.png", "none/picture.png", "/proc/picture.png"])
def test_where_nothing_can_be_written_one_error_says_so(place, tmp_path):
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(RuntimeError, match=r"picture.png could not be written \(.*\): 3 bytes are needed"):
        files.write(tmp_path / place, b"abc")
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a finished run that nobody has tested."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("*.json", "*.png"),
                           dirs_exist_ok=False)


@pytest.fixture
def read_only(run, trained, monkeypatch):
    """That run on a disk that is read-only."""
    shutil.copy(trained / "config.json", run)
    real = files.write_synced

    def write_synced(path, content):
        if path.parent == run:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, content)
    monkeypatch.setattr(files, "write_synced", write_synced)
    return run


def notes_of(errors):
    """The notes on stderr, nothing else being there."""
    lines = errors.splitlines()
    assert all(line.startswith("note: ") for line in lines)
    return lines


def test_testing_a_run_in_a_read_only_folder_gives_its_result(read_only, capsys):
    half_test.main(["--checkpoint", str(read_only / "model.pt"), "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 360
    picture, report = notes_of(captured.err)
    assert "confusion.png could not be written (Read-only file system)" in picture and "report.json" in report
    half_test.main(["--checkpoint", str(read_only / "model.pt"), "--limit", "20"])
    captured = capsys.readouterr()
    assert re.search(r"accuracy [\d.]+ % of 20 test images", captured.out) and not notes_of(captured.err)
    assert not (read_only / "report.json").exists() and not (read_only / "confusion.png").exists()


@pytest.mark.parametrize("place", ["file/a.png", "none/a.png", "/proc/a.png", "a.nothing"])
def test_an_unwritable_picture_costs_no_result(run, tmp_path, place, capsys):
    (tmp_path / "file").touch()
    half_test.main(["--checkpoint", str(run / "model.pt"), "--limit", "20", "--json", "--picture",
                    str(tmp_path / place)])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 20 and len(notes_of(captured.err)) == 1


def test_a_report_of_another_shape_is_left_as_it_is(run, trained, capsys):
    shutil.copy(trained / "config.json", run)
    for content in ("[]", "{", "3"):
        (run / "report.json").write_text(content)
        profil.main(["--checkpoint", str(run / "model.pt"), "--json"])
        captured = capsys.readouterr()
        assert json.loads(captured.out)["parameters"] > 0 and (run / "report.json").read_text() == content
        note, = notes_of(captured.err)
        assert "report.json is damaged" in note


def test_profiling_a_run_in_a_read_only_folder_gives_its_result(read_only, tmp_path, capsys):
    table = tmp_path / "layers.csv"
    fill_disk(table)
    with pytest.raises(RuntimeError, match="layers.csv could not be written"):
        profil.main(["--checkpoint", str(read_only / "model.pt"), "--json", "--csv", str(table)])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["parameters"] > 0 and "report.json" in notes_of(captured.err)[0]
    assert not table.exists()


def test_bytes_are_those_of_files_without_any_folder_for_temporary_ones(run, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    state = checkpoint.read(run / "model.pt")
    network = {name: state[name] for name in ("architecture", "widths", "weights")}
    sizes = half_test.sizes_of(network, network)
    checkpoint.save(tmp_path / "whole.pt", network)
    checkpoint.save_compact(tmp_path / "compact.pt.gz", network)
    assert sizes["float32"] == (tmp_path / "whole.pt").stat().st_size
    assert sizes["compressed"] == (tmp_path / "compact.pt.gz").stat().st_size


INFERENCE = ["--networks", "LeNet-5", "--ways", "eager", "--batches", "1", "--seconds", "0.01",
             "--repeats", "1", "--device", "cpu", "--json"]


def test_a_benchmark_whose_plot_and_table_cannot_be_written_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "measure_inference", lambda arguments: ROWS)
    path = tmp_path / "speed.json"
    fill_disk(path.with_suffix(".png"), path.with_suffix(".md"))
    inference.main([*INFERENCE, str(path)])
    assert json.loads(path.read_text())["rows"] == ROWS and len(notes_of(capsys.readouterr().err)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_benchmark_of_which_nothing_ran_has_its_numbers(tmp_path, monkeypatch, capsys):
    rows = [{"network": "LeNet-5", "way": "compiled", "batch": 1, "not_run": "no C++ compiler found"}]
    monkeypatch.setattr(inference, "measure_inference", lambda arguments: rows)
    inference.main([*INFERENCE, str(tmp_path / "speed.json")])
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == rows
    assert len(notes_of(capsys.readouterr().err)) == 1


def test_a_folder_that_cannot_be_written_in_is_refused_before_measuring(tmp_path, run, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(inference, "measure_inference", lambda arguments: pytest.fail("measured"))
    monkeypatch.setattr(deployment, "measure", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(OSError, match="cannot write in .*file"):
        inference.main([*INFERENCE, str(tmp_path / "file" / "speed.json")])
    with pytest.raises(OSError, match="cannot write in .*file"):
        deployment.main([str(run / "model.pt"), "--json", str(tmp_path / "file" / "table.json")])


ARCHITECTURE = {"name": "lenet5-student", "num_classes": 10, "in_channels": 3}


def save_as(path, architecture, **more):
    """A LeNet-5 whose file names another architecture, or has another part."""
    network = checkpoint.network_of(networks.build(**ARCHITECTURE), ARCHITECTURE)
    checkpoint.save(path, {**network, "architecture": architecture, **more})
    return path


@pytest.mark.parametrize("architecture, more", [
    ({**ARCHITECTURE, "colour": 3}, {}), ({"num_classes": 10}, {}), ({**ARCHITECTURE, "name": 3}, {}),
    ({**ARCHITECTURE, "num_classes": "ten"}, {}), ({**ARCHITECTURE, "bits": 3}, {}), (ARCHITECTURE, {"widths": 3}),
    (ARCHITECTURE, {"widths": {"conv1": "a"}}), (ARCHITECTURE, {"dataset": "imagenet"}),
    (ARCHITECTURE, {"dataset": ["digits"]}), (ARCHITECTURE, {"settings": []})])
def test_a_checkpoint_of_another_shape_is_one_line(architecture, more, tmp_path):
    path = save_as(tmp_path / "a.pt", architecture, **more)
    for main in (half_test.main, profil.main):
        with pytest.raises(ValueError, match="a.pt"):
            main(["--checkpoint", str(path)])


PLAIN = st.recursive(st.none() | st.booleans() | st.integers(-9, 99) | st.text(max_size=4),
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner,
                                                                                  max_size=2), max_leaves=4)


@settings(deadline=None, max_examples=150)
@given(architecture=PLAIN | st.dictionaries(st.sampled_from([*ARCHITECTURE, "bits", "size", "groups", "x"]), PLAIN)
       .map(lambda changes: ARCHITECTURE | changes), widths=PLAIN, dataset=PLAIN, average=PLAIN)
def test_a_checkpoint_of_any_shape_is_a_network_or_one_line(architecture, widths, dataset, average, tmp_path_factory):
    path = save_as(tmp_path_factory.getbasetemp() / "any.pt", architecture, widths=widths, dataset=dataset,
                   average=average)
    try:
        networks.load_network(path)
    except ValueError as problem:
        assert "any.pt" in str(problem)
