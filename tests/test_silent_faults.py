"""What once gave a wrong result without a word: each is right now, or one error."""
import json
import shlex
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from sample_runs import SMALL, Stop, stop_after_a_save

import binaryconnect
import cifar10
import experiment
import filter_pruning
import models
import networks
import profil
import quantization
import report
import study
import test as half_test
import train
import train_pruning
from engine import checkpoint, folders, schedules, streams

QUICK = [*SMALL, "--epochs", "1", "--model", "lenet5", "--mixing", "none"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two networks that differ in their seed."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        train.main([*QUICK, "--seed", str(seed), "--out", str(folder / str(seed))])
    return [folder / str(seed) / "model.pt" for seed in (0, 1)]


# ---- views of a teacher

@pytest.fixture
def with_views(teachers, tmp_path):
    """A run of one epoch whose teacher was asked once."""
    out = tmp_path / "run"
    train.main([*QUICK, "--teacher", str(teachers[0]), "--teacher-views", "2", "--out", str(out)])
    return out


@pytest.mark.parametrize("flags, changed", [("--teacher OTHER", "teacher"), ("--limit 64", "number of images"),
                                            ("--pad 2", "--pad"), ("--flips alternating", "line FLIPS")])
def test_views_of_other_settings_are_refused(flags, changed, with_views, teachers):
    words = flags.replace("OTHER", str(teachers[1])).split()
    before = (with_views / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=f"views.pt was asked with another {changed}: .*another --out"):
        train.main(["--resume", "--force", "--out", str(with_views), "--epochs", "2", *words])
    assert (with_views / "last.pt").read_bytes() == before
    train.main(["--resume", "--force", "--out", str(with_views), "--epochs", "2"])


def test_views_that_are_gone_are_not_drawn_anew(with_views):
    (with_views / "views.pt").unlink()
    with pytest.raises(FileNotFoundError, match="views.pt is gone"):
        train.main(["--resume", "--force", "--out", str(with_views), "--epochs", "2"])


def test_views_of_an_older_run_are_taken(with_views):
    held = checkpoint.read(with_views / "views.pt")
    checkpoint.save(with_views / "views.pt", {name: held[name] for name in ("views", "answers")})
    train.main(["--resume", "--force", "--out", str(with_views), "--epochs", "2"])


def test_views_of_a_run_that_did_not_name_its_data_set_are_taken(with_views):
    held = checkpoint.read(with_views / "views.pt")
    newer = ("--dataset", "set of pictures")
    checkpoint.save(with_views / "views.pt", {**held, "of": {name: value for name, value in held["of"].items()
                                                             if name not in newer}})
    train.main(["--resume", "--force", "--out", str(with_views), "--epochs", "2"])


def test_of_several_processes_all_draw_and_one_writes(teachers, tmp_path, monkeypatch):
    """A process that comes late finds the file, and must still draw as the others did."""
    out, drawn = tmp_path / "run", []
    run = train.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                      [*QUICK, "--teacher", str(teachers[0]), "--teacher-views", "2", "--out", str(out)])
    for leads in (True, False):
        run.train.views, run.train.epoch = None, 0
        run.generator.manual_seed(5)
        monkeypatch.setattr(train.parallel, "leads", lambda leads=leads: leads)
        monkeypatch.setattr(train.parallel, "agreed", lambda value: False)         # what the first one said
        written = (out / "views.pt").stat().st_mtime_ns if not leads else None
        train.take_views(run, train.autocast(run.device, run.dtype))
        drawn.append((run.train.views, run.generator.get_state()))
    assert (out / "views.pt").stat().st_mtime_ns == written
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


def test_a_teacher_whose_file_has_changed_is_refused(teachers, tmp_path):
    given, out = tmp_path / "teacher.pt", tmp_path / "run"
    shutil.copy(teachers[0], given)
    train.main([*QUICK, "--teacher", str(given), "--epochs", "2", "--out", str(out)])
    shutil.copy(teachers[1], given)
    with pytest.raises(ValueError, match="teacher.pt is not the one that the run in .* began with; --force"):
        train.main(["--resume", "--out", str(out)])
    train.main(["--resume", "--force", "--epochs", "3", "--out", str(out)])


