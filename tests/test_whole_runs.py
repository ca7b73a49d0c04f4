"""Short runs through main: what is left of a network at the end, and in every file."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_runs import same
from torch import nn

import experiment
import networks
import profil
import pruning
import report
import test as half_test
import train
import train_pruning
from engine import checkpoint

SHORT = ["--dataset", "digits", "--device", "cpu", "--compile", "off"]


@pytest.mark.parametrize("kind", ["rounds", "polynomial"])
def test_excluded_layers_keep_all_their_weights(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_pruning.main([*SHORT, "--epochs", "1", "1", "--sparsity", "0.9", "--pruning", kind, "--exclude", "conv1",
                        "linear", "--limit", "16", "--batch-size", "8", "--prune-frequency", "1", "--out", "run"])
    model, masks = networks.load_network("run/model.pt")[0], checkpoint.read("run/last.pt")["masks"]
    assert bool((model.conv1.weight != 0).all()) and bool((model.linear.weight != 0).all())
    pruned = pruning.prunable(model, ["conv1", "linear"])
    total = sum(weight.numel() for weight in pruned.values())
    assert set(masks) == set(pruned) and pruning.sparsity_of(model, ["conv1", "linear"]) == round(0.9 * total) / total


def test_layer_to_exclude_that_is_not_there_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no convolution or linear layer is called 'head'; there are conv1, "):
        train_pruning.main([*SHORT, "--exclude", "head", "--out", "run"])
    assert not list(tmp_path.iterdir())


def test_per_sample_mixing_is_another_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, flags in (("a", ["--mix-per-sample"]), ("b", [])):
        train.main([*SHORT, "--epochs", "1", "--limit", "16", "--batch-size", "8", "--mix-probability", "1", *flags,
                    "--out", out])
    assert json.loads(Path("a/config.json").read_text())["settings"]["mix_per_sample"] is True
    assert not torch.equal(*(checkpoint.read(f"{out}/model.pt")["weights"]["linear.weight"] for out in "ab"))


def test_cifar100_through_the_whole_job(tmp_path, monkeypatch, capsys):
    """100 classes from files to scores; random pixels of the real data set's shapes and counts."""
    monkeypatch.chdir(tmp_path)
    random, arrays = np.random.RandomState(0), {}
    for part, count in (("train", 50_000), ("test", 10_000)):
        arrays[f"x_{part}"] = random.randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = random.permutation(np.arange(count) % 100)
    Path("data").mkdir()
    np.savez("data/cifar100.npz", **arrays)
    train_pruning.main(["--dataset", "cifar100", "--device", "cpu", "--compile", "off", "--epochs", "1", "1",
                        "--sparsity", "0.9", "--limit", "32", "--batch-size", "16", "--out", "run"])
    half_test.main(["--checkpoint", "run/model.pt", "--limit", "200", "--json"])
    tested = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tested["dataset"] == "cifar100" and len(tested["classes"]) == 100 and tested["images"] == 200
    profil.main(["--checkpoint", "run/model.pt", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 1_411_146 + 90 * 513 and found["macs"] == 70_980_608 + 90 * 512
    zeros = round(0.9 * (found["parameters"] - 9_600 - 100))        # batch norm and the classifier's biases stay
    values, entries = found["parameters"] - zeros, found["parameters"] - 9_600 - 100
    assert found["nonzero"] == values
    assert found["score_micronet"] == pytest.approx(
        (values * 16 + entries) / 32 / 36_479_194 + found["macs"] / 5_243_328_768, rel=1e-6)
    report.main(["run", "--out", "results"])
    assert "| cifar100 |" in Path("results/table.md").read_text()


def test_pruning_run_leaves_nine_percent_in_every_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_pruning.main([*SHORT, "--epochs", "1", "1", "1", "--limit", "32", "--batch-size", "16", "--out", "run"])
    model, state = networks.load_network("run/model.pt")
    last = checkpoint.read("run/last.pt")
    total = sum(weight.numel() for weight in pruning.prunable(model).values())
    left = total - round(0.7 * total)
    left -= round(0.7 * left)
    assert round(pruning.sparsity_of(model) * total) == total - left
    for name, mask in last["masks"].items():
        for weights in (state["weights"], last["weights"], last["average"]):
            assert bool((weights[name][~mask] == 0).all()), name
    assert sum(int(mask.sum()) for mask in last["masks"].values()) == left
    assert [row["round"] for row in last["history"]] == [1, 2, 3] and last["round"] == 2
    assert [row["sparsity"] for row in last["history"]] == pytest.approx([0, 0.7, 0.91], abs=1e-5)
    assert capsys.readouterr().out.count("pruned 70 % of the remaining weights") == 2


@pytest.mark.parametrize("end", ["0.6", "1"])
@pytest.mark.parametrize("kind", ["polynomial", "constant"])
def test_gradual_pruning_reaches_its_sparsity(kind, end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_pruning.main([*SHORT, "--epochs", "2", "--sparsity", "0.9", "--pruning", kind, "--prune-end", end,
                        "--prune-begin", "0.3", "--prune-frequency", "3", "--limit", "32", "--batch-size", "8",
                        "--out", "run"])
    state = checkpoint.read("run/last.pt")
    total = sum(mask.numel() for mask in state["masks"].values())
    assert sum(int(mask.sum()) for mask in state["masks"].values()) == total - round(0.9 * total)
    assert pruning.sparsity_of(networks.load_network("run/model.pt")[0]) == round(0.9 * total) / total


def test_the_seed_decides_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = []
    for out, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.rand(5)
        train.main([*SHORT, "--epochs", "1", "--limit", "16", "--batch-size", "8", "--out", out, "--seed", seed])
        results.append(checkpoint.read(f"{out}/model.pt")["weights"])
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert not torch.equal(results[0]["linear.weight"], results[2]["linear.weight"])


def test_bfloat16_arithmetic_leaves_weights_and_average_in_float32(tmp_path):
    out = tmp_path / "run"
    train.main(["--dataset", "digits", "--limit", "64", "--batch-size", "32", "--epochs", "1", "--compile", "off",
                "--device", "cpu", "--arithmetic", "bfloat16", "--out", str(out)])
    other = tmp_path / "other"
    train.main(["--dataset", "digits", "--limit", "64", "--batch-size", "32", "--epochs", "1", "--compile", "off",
                "--device", "cpu", "--arithmetic", "float32", "--out", str(other)])
    assert json.loads((out / "config.json").read_text())["arithmetic"] == "bfloat16"
    state, exact = checkpoint.read(out / "last.pt"), checkpoint.read(other / "last.pt")
    floats = [tensor for tensor in state["weights"].values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert not same(state["weights"], exact["weights"])                # another arithmetic
    assert state["history"][0]["train_loss"] == pytest.approx(exact["history"][0]["train_loss"], rel=0.02)


@pytest.mark.parametrize("flags", [
    "--sparsity 0.5 --recalibrate", "--sparsity 0.5 --score lamp --convolutions dense",
    "--pruning polynomial --sparsity 0.5", "--sparsity 0.5 --weights binary-stochastic",
    "--sparsity 0.5 --weights lsq --mixing cutmix",
    "--pruning filters --filter-threshold 0.9 --filter-interval 1 --filter-stop 1",
    "--pruning l1_cycle --cycle {cycle}", "--pruning morphnet --morph-budget 0.5"])
def test_every_technique_trains_weights_in_channels_last_as_on_cuda(flags, tmp_path, monkeypatch):
    cycle = tmp_path / "cycle.json"
    cycle.write_text(json.dumps({"finetuning_epochs": 1, "stop_loss": 1e9, "pruning_percent_step": 0.5,
                                 "layers": ["layer1.0.conv1", "layer4.1.conv1"]}))
    build, formats = experiment.build, []
    monkeypatch.setattr(experiment, "build", lambda **given: build(**given).to(memory_format=torch.channels_last))

    def watched(model, images):
        formats.append(any(weight.dim() == 4 and not weight.is_contiguous() for weight in model.parameters()))
    handle = nn.modules.module.register_module_forward_pre_hook(watched)
    epochs = ["--epochs", *(["2"] if "polynomial" in flags or "filters" in flags else ["1", "1"])]
    try:
        train_pruning.main([*SHORT, *flags.format(cycle=cycle).split(), *epochs, "--limit", "64", "--batch-size", "32",
                            "--out", str(tmp_path / "run")])
    finally:
        handle.remove()
    assert any(formats)
    model = networks.load_network(tmp_path / "run" / "model.pt")[0]
    assert torch.isfinite(model(torch.zeros(1, 3, 8, 8))).all()
    if "--sparsity 0.5" in flags:
        assert pruning.sparsity_of(model) >= 0.4999
    else:
        assert sum(p.numel() for p in model.parameters()) < 1_411_146
