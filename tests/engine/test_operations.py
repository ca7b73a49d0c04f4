"""Operations: multiply-adds against torch's counter, of a forward pass and of a whole training step."""
import pytest
import torch
from sample_runs import history_of, start_training
from samples import macs_by_torch, small
from torch.utils.flop_counter import FlopCounterMode

import models
import train
from engine import operations


@small
def test_forward_passes_count_as_torch_counts_them(name, arguments, side):
    model = models.build(name, **arguments)
    assert operations.macs_of(model, (3, side, side)) == macs_by_torch(model, (3, side, side))


def test_a_training_step_counts_as_torch_counts_it(tmp_path):
    """Torch leaves out the gradient of the images, which nobody needs; the convention counts it."""
    run = start_training(tmp_path / "a", "--model", "resnet20", "--mixing", "none")
    train.begin_round(run)
    images, labels = next(iter(run.train))
    train.train_step(run, images, labels, 0)                 # counts the network, which takes a pass
    with FlopCounterMode(display=False) as counter:
        train.train_step(run, images, labels, 0)
    macs, first = operations.macs_of(run.model, (3, 32, 32)), 32 * 32 * 16 * 27
    assert counter.get_total_flops() == 1e15 * operations.step_pflop(macs, 32) - 2 * 32 * first


def test_a_history_adds_up_small_images_and_the_teacher(tmp_path):
    train.main("--dataset digits --limit 64 --batch-size 32 --epochs 1 --model lenet5 --mixing none --compile off "
               f"--device cpu --out {tmp_path / 'teacher'}".split())
    train.main("--dataset digits --limit 64 --batch-size 32 --epochs 2 --model resnet8-4-4-4 --mixing none "
               f"--compile off --resize 16 --teacher {tmp_path / 'teacher'} "
               f"--device cpu --out {tmp_path / 'student'}".split())
    model, teacher = models.build("resnet8-4-4-4"), models.build("lenet5")
    small_step, step = (operations.step_pflop(operations.macs_of(model, (3, side, side)), 64,
                                              operations.macs_of(teacher, (3, 32, 32))) for side in (16, 32))
    spent = [float(row["pflop"]) for row in history_of(tmp_path / "student")]
    assert spent == pytest.approx([small_step, small_step + step], abs=1e-6)


def test_counting_leaves_no_trace():
    model = models.build("resnet8-4-4-4").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operations.macs_of(model, (3, 16, 16))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
