"""The house: imports go downward in its table, and importing a file does no work."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"study"},
    {"training_profile", "study_file"},
    {"train", "train_pruning", "test", "profil", "benchmark", "export", "predict", "report",
     "deployment"},
    {"experiment"},
    {"set_cutmix_train", "set_mixup_train", "set_pruning_train", "set_quantization_train",
     "set_distillation_train", "set_resizing_train", "set_cutout_train", "set_optimizer_train"},
    {"networks", "run_files", "tables"},
    {"pruning", "filter_pruning", "morphnet", "binaryconnect", "quantization"},
    {"models", "onnx_files", "integer_inference"},
    {"vgg"},
    {"resnet_factorized", "cifar10", "checkpoint", "commandline", "compiling", "draws",
     "parallel", "shrinking", "folders", "schedules", "operations"},
    {"packing", "originals", "pictures", "streams"},
]
FILES = sorted(ROOT.glob("*.py"))
LIGHT = [path for path in FILES if path.stem != "report"]      # report.py is tables and plots, and nothing imports it
SLOW = {"torchvision", "sklearn", "pandas", "matplotlib"}


def row_of(name):
    return next((row for row, names in enumerate(ROWS) if name in names), None)


def imported(nodes):
    """Top-level names of the modules that the import statements among `nodes` import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if not node.level else ".")
    return names


def runs_at_import(node):
    """The statements of a module that run when it is imported: all outside functions, except under __main__."""
    for child in ast.iter_child_nodes(node):
        main = isinstance(child, ast.If) and "__name__" in ast.dump(child.test)
        if not main and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from runs_at_import(child)


def test_files_are_found():
    assert {"train", "train_pruning", "cifar10", "pruning"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_has_its_row_in_the_table(path):
    assert row_of(path.stem) is not None, f"{path.name} is in no row; a new file needs a reason that the table lacks"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_downward(path):
    own, project = row_of(path.stem), {file.stem for file in FILES} - {"test"}      # `test` is also in the library
    for name in imported(ast.walk(ast.parse(path.read_text()))):
        assert name != ".", f"{path.name} imports relatively"
        assert name != "test", f"{path.name} imports test.py"
        if name in project:
            below = own is not None and row_of(name) is not None and row_of(name) > own
            assert below or (row_of(name) == own and name == "train"), f"{path.name} imports {name} upward"


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_slow_libraries_are_not_imported_at_the_start(path):
    assert not imported(runs_at_import(ast.parse(path.read_text()))) & SLOW


def test_importing_every_file_prints_writes_and_loads_nothing_of_its_own(tmp_path):
    """All in one process: no output, no file, no draw from torch's generator, no slow library."""
    program = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
for path in {[str(path) for path in LIGHT]!r}:
    spec = importlib.util.spec_from_file_location("imported_" + path.split("/")[-1][:-3], path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
assert torch.equal(state, torch.get_rng_state()), "a file draws random numbers"
assert threads == torch.get_num_threads(), "a file sets the number of threads"
assert not torch.cuda.is_initialized()
loaded = {SLOW!r} & set(sys.modules)
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-B", "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""
    assert not list(tmp_path.iterdir())