# ---- networks

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_channel_of_few_bits_begins_dead(bits):
    lone = torch.eye(4).view(4, 4, 1, 1)                        # dirac: one weight a channel
    for weight in (lone, 0.01 * torch.randn(4, 9, 3, 3), torch.tensor([[0.5], [-2.0], [0.0]])):
        step = quantization.first_weight_step(weight, bits)
        codes = (weight.flatten(1) / step[:, None]).round()
        assert torch.equal(codes.abs().amax(1) > 0, weight.flatten(1).abs().amax(1) > 0)


def test_an_unfinished_binary_run_is_read_with_its_signs(tmp_path, monkeypatch):
    flags = [*QUICK, "--weights", "binary", "--epochs", "2", "--limit", "96", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            train.main(flags)
    model, state = networks.load_network(tmp_path / "last.pt")
    for name, weight in binaryconnect.binary_weights(model).items():
        height = binaryconnect.scale_of(weight, "glorot")
        torch.testing.assert_close(weight.abs(), torch.full_like(weight, height))
        assert torch.equal(state["weights"][name], weight)
    validated = float(pd.read_csv(tmp_path / "history.csv")["validation_accuracy"].iloc[-1])
    data, kind = cifar10.load("digits"), cifar10.KINDS["digits"]
    _, chosen = cifar10.split(data, limit=96)
    batches = cifar10.Batches(data.x_train, data.y_train, 500, kind, torch.device("cpu"), chosen=chosen)
    assert train.evaluate(model, batches, torch.device("cpu"))[1] == pytest.approx(validated, abs=0.01)
    train.main(["--resume", "--out", str(tmp_path)])           # and it goes on from its real weights
    assert torch.unique(checkpoint.read(tmp_path / "last.pt")["weights"]["conv1.weight"]).numel() > 2


def test_start_takes_the_average_of_an_unfinished_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after_a_save(patch)
        with pytest.raises(Stop):
            train.main([*QUICK, "--epochs", "2", "--limit", "96", "--out", str(tmp_path)])
    state = checkpoint.read(tmp_path / "last.pt")
    model = models.build("lenet5", size=32)
    networks.load_start(model, state["architecture"], tmp_path / "last.pt", "digits", cifar10.KINDS["digits"])
    assert torch.equal(model.conv1.weight, state["average"]["conv1.weight"])
    assert not torch.equal(model.conv1.weight, state["weights"]["conv1.weight"])


def test_start_with_zeros_is_told(trained, tmp_path, capsys):
    train.main([*SMALL, "--epochs", "1", "--mixing", "none", "--start", str(trained / "model.pt"), "--out",
                str(tmp_path / "run")])
    assert "note: 91 % of the weights in" in capsys.readouterr().err


def test_a_stem_that_does_not_train_keeps_its_filters():
    torch.manual_seed(0)
    model = models.build("vgg6-16-16-16")
    model.whiten(torch.randn(50, 3, 16, 16))
    stem = model.conv1.weight.clone()
    found = filter_pruning.reduce_network(model, 0.5)
    assert "conv1" not in found and {"layer1.conv1", "layer3.conv2"} <= found.keys()
    assert torch.equal(model.conv1.weight, stem)
    assert "conv1" not in filter_pruning.Pruner({}).norms(model)


def test_morphnet_refuses_scales_that_are_fixed(tmp_path):
    with pytest.raises(ValueError, match="scales of vgg6-8-8-8's batch norms are fixed .*choose another --model"):
        train_pruning.main([*SMALL, "--model", "vgg6-8-8-8", "--pruning", "morphnet", "--epochs", "1", "1", "--out",
                            str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word, value", [("activation", "gelu"), ("pooling", "average"), ("shortcut", "A")])
def test_what_a_network_does_not_have_is_refused(word, value, tmp_path):
    with pytest.raises(ValueError, match=f"--{word} {value}: resnet18 has no {word} to choose"):
        train.main([*SMALL, f"--{word}", value, "--out", str(tmp_path / "run")])


# ---- what is measured

def profile_of(capsys, *flags):
    profil.main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


def test_zeros_that_a_network_starts_with_are_not_pruned(capsys):
    totals = profile_of(capsys, "--model", "vgg6-8-16-16")
    assert totals["nonzero"] == totals["parameters"]


def test_profil_takes_a_data_set_and_sound_classes(tmp_path, capsys):
    model = models.build("lenet5", num_classes=10, in_channels=1, size=28)
    architecture = {"name": "lenet5", "num_classes": 10, "in_channels": 1, "size": 28}
    checkpoint.save(tmp_path / "x.pt", checkpoint.network_of(model, architecture))
    with pytest.raises(ValueError, match="name the right one with --dataset"):
        profil.main(["--checkpoint", str(tmp_path / "x.pt")])
    assert profile_of(capsys, "--checkpoint", str(tmp_path / "x.pt"), "--dataset", "mnist")["macs"] == 416_520
    for classes in ("0", "-3"):
        with pytest.raises(ValueError, match=f"--classes {classes}"):
            profil.main(["--model", "resnet18", "--classes", classes])
    assert profile_of(capsys, "--model", "lenet5", "--dataset", "mnist", "--classes", "100")["parameters"] > 61_706


def test_folder_with_other_classes_is_refused(tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for name, grey in (("cat", 30), ("dog", 220)):
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.full((32, 32, 3), grey + number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "mine" / part / name / f"{number}.png")
    train.main(["--dataset", "mine", "--epochs", "1", "--model", "lenet5-student", "--mixing", "none", "--compile",
                "off", "--batch-size", "4", "--device", "cpu", "--out", "run"])
    half_test.main(["--checkpoint", "run/model.pt"])
    for part in ("train", "test"):
        (tmp_path / "mine" / part / "cat").rename(tmp_path / "mine" / part / "zebra")
    with pytest.raises(ValueError, match="mine has the classes dog, zebra, and the network tells cat, dog apart"):
        half_test.main(["--checkpoint", "run/model.pt"])


def test_only_the_result_on_its_own_data_is_kept_beside_a_run(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    half_test.main(["--checkpoint", str(run / "model.pt"), "--json"])
    kept = json.loads((run / "report.json").read_text())["test"]
    half_test.main(["--checkpoint", str(run / "last.pt"), "--json"])
    assert json.loads((run / "report.json").read_text())["test"] == kept
    real, digits = half_test.data_of, cifar10.load("digits")
    monkeypatch.setattr(half_test, "data_of", lambda *given: ("svhn", real(*given)[1]))
    monkeypatch.setattr(half_test.cifar10, "load", lambda *given: digits)
    half_test.main(["--checkpoint", str(run / "model.pt"), "--json"])
    assert json.loads((run / "report.json").read_text())["test"] == kept


def test_weight_beyond_half_precision_is_measured_in_others(trained, tmp_path, capsys):
    state = checkpoint.read(trained / "model.pt")
    state["weights"]["linear.bias"][0] = 1e6
    checkpoint.save(tmp_path / "big.pt", state)
    half_test.main(["--checkpoint", str(tmp_path / "big.pt"), "--precision", "float", "--json"])
    printed = capsys.readouterr()
    assert list(json.loads(printed.out)["bytes"]) == ["float32"] and "note: " in printed.err


def test_report_of_a_cycle_is_of_the_network_that_was_kept():
    history = pd.DataFrame({"parameters": [90, 80, 70], "validation_accuracy": [91.0, 92.0, 11.0]})
    for pruning_line, parameters, expected in (("l1_cycle", 80, 92.0), ("l1_cycle", None, 11.0), ("rounds", 80, 11.0)):
        row = report.row_of_result(history, {"pruning": pruning_line}, {"parameters": parameters})
        assert row["validation_accuracy"] == expected


# ---- files, messages, resuming

def test_a_run_that_fails_in_its_first_step_leaves_no_views(teachers, tmp_path, monkeypatch):
    def fail(*given):
        raise RuntimeError("no step")
    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(RuntimeError, match="no step"):
        train.main([*QUICK, "--teacher", str(teachers[0]), "--teacher-views", "2", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", ["history.csv", "views.pt"])
def test_a_study_begins_a_run_again_that_ended_in_its_first_epoch(left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "s-a-s0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"settings": {}}')
    (folder / left).write_text("x")
    calls = []
    monkeypatch.setattr(study, "call", lambda words, show=False: calls.append(
        sorted(path.name for path in folder.iterdir())))
    study.train_arm({"name": "a", "run": "train.py", "group": "g"}, "", 0, folder)
    assert calls == [[]]


def test_memory_that_runs_out_before_the_first_step_names_a_batch(tmp_path, monkeypatch):
    def time_steps(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(experiment.compiling, "time_steps", time_steps)
    with pytest.raises(RuntimeError, match="out of memory with --batch-size 32; try 16"):
        train.main([*QUICK, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_config_is_written_again(content, tmp_path, capsys):
    train.main([*QUICK, "--out", str(tmp_path)])
    (tmp_path / "config.json").write_text(content)
    train.main(["--resume", "--force", "--epochs", "2", "--out", str(tmp_path)])
    assert "config.json is damaged" in capsys.readouterr().err
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["epochs"] == [2]


def test_a_plateau_follows_the_rate_of_each_group():
    model = models.build("lenet5")
    settings = {**train.DEFAULTS, "optimizer": "muon", "schedule": "plateau", "epochs": [2], "lr": 0.1, "muon_lr": 0.02}
    before = experiment.make_optimizer(model, settings)
    plateau = schedules.make_schedule(before, "plateau", 10)
    state = {"optimizer": before.state_dict(), "schedule": plateau.state_dict(), "settings": settings}
    for group in state["optimizer"]["param_groups"]:
        group["lr"] /= 10                                        # the plateau has come down once
    changed = {**settings, "lr": 0.01, "muon_lr": 0.04}
    optimizer = experiment.make_optimizer(model, changed)
    run = SimpleNamespace(optimizer=optimizer, settings=changed, epoch=1, round=0, train=[0] * 5,
                          schedule=schedules.make_schedule(optimizer, "plateau", 10))
    schedules.restore(run, state)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.004, 0.001])


def test_a_name_that_a_stream_cannot_write_is_escaped(tmp_path, monkeypatch):
    import sys
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with streams.guarded() as (output, _):
            print("runs/größe")
            print("and on")
        assert output.problem is None
    assert (tmp_path / "out").read_text() == "runs/gr\\xf6\\xdfe\nand on\n"


def test_commands_that_are_printed_can_be_pasted(tmp_path, capsys):
    out = tmp_path / "a b"
    train.main([*QUICK, "--out", str(out)])
    command = capsys.readouterr().out.splitlines()[-1].split("next: python ")[1]
    assert shlex.split(command) == ["test.py", "--checkpoint", f"{out}/model.pt"]
    shutil.copy(out / "last.pt", out / "previous.pt")
    (out / "last.pt").write_bytes(b"PK")
    with pytest.raises(ValueError) as problem:
        folders.state_to_resume({"out": str(out)}, "train.py")
    assert shlex.split(str(problem.value).split("with: ")[1]) == ["cp", f"{out}/previous.pt", f"{out}/last.pt"]


def test_published_recipe_refuses_flips_that_it_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="--flips alternating does not go with --recipe published"):
        train.main([*SMALL, "--recipe", "published", "--flips", "alternating", "--out", str(tmp_path / "run")])


# ---- flags that change nothing

def test_a_flag_of_a_technique_that_is_off_is_told(tmp_path, capsys):
    train.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                [*QUICK, "--weight-bits", "3", "--out", str(tmp_path / "a")])
    assert "note: --weight-bits 3 changes nothing without --weights lsq\n" in capsys.readouterr().err
    train.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                [*QUICK, "--weight-bits", "3", "--weights", "lsq", "--out", str(tmp_path / "b")])
    assert "changes nothing" not in capsys.readouterr().err


def test_groups_for_a_network_without_them_are_told(tmp_path, capsys):
    train.start(train.__file__, "", train.SETTINGS, train.RECIPES,
                [*QUICK, "--model", "lenet5", "--groups", "4", "--out", str(tmp_path / "a")])
    assert "note: --groups 4 changes nothing: lenet5 has no groups\n" in capsys.readouterr().err


def test_the_published_recipe_refuses_a_crop_of_ones_own():
    with pytest.raises(ValueError, match="--pad 2 does not go with --recipe published, which crops by 4"):
        train.start(train.__file__, "", train.SETTINGS, train.RECIPES, [*QUICK, "--recipe", "published", "--pad", "2"])
