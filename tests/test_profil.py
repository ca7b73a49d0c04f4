import csv
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import profil
import pruning
import quantization
from engine import operations
from resnet_factorized import build


def macs_by_torch(model, shape):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("groups, parameters, macs", [
    (1, 11_173_962, 555_422_720), (8, 1_411_146, 70_980_608), (4, 2_805_834, 140_186_624)])
def test_golden_counts(groups, parameters, macs, capsys):
    profil.main(["--model", "resnet18", "--groups", str(groups), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["parameters"], result["macs"]) == (parameters, macs)
    assert result["nonzero"] == parameters and result["sparsity"] == 0
    assert macs_by_torch(build("resnet18", groups), (3, 32, 32)) == macs


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101"])
def test_macs_equal_those_of_flop_counter(name):
    model = build(name, groups=4)
    rows = profil.count_layers(model, (3, 32, 32))
    assert sum(row["macs"] for row in rows) == macs_by_torch(model, (3, 32, 32))
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())


def test_dense_half_precision_is_the_reference_of_all_scores():
    totals = profil.totals_of(profil.count_layers(build("resnet18", groups=1), (3, 32, 32)))
    assert totals["profiler_operations"] == 834_362_880
    assert totals["score_profiler"] == pytest.approx(2.0, abs=1e-12)
    assert totals["score_course"] == pytest.approx(1.99, abs=0.005)
    assert totals["parameters_removed"] == totals["macs_removed"] == 0
    assert totals["micronet_bytes"] == 2 * 11_173_962


def test_pruned_network_scores_as_in_the_course():
    model = build("resnet18", groups=8)
    masks = pruning.global_masks(model, 0.7)
    pruning.apply_masks(model, pruning.global_masks(model, 0.7, masks))
    totals = profil.totals_of(profil.count_layers(model, (3, 32, 32)))
    assert totals["score_course"] == pytest.approx(0.139, abs=5e-4)
    assert totals["sparsity"] == pytest.approx(0.91, abs=1e-4)
    assert totals["parameters_removed"] == pytest.approx(0.988, abs=5e-4)
    assert totals["macs_removed"] == pytest.approx(0.872, abs=5e-4)
    assert totals["nominal_macs"] < totals["macs"]


