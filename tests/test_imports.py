"""The house: imports go downward in its table, and importing a file does no work."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [         # a row imports from rows below it; of its own row from train.py alone
    {"study"},
    {"benchmark", "benchmarks", "studies.study_file"},
    {"train", "train_pruning", "test", "profil", "export", "predict", "report"},
    {"experiment"},
    {"set_cutmix_train"},      # and every other set_<name>_train
    {"networks"},
    {"pruning", "filter_pruning", "morphnet", "binaryconnect", "quantization"},
    {"models", "deploy"},
    {"resnet_factorized", "cifar10"},
    {"engine"},
]
FOLDERS = ("engine", "deploy", "benchmarks", "models")      # whose files may import each other
FILES = sorted(path for pattern in ("*.py", *(f"{name}/*.py" for name in (*FOLDERS, "studies")))
               for path in ROOT.glob(pattern))
LIGHT = [path for path in FILES if path != ROOT / "report.py"]      # which is tables and plots; nothing imports it
TECHNIQUE = re.compile(r"set_\w+_train")
SLOW = {"torchvision", "sklearn", "pandas", "matplotlib"}


def named(path):
    """A file as it is imported: `train`, `engine.checkpoint`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def row_of(name):
    """The row of a module, or of the folder that it is in; a technique of one's own is in the row of the others."""
    parents = ("set_cutmix_train" if TECHNIQUE.fullmatch(name) else name, name.split(".")[0])
    return next((row for row, names in enumerate(ROWS) if names & set(parents)), None)


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


def modules(nodes):
    """The modules, with their folders, that the import statements among `nodes` import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & {named(path) for path in FILES} or {node.module}
    return names


def test_files_are_found():
    assert {"train", "train_pruning", "cifar10", "pruning", "engine.checkpoint", "models.vgg"} <= set(map(named, FILES))


def test_the_root_holds_what_a_student_reads():
    assert len([path for path in ROOT.glob("*.py") if not TECHNIQUE.fullmatch(path.stem)]) <= 18


@pytest.mark.parametrize("path", FILES, ids=named)
def test_file_has_its_row_in_the_table(path):
    assert row_of(named(path)) is not None, f"{path.name} is in no row; a new file needs a reason that the table lacks"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_downward(path):
    own, project = named(path), set(map(named, FILES)) - {"test"}      # `test` is also in the library
    for name in modules(ast.walk(ast.parse(path.read_text()))):
        assert name != "test", f"{path.name} imports test.py"
        if name in project or name.split(".")[0] in FOLDERS:
            together = name.split(".")[0] == own.split(".")[0] in FOLDERS
            assert row_of(name) > row_of(own) or together or (row_of(name) == row_of(own) and name == "train"), \
                f"{own} imports {name} upward"


@pytest.mark.parametrize("path", LIGHT, ids=named)
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
    spec = importlib.util.spec_from_file_location("imported_" + path.replace("/", "_")[:-3], path)
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
