"""Fixtures that several test modules share."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("DATA_ROOT", ROOT.parent / "shared" / "data"))     # real data sets, where there are some


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run: digits, three rounds of one epoch, 91 % pruned."""
    import train_pruning
    out = tmp_path_factory.mktemp("runs") / "trained"
    train_pruning.main(["--dataset", "digits", "--limit", "96", "--batch-size", "32", "--epochs", "1", "1", "1",
                        "--sparsity", "0.7", "0.7", "--compile", "off", "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def real_cifar10(tmp_path_factory):
    """A folder that holds the real cifar10.npz; a test that asks for it says so where there is none."""
    if (ROOT / "data" / "cifar10.npz").exists():
        return ROOT / "data"
    script = DATA / "unpack_cifar10.py"
    if not script.exists():
        pytest.skip(f"needs the real CIFAR-10 as {ROOT / 'data' / 'cifar10.npz'}, or {script}")
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def resnet():
    """ResNet-18 with 8 groups, its sizes and its widths; tests leave it as it is."""
    import morphnet
    import resnet_factorized
    torch.manual_seed(0)
    model = resnet_factorized.build("resnet18", 8)
    return model, morphnet.sizes_of(model, (3, 32, 32)), morphnet.structure_of(model, None)


@pytest.fixture(scope="module")
def one_thread():
    """As in the other processes of a test: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test starts from the same global generator."""
    torch.manual_seed(0)


class Stop(Exception):
    """Raised by a test in the middle of a run."""


def stop_after_a_save(patch):
    """Make the next epoch of any run end in `Stop` once it is saved."""
    import train
    real = train.save

    def save(run):
        real(run)
        raise Stop
    patch.setattr(train, "save", save)


def run_in_parts(begin, out, epochs):
    """Stop a run of train_pruning.py in `out` after each of its epochs, and resume it until it is finished.

    begin: starts it; each part finds torch's global generator in another state.
    """
    import train_pruning
    with pytest.MonkeyPatch.context() as patch:
        stop_after_a_save(patch)
        for epoch in range(epochs):
            torch.manual_seed(1000 + epoch)
            with pytest.raises(Stop):
                train_pruning.main(["--resume", "--out", str(out)]) if epoch else begin()
    train_pruning.main(["--resume", "--out", str(out)])


def same(one, other):
    """Equal in types, keys, dtypes, shapes and every bit of every tensor."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return (one.dtype == other.dtype and one.shape == other.shape
                and one.contiguous().flatten().view(torch.uint8).equal(other.contiguous().flatten().view(torch.uint8)))
    return one == other
