"""ONNX files: the same outputs in ONNX Runtime, shrunk networks included, and int8 that still classifies."""
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import networks
from deploy import onnx_files
from engine import shrinking


def outputs(model, path, count):
    images = torch.randn(count, 3, 32, 32)
    with torch.no_grad():
        return model(images), onnx_files.open_onnx(path)(images)


@pytest.mark.parametrize("architecture", [
    {"name": "resnet18", "groups": 8, "shuffle": True}, {"name": "mobilenet"}, {"name": "resnet20", "shortcut": "A"},
    {"name": "wrn-10-2"}, {"name": "lenet5", "activation": "gelu", "pooling": "average"}])
def test_onnx_runtime_gives_the_same_logits_for_any_batch(architecture, tmp_path):
    model = networks.build(**architecture)
    model.train()(torch.randn(8, 3, 32, 32))             # statistics that are not those of the start
    onnx_files.write_onnx(model, tmp_path / "model.onnx", (3, 32, 32))
    assert model.training
    for count in (1, 5):
        ours, theirs = outputs(model.eval(), tmp_path / "model.onnx", count)
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_shrunk_blocks_are_written_as_they_are(tmp_path):
    model = networks.build("resnet18").eval()
    for space in model.channels():
        if not space["name"].startswith("stream"):
            rows, columns = shrinking.partitions(model, space)
            weak = torch.rand(len(rows)) < 0.7
            shrinking.remove(model, space, shrinking.balanced(weak, torch.rand(len(rows)), rows, columns))
    block = model.layer3[1]
    block.conv1 = block.bn1 = block.conv2 = block.bn2 = None
    onnx_files.write_onnx(model, tmp_path / "model.onnx", (3, 32, 32))
    ours, theirs = outputs(model, tmp_path / "model.onnx", 3)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_int8_is_a_quarter_and_close(tmp_path):
    model = networks.build("resnet20").eval()
    path, small = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    onnx_files.write_onnx(model, path, (3, 32, 32))
    onnx_files.quantize_onnx(path, small, (torch.randn(16, 3, 32, 32) for _ in range(4)))
    assert small.stat().st_size < 0.5 * path.stat().st_size
    images = torch.randn(64, 3, 32, 32)
    exact, rough = (onnx_files.open_onnx(name)(images) for name in (path, small))
    assert 0 < (exact - rough).abs().max() < 0.3 * exact.std() + 0.3 * exact.abs().mean()
    assert (exact.argmax(1) == rough.argmax(1)).float().mean() > 0.8


def test_weights_stored_in_eight_bits_are_floats_again_when_the_file_is_opened(tmp_path):
    model = networks.build("resnet20").eval()
    path, small, opened = tmp_path / "model.onnx", tmp_path / "w8.onnx", tmp_path / "opened.onnx"
    onnx_files.write_onnx(model, path, (3, 32, 32))
    onnx_files.store_in_eight_bits(path, small)
    assert small.stat().st_size < 0.3 * path.stat().st_size
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(opened)
    onnxruntime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load_model(str(opened)).graph.node}
    assert any("Conv" in kind for kind in kinds) and not kinds & {"Cast", "Mul"}
    images = torch.randn(64, 3, 32, 32)
    exact, rounded = (onnx_files.open_onnx(name)(images) for name in (path, small))
    assert 0 < (exact - rounded).abs().mean() < 0.05 * exact.std()
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.95


def test_a_failed_export_leaves_no_file_and_the_mode(tmp_path):
    class Odd(nn.Module):
        def forward(self, images):
            raise RuntimeError("cannot run")
    model = Odd().train()
    with pytest.raises(RuntimeError, match="cannot run"):
        onnx_files.write_onnx(model, tmp_path / "model.onnx", (3, 32, 32))
    assert model.training and not list(tmp_path.iterdir())


def test_what_is_no_onnx_file_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file at"):
        onnx_files.open_onnx(tmp_path / "none.onnx")
    (tmp_path / "page.onnx").write_text("<html>")
    with pytest.raises(ValueError, match="page.onnx is no ONNX network"):
        onnx_files.open_onnx(tmp_path / "page.onnx")
