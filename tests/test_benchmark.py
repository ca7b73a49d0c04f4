import json
from types import SimpleNamespace

import pytest

import benchmark
from benchmarks import inference, training


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "training.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")                  # no compiler: the comparison itself is tested here, not its speed
        patch.delenv("CXX", raising=False)
        benchmark.main(["training", "--dataset", "digits", "--images", "32", "--repeats", "2",
                        "--resize", "8", "--json", str(path)])
    return json.loads(path.read_text())


def test_both_loops_are_timed_and_compared(measured):
    loops, published = measured["loops"], measured["loops"]["published"]
    assert {name: row["batch_size"] for name, row in loops.items()} == {
        "ours": 64, "ours, --resize 8": 64, "published": 32}
    for row in loops.values():
        for name in ("training", "evaluation", "epoch"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
    for name in loops.keys() - {"published"}:
        for part in ("training", "epoch"):
            assert measured["ratios"][name][part] == loops[name][part]["median"] / published[part]["median"]


def test_loops_compile_and_choose_one_after_the_other(monkeypatch):
    """Together on one GPU they would disturb each other's choice."""
    events, loops = [], []

    class Pipe:
        def __init__(self):
            self.answers = [("eager", 64), *[(1.0, 1.0)] * 3]

        def recv(self):
            events.append("ready") if len(self.answers) == 4 else None
            return self.answers.pop(0)

        def send(self, asked):
            pass

    def begin(serve, loop, arguments):
        events.append("start")
        loops.append(loop)
        return Pipe()
    monkeypatch.setattr(training, "begin", begin)
    rows = training.measure_training(SimpleNamespace(resize=8, convolutions="dense", repeats=2, dataset="digits"))
    assert events == ["start", "ready"] * 4
    assert loops == [{}, {"resize": 8}, {"convolutions": "dense"}, {"recipe": "published"}]
    assert list(rows) == ["ours", "ours, --resize 8", "ours, --convolutions dense", "published"]


def test_a_round_of_growing_images_takes_the_mean_of_both_halves(monkeypatch):
    seconds = {1.0: 0.25, 0.0: 1.0}
    monkeypatch.setattr(training, "time_part", lambda run, batches, images, until: seconds[until])
    growing = SimpleNamespace(settings={"resize": 4, "resize_until": 0.5})
    assert training.time_training(growing, None, 32) == 0.625
    assert training.time_training(SimpleNamespace(settings={"resize": None, "resize_until": 0.5}), None, 32) == 1.0


def test_an_epoch_is_slower_than_its_training_steps(measured):
    for row in measured["loops"].values():
        assert row["epoch"]["median"] < row["training"]["median"]


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        benchmark.main(["training", "--repeats", "0"])


def test_inference_is_timed_compared_and_drawn(tmp_path, capsys):
    path = tmp_path / "inference.json"
    benchmark.main(["inference", "--networks", "LeNet-5", "ResNet-18 dense", "--ways", "eager", "onnx int8",
                    "--batches", "1", "--seconds", "0.05", "--repeats", "3", "--device", "cpu", "--json", str(path)])
    rows = {(row["network"], row["way"]): row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 4 and rows["ResNet-18 dense", "eager"]["times_faster"] == 1
    dense = rows["ResNet-18 dense", "eager"]["milliseconds"]["median"]
    for row in rows.values():
        speed = row["images_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert speed["median"] == pytest.approx(1000 / row["milliseconds"]["median"])
        assert row["times_faster"] == dense / row["milliseconds"]["median"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".md").read_text().count("\n") == 6
    assert "ResNet-18 dense" in capsys.readouterr().out


def test_what_cannot_run_says_why_and_is_not_compared(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    row = inference.time_inference("LeNet-5", "compiled", 1, "cpu", 1, 0.01)
    assert row["not_run"] == "no C++ compiler found" and "milliseconds" not in row
    table = inference.markdown_of([row])
    assert "| LeNet-5 | compiled | not run |  |  |" in table


def test_a_part_is_chosen_by_its_name(capsys):
    with pytest.raises(ValueError, match="benchmark.py speed: choose from inference, training, profile, .*, check"):
        benchmark.main(["speed"])
    for flags in ([], ["--help"]):
        benchmark.main(flags)
        printed = capsys.readouterr().out
        assert all(part in printed for part in benchmark.PARTS)
