import json

import pytest

import benchmark


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "training.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")                  # no compiler: the comparison itself is tested here, not its speed
        patch.delenv("CXX", raising=False)
        benchmark.main(["--dataset", "digits", "--images", "32", "--repeats", "2", "--json", str(path)])
    return json.loads(path.read_text())


def test_both_loops_are_timed_and_compared(measured):
    ours, published = measured["loops"]["ours"], measured["loops"]["published"]
    assert (ours["batch_size"], published["batch_size"]) == (64, 32)
    for row in (ours, published):
        for name in ("training", "evaluation", "epoch"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
    assert measured["ratios"]["training"] == ours["training"]["median"] / published["training"]["median"]
    assert measured["ratios"]["epoch"] == ours["epoch"]["median"] / published["epoch"]["median"]


def test_an_epoch_is_slower_than_its_training_steps(measured):
    for row in measured["loops"].values():
        assert row["epoch"]["median"] < row["training"]["median"]


def test_spread_is_median_least_and_greatest():
    assert benchmark.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        benchmark.main(["--repeats", "0"])