class Small(nn.Module):
    """Every kind of layer that is counted, small enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 2), groups=2, bias=True)
        self.norm, self.act, self.pool = nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)
        self.linear = nn.Linear(6 * 3 * 3, 5)

    def forward(self, images):
        return self.linear(self.pool(self.act(self.norm(self.conv(images)))).flatten(1))


@pytest.mark.parametrize("weight_bits, activation_bits", [(32, 32), (16, 16), (8, 32), (1, 8)])
def test_scores_equal_a_count_by_hand(weight_bits, activation_bits):
    model = Small()
    with torch.no_grad():
        model.conv.weight.flatten()[:10] = 0
        model.linear.weight.flatten()[:27] = 0
    # an image of 8x7 gives 6x6 outputs of 6 channels, pooled to 3x3
    totals = profil.totals_of(profil.count_layers(model, (4, 8, 7)), weight_bits, activation_bits)
    weights, zeros = 6 * 2 * 6 + 54 * 5, 37
    parameters = weights + 6 + 12 + 5
    macs = 216 * 12 + 54 * 5
    assert (totals["parameters"], totals["nonzero"], totals["macs"]) == (parameters, parameters - zeros, macs)
    assert totals["sparsity"] == zeros / weights
    assert totals["nominal_macs"] == round(216 * 12 * (1 - 10 / 72)) + round(270 * 0.9)
    fewer = 32 / weight_bits
    operations = (216 * ((24 / fewer + 23) / 2 + 1)       # convolution: K = 3 * 2 * 4, two groups, a bias
                  + 3 * 216 + 216                          # batch norm, ReLU module
                  + 54 * 2                                 # average pooling of side 2
                  + (54 / fewer + 54 - 1 + 1) * 5)         # linear with its bias
    assert totals["profiler_operations"] == pytest.approx(operations)
    assert totals["score_profiler"] == pytest.approx(
        (parameters - zeros) / fewer / 5_586_981 + operations / 834_362_880)
    assert totals["score_course"] == pytest.approx(
        (parameters - zeros) * weight_bits / 32 / 5.6e6 + macs * max(weight_bits, activation_bits) / 32 / 2.8e8)
    assert totals["micronet_bytes"] == -(-((parameters - zeros) * weight_bits + weights) // 8)


def test_scores_of_few_bits_equal_a_count_by_hand():
    model = Small()
    bits = {"conv": [2, 4], "linear": [1, 8]}
    quantization.quantize_layers(model, bits)
    with torch.no_grad():
        model.conv.weight.fill_(1.0).flatten()[:50] = 0
        model.linear.weight.fill_(-1.0).flatten()[:27] = 0
    rows = profil.count_layers(model, (4, 8, 7))
    totals = profil.totals_of(rows)
    # 72 weights of two bits, 22 of them left, and 270 of one bit, 243 left; 6 biases, 12 of batch norm, 5 biases
    assert (totals["parameters"], totals["nonzero"]) == (72 + 270 + 23, 22 + 243 + 23)
    assert totals["layer_bits"] == bits and totals["binary_weights"] == 0
    parameter_bits, mac_bits = 22 * 2 + 243 * 1 + 23 * 16, 216 * 12 * 4 + 270 * 8
    assert totals["score_course_terms"] == pytest.approx((parameter_bits / 32 / 5.6e6, mac_bits / 32 / 2.8e8))
    assert totals["score_course"] == pytest.approx(sum(totals["score_course_terms"]))
    # a bitmask of 72 bits and 22 codes are less than 72 codes; signs with zeros need the bitmask; steps by output
    # channel, two numbers for the inputs of each layer
    stored = (72 + 22 * 2) + (270 + 243) + 32 * (6 + 6 + 2) + 32 * 12 + 32 * (5 + 5 + 2)
    scaled = (4 * 8 * 7 + 216) + 216 + (54 + 5)
    assert totals["score_course_strict_terms"] == pytest.approx(
        (stored / 32 / 5.6e6, (mac_bits + 32 * scaled) / 32 / 2.8e8))
    assert totals["score_course_strict"] == pytest.approx(sum(totals["score_course_strict_terms"]))
    assert profil.totals_of(rows, 32)["score_course_terms"][0] == pytest.approx((22 * 2 + 243 + 23 * 32) / 32 / 5.6e6)


def test_a_network_of_floats_has_no_strict_score():
    totals = profil.totals_of(profil.count_layers(Small(), (4, 8, 7)))
    assert not {"layer_bits", "score_course_strict"} & set(totals)


def test_profiling_leaves_the_model_as_it_was():
    model = build("resnet18").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profil.count_layers(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_is_profiled_into_its_report(trained, tmp_path, capsys):
    profil.main(["--checkpoint", str(trained / "model.pt"), "--csv", str(tmp_path / "layers.csv")])
    shown = capsys.readouterr().out
    assert str(trained / "model.pt") in shown and "91.00%" in shown
    profile = json.loads((trained / "report.json").read_text())["profile"]
    rows = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()))
    assert sum(int(row["nonzero"]) for row in rows) == profile["nonzero"]
    assert sum(layer["zero_weights"] for layer in profile["layers"]) == profile["parameters"] - profile["nonzero"]


def test_json_has_the_promised_keys(trained, capsys):
    profil.main(["--checkpoint", str(trained / "last.pt"), "--bits", "8", "32", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert {"parameters", "nonzero", "sparsity", "macs", "weight_bits", "activation_bits", "parameters_removed",
            "macs_removed", "score_course", "score_profiler", "micronet_bytes"} <= set(result)
    assert (result["weight_bits"], result["activation_bits"]) == (8, 32)


def test_cifar100_is_scored_against_wide_resnet(capsys):
    profil.main(["--model", "resnet18", "--classes", "100", "--bits", "32", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["score_micronet"] == pytest.approx(result["parameters"] / 36_479_194 + result["macs"] / 5_243_328_768)


@pytest.mark.parametrize("flags, reason", [
    (["--bits", "0"], "1 to 32"), (["--bits", "8", "8", "8"], "one or two"), (["--model", "resnet9"], "resnet9"),
    (["--model", "resnet18", "--checkpoint", "x"], "exclude"), (["--model", "resnet18", "--groups", "3"], "groups 3"),
    (["--checkpoint", "absent.pt"], "absent.pt")])
def test_bad_flags_are_refused(flags, reason):
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        profil.main(flags)


@pytest.mark.parametrize("flags, reason", [
    (["--classes", "100"], "--classes is of an untrained network"), (["--groups", "4"], "--groups is of an untrained"),
    (["--model", "lenet5", "--groups", "4"], "lenet5 has no groups"), (["--csv", "{folder}"], "is a folder"),
    (["--csv", "{file}/x.csv"], "cannot write in")])
def test_what_would_change_nothing_or_fail_late_is_refused(flags, reason, trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    flags = [flag.format(folder=tmp_path, file=tmp_path / "file") for flag in flags]
    checkpoint = [] if "--model" in flags else ["--checkpoint", str(trained / "model.pt")]
    with pytest.raises((ValueError, OSError), match=reason):
        profil.main([*checkpoint, *flags])
    assert capsys.readouterr().out == ""


# ---- networks of somebody's own

class Own(nn.Module):
    """A layer that runs twice, a linear layer over positions, and layers of other kinds that hold parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.PReLU(4), nn.GroupNorm(2, 4)
        self.up, self.linear = nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Linear(16, 5)

    def forward(self, images):
        maps = self.norm(self.act(self.conv(self.conv(images))))
        return self.linear(self.up(maps).flatten(2)[:, :, :48].view(len(images), 2, 3, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_has_one_row_and_every_parameter_counts_once(dtype):
    model = Own().to(dtype)
    rows = {row["name"]: row for row in profil.count_layers(model, (4, 8, 8))}
    assert sum(row["parameters"] for row in rows.values()) == sum(weight.numel() for weight in model.parameters())
    assert list(rows) == ["conv", "act", "norm", "up", "linear"]
    assert rows["conv"]["macs"] == 2 * 64 * 4 * 36 and rows["linear"]["macs"] == 2 * 3 * 16 * 5
    totals = profil.totals_of(list(rows.values()))
    assert totals["macs"] == operations.macs_of(model, (4, 8, 8))
