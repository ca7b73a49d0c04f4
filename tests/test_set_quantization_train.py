import pytest
import torch

import export
import profil
import test as half_test
import train_pruning
from engine import checkpoint
from networks import load_network


@pytest.fixture(scope="module")
def binary_run(tmp_path_factory):
    """A finished run with binary weights that was pruned once and interrupted by nothing."""
    out = tmp_path_factory.mktemp("runs") / "binary"
    train_pruning.main(["--dataset", "digits", "--limit", "64", "--batch-size", "32", "--epochs", "1", "1",
                        "--sparsity", "0.5", "--weights", "binary", "--binary-scale", "one", "--compile", "off",
                        "--out", str(out)])
    return out


def weights(state):
    return {name: tensor for name, tensor in state["weights"].items() if tensor.dim() > 1}


def test_the_result_is_minus_one_zero_and_one_and_the_state_is_real(binary_run):
    result, state = checkpoint.read(binary_run / "model.pt"), checkpoint.read(binary_run / "last.pt")
    for name, weight in weights(result).items():
        assert set(weight.unique().tolist()) <= {-1.0, 0.0, 1.0}, name
        assert torch.equal(weight == 0, ~state["masks"][name])
    real = torch.cat([weight.flatten() for weight in weights(state).values()])
    assert len(real.unique()) > 1000 and real.abs().max() <= 1


def test_one_bit_a_weight_on_disk_and_the_same_predictions(binary_run, tmp_path, capsys):
    target = tmp_path / "binary.pt.gz"
    export.main(["--checkpoint", str(binary_run / "model.pt"), "--out", str(target)])
    model, _ = load_network(binary_run / "model.pt")
    packed, state = load_network(target)
    for name, tensor in weights(checkpoint.network_of(model, {})).items():
        assert torch.equal(state["weights"][name].float(), tensor)
    # 1.4 million weights: one bit of mask each and one of sign for half of them, and batch norm in half precision
    assert target.stat().st_size < 1_411_146 * 1.5 / 8 + 4 * 2 * 5_000 + 20_000
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model(images), packed(images), atol=0.05, rtol=0.02)
    half_test.main(["--checkpoint", str(target), "--dataset", "digits"])
    assert "360 test images" in capsys.readouterr().out


def test_binary_weights_count_as_one_bit(binary_run):
    model, _ = load_network(binary_run / "model.pt")
    rows = profil.count_layers(model, (3, 32, 32))
    totals = profil.totals_of(rows, 16, 16)
    assert totals["binary_weights"] == totals["parameters"] - sum(
        row["parameters"] for row in rows if not row["weights"]) - 10
    left = totals["binary_weights"] - sum(row["zero_weights"] for row in rows)
    others = totals["parameters"] - totals["binary_weights"]
    assert totals["score_course_terms"][0] == pytest.approx((left / 32 + others / 2) / 5.6e6)
    assert totals["score_course_terms"][1] == pytest.approx(totals["macs"] / 2 / 2.8e8)


@pytest.mark.parametrize("scale", ["one", "glorot"])
def test_stochastic_training_ends_with_real_weights(scale, tmp_path):
    train_pruning.main(["--dataset", "digits", "--limit", "32", "--batch-size", "16", "--epochs", "1", "1",
                        "--sparsity", "0.5", "--weights", "binary-stochastic", "--binary-scale", scale,
                        "--compile", "off", "--out", str(tmp_path / "run")])
    state = checkpoint.read(tmp_path / "run" / "model.pt")
    assert len(state["weights"]["layer4.1.conv2.weight"].unique()) > 1000
    if scale == "glorot":
        assert state["weights"]["layer4.1.conv2.weight"].abs().max() <= 1.00001 * (1.5 / (9 * (64 + 512))) ** 0.5
