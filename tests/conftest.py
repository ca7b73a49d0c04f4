"""Fixtures that several test modules share."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("DATA_ROOT", ROOT.parent / "shared" / "data"))     # real data sets, where there are some
pytest.register_assert_rewrite("samples", "sample_runs")
settings.register_profile("project", deadline=None)      # a busy machine is no fault
settings.load_profile("project")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:          # `-n 2`: the processes of pytest share the cores
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(share)         # of what a test starts
    torch.set_num_threads(share)


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


@contextlib.contextmanager
def threads(number):
    """torch computes on so many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """As in the other processes of a test: sums depend on the number of threads."""
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test starts from the same global generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of three rounds that nothing disturbed: its folder, and last.pt as it was after each epoch."""
    from sample_runs import ROUNDS

    import train
    import train_pruning
    from engine import checkpoint
    out, states, real = tmp_path_factory.mktemp("finished") / "run", [], train.save

    def save(run):
        real(run)
        states.append(checkpoint.read(run.out / "last.pt"))
    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save", save)
        train_pruning.main([*ROUNDS, "--out", str(out)])
    return SimpleNamespace(out=out, states=states)


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """The same run, with Ctrl-C pressed twice after the first epoch: folder, exit code, both outputs."""
    from sample_runs import ROUNDS, launch, wait_for
    out = tmp_path_factory.mktemp("interrupted") / "run"
    process = launch(*ROUNDS, "--out", out)
    wait_for(process, lambda: (out / "last.pt").exists())
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    return SimpleNamespace(out=out, code=process.returncode, output=output, errors=errors)


@pytest.fixture
def shell(monkeypatch, capsys):
    """shell("train.py", *flags) -> (exit code, its one error line), as the script run from a shell, but in here."""
    from sample_runs import SCRIPTS, one_line

    from engine import commandline

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        handler = signal.getsignal(signal.SIGINT)
        capsys.readouterr()
        try:
            with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
                commandline.command(SCRIPTS.get(script, script))
        finally:
            signal.signal(signal.SIGINT, handler)
        assert ended.type is SystemExit, "the second Ctrl-C broke the way out"
        return ended.value.code, one_line(capsys.readouterr().err)
    return call
