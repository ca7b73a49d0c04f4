"""Pictures in, classes out: the same as on the tensors, in PyTorch and in ONNX Runtime."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import cifar10
import export
import networks
import predict
import train


@pytest.fixture(scope="module")
def digit_pictures(tmp_path_factory):
    """Eight test digits as PNG files, and their arrays."""
    folder, data = tmp_path_factory.mktemp("pictures"), cifar10.load("digits")
    for number, image in enumerate(data.x_test[:8]):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder, data.x_test[:8], data.y_test[:8]


@pytest.mark.parametrize("ending", ["pt", "onnx"])
def test_a_folder_of_pictures_is_classified_as_the_images_are(ending, trained, digit_pictures, tmp_path, capsys):
    folder, images, labels = digit_pictures
    path = trained / "model.pt"
    if ending == "onnx":
        export.export(*networks.load_network(path), tmp_path / "model.onnx")
        path = tmp_path / "model.onnx"
    predict.main([str(folder), "--checkpoint", str(path), "--dataset", "digits", "--json", "--top", "10"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, _ = networks.load_network(trained / "model.pt")
    batches = cifar10.Batches(images, labels, 8, cifar10.KINDS["digits"])
    shares = train.predict(model, batches, torch.device("cpu"))[0].softmax(1)
    assert [row["picture"].rsplit("/", 1)[1] for row in rows] == [f"{number}.png" for number in range(8)]
    for row, expected in zip(rows, shares, strict=True):
        found = [row["classes"][str(digit)] for digit in range(10)]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)
        assert list(row["classes"].values()) == sorted(found, reverse=True)


def test_one_line_a_picture(trained, digit_pictures, capsys):
    predict.main([str(digit_pictures[0] / "0.png"), "--checkpoint", str(trained / "model.pt")])
    line = capsys.readouterr().out
    assert line.startswith(f"{digit_pictures[0]}/0.png: ") and line.endswith(" %\n") and line.count("\n") == 1


def test_any_size_and_mode_becomes_the_middle_square(tmp_path):
    kind = cifar10.KINDS["cifar10"]
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 28:100] = 255                                  # the middle square is white, and what smoothing reads
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(np.full((5, 5), 255, np.uint8), "L").save(tmp_path / "gray.png")
    for name in ("wide.png", "gray.png"):
        pixels = predict.read_picture(tmp_path / name, kind)
        white = (1 - torch.tensor(kind.mean)) / torch.tensor(kind.std)
        torch.testing.assert_close(pixels, white.view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_what_is_no_picture_is_one_clear_error(trained, tmp_path, digit_pictures):
    checkpoint = ["--checkpoint", str(trained / "model.pt")]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png is no picture that can be read: its format is unknown"):
        predict.main([str(tmp_path / "text.png"), *checkpoint])
    content = (digit_pictures[0] / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match="half.png is no picture that can be read"):
        predict.main([str(tmp_path / "half.png"), *checkpoint])
    with pytest.raises(ValueError, match="there is no file at .*none.png"):
        predict.main([str(tmp_path / "none.png"), *checkpoint])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture"):
        predict.main([str(tmp_path / "empty"), *checkpoint])
    with pytest.raises(ValueError, match="--top 0"):
        predict.main([str(digit_pictures[0]), "--top", "0", *checkpoint])


def test_a_network_of_another_origin_that_cannot_take_pictures_is_named(digit_pictures, tmp_path, capfd):
    import onnx
    from onnx import TensorProto, helper
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [3 * 64 * 64, 10], np.zeros(3 * 64 * 64 * 10))
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "weight"], ["logits"])],
        "g", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "f.onnx")
    with pytest.raises(ValueError, match="f.onnx cannot take images of 3 x 32 x 32: ") as problem:
        predict.main([str(digit_pictures[0]), "--checkpoint", str(tmp_path / "f.onnx")])
    assert str(problem.value).count("cannot take") == 1 and "\n" not in str(problem.value)
    assert "onnxruntime" not in capfd.readouterr().err
