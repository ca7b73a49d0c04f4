"""Passes that measure leave each module in its own mode, also where one of them was set apart or the pass fails."""
import pytest
import torch
from torch import nn

import profil
import pruning
import quantization
import train
from deploy import onnx_files
from engine import operations
from set_resizing_train import takes

CPU = torch.device("cpu")


def frozen_norm():
    """A network in training whose first batch norm is in evaluation, as when it is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)).train()
    model[1].eval()
    return model


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PASSES = {
    "macs_of": lambda model, folder: operations.macs_of(model, (3, 8, 8)),
    "count_layers": lambda model, folder: profil.count_layers(model, (3, 8, 8)),
    "input_ranges": lambda model, folder: quantization.input_ranges(model, [(IMAGES, None)] * 2),
    "predict": lambda model, folder: train.predict(model, [(IMAGES, torch.zeros(4))], CPU),
    "recalibrate": lambda model, folder: pruning.recalibrate(model, [(IMAGES,)]),
    "takes": lambda model, folder: takes(model, 3, 8),
    "write_onnx": lambda model, folder: onnx_files.write_onnx(model, folder / "a.onnx", (3, 8, 8)),
}


@pytest.mark.parametrize("name", PASSES)
def test_each_module_is_in_its_own_mode_afterwards(name, tmp_path):
    model = frozen_norm()
    before = {name: module.training for name, module in model.named_modules()}
    PASSES[name](model, tmp_path)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert before[""] and not before["1"]


@pytest.mark.parametrize("name", ["macs_of", "count_layers", "input_ranges", "predict", "recalibrate"])
def test_so_it_is_where_the_pass_fails(name, tmp_path):
    model = frozen_norm()
    model[2] = nn.Conv2d(7, 4, 3)                       # which takes other channels than there are
    with pytest.raises(RuntimeError):
        PASSES[name](model, tmp_path)
    assert model.training and model[3].training and not model[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
