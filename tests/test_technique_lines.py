"""The block of technique lines is read as Python reads it: the right value, or one line that names what is wrong."""
import re
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import SMALL, run_script

import experiment
import pruning
import set_pruning_train
import set_quantization_train
import train
import train_pruning
from engine import checkpoint, commandline, settings

ROOT = Path(__file__).resolve().parents[1]
LINES = commandline.read_lines(ROOT / "train_pruning.py", train_pruning.SETTINGS)[0]
FIRST = {"MODEL": '"resnet18"', "GROUPS": "8", "SHUFFLE": "True", "MIXING": '"cutmix"', "WEIGHTS": '"float"',
         "PRUNING": '"rounds"', "SCORE": '"l1"', "SCHEDULE": '"one-cycle"', "AVERAGING": '"ema"', "OPTIMIZER": '"sgd"',
         "FLIPS": '"random"'}


def read_lines(path):
    """The lines of a copy of train_pruning.py."""
    return commandline.read_lines(path, train_pruning.SETTINGS)


def with_line(folder, group, value, script="train_pruning.py"):
    """A copy of a script whose active line of `group` has `value`, a text of Python."""
    text = (ROOT / script).read_text()
    assert f"\n{group} = {FIRST[group]}" in text
    path = folder / script
    path.write_text(text.replace(f"\n{group} = {FIRST[group]}", f"\n{group} = {value}", 1))
    return path


@pytest.mark.parametrize("group, value, told", [
    ("WEIGHTS", '"LSQ"', ["WEIGHTS = 'LSQ'", "'float', 'binary', 'binary-stochastic', 'lsq'"]),
    ("OPTIMIZER", '"Muon"', ["OPTIMIZER = 'Muon'", "'sgd', 'muon'"]),
    ("FLIPS", '"alternate"', ["FLIPS = 'alternate'", "'random', 'alternating'"]),
    ("SCHEDULE", '"onecycle"', ["SCHEDULE = 'onecycle'", "'one-cycle', 'cosine', 'plateau'"]),
    ("AVERAGING", '"EMA"', ["AVERAGING = 'EMA'", "'ema', 'none'"]),
    ("PRUNING", '"polynomal"', ["PRUNING = 'polynomal'", "'polynomial'"]),
    ("PRUNING", '"none"', ["PRUNING = 'none'", "'polynomial'"]),
    ("SCORE", '"LAMP"', ["SCORE = 'LAMP'", "'l1', 'lamp'"]),
    ("SHUFFLE", '"False"', ["SHUFFLE = 'False'", "True, False"]),
    ("SHUFFLE", "0", ["SHUFFLE = 0", "True, False"]),
    ("SHUFFLE", "false", ["SHUFFLE = false", "True or False"]),
    ("MIXING", '"cutmx"', ["MIXING = 'cutmx'", "'cutmix', 'cutout', 'mixup', 'none'"]),
    ("MIXING", "cutmix", ["MIXING = cutmix", "quotation marks"]),
    ("MIXING", "None", ["MIXING = None", "'none'"]),
    ("MIXING", '["cutmix"]', ["MIXING = ['cutmix']"]),
    ("MIXING", '"cut" - "mix"', ["MIXING = 'cut' - 'mix'"]),
    ("MIXING", '"cutmix', ["Python cannot read it", "line 4"]),
    ("GROUPS", '"8"', ["GROUPS = '8'", "whole number"]),
    ("GROUPS", "8.0", ["GROUPS = 8.0", "whole number"]),
    ("GROUPS", "True", ["GROUPS = True", "whole number"]),
    ("GROUPS", "8 // 0", ["GROUPS = 8 // 0", "zero"]),
    ("GROUPS", "WIDTH // 8", ["GROUPS = WIDTH // 8"]),
    ("MODEL", "18", ["MODEL = 18"]),
])
def test_a_value_that_the_group_does_not_have_is_refused(group, value, told, tmp_path):
    with pytest.raises(ValueError) as problem:
        read_lines(with_line(tmp_path, group, value))
    for part in ["train_pruning.py, line ", *told]:
        assert part in str(problem.value), problem.value


@pytest.mark.parametrize("group, value, meant", [
    ("GROUPS", "4 + 4", 8), ("GROUPS", "64 // 4", 16), ("GROUPS", "2", 2), ("SHUFFLE", "not True", False),
    ("MIXING", "'mixup'", "mixup"), ("MIXING", '"""none"""', "none"), ("MIXING", '("cut" "mix")', "cutmix"),
    ("MIXING", "(   # a comment within\n    'mixup')", "mixup"), ("MODEL", '"wrn-16-2"', "wrn-16-2"),
])
def test_a_value_means_what_it_means_in_python(group, value, meant, tmp_path):
    path = with_line(tmp_path, group, value)
    active = read_lines(path)[0]
    assert active == {**LINES, group.lower(): meant}
    assert type(active[group.lower()]) is type(meant)


@pytest.mark.parametrize("old, new", [
    ("\nMIXING = ", "\n\nMIXING = "), ("\nMIXING = ", "\n   \n\n# prose = more prose\nMIXING="),
    ("\n# MIXING = ", "\n\n#MIXING="), ("\nWEIGHTS = \"float\"", "\nWEIGHTS=\"float\"     "),
    ("\nGROUPS = 8 ", "\nGROUPS = 8; "), ("\nSCORE = ", "\nSCORE  =  "), ("\n# SCORE = ", "\n##   SCORE  =  "),
])
def test_blanks_and_comments_do_not_matter(old, new, tmp_path):
    text = (ROOT / "train_pruning.py").read_text()
    assert old in text
    (tmp_path / "train_pruning.py").write_text(text.replace(old, new, 1))
    assert read_lines(tmp_path / "train_pruning.py") == read_lines(ROOT / "train_pruning.py")


@pytest.mark.parametrize("old, new, told", [
    ("\nMIXING = ", "\nMIXNG = ", ["no group is called MIXNG", "MIXING"]),
    ("\nMIXING = ", "\n# MIXING = ", ["0 active MIXING lines", "'mixup'"]),
    ("\nSCORE = ", "\nSCORES = 1\nSCORE = ", ["no group is called SCORES"]),
    ("\nSCORE = ", "\nRECIPE = 'published'\nSCORE = ", ["no group is called RECIPE"]),
    ("\nSCORE = ", "\nscore = 1\nSCORE = ", ["score = 1 is no technique line"]),
    ("\nSCORE = ", "\nif True:\n    SCORE = ", ["is no technique line"]),
    ("\nSCORE = ", "\nSCORE = PRUNING = ", ["is no technique line"]),
    ("\nMIXING = ", '\nMIXING = "none"\nMIXING = ', ["2 active MIXING lines"]),
    ("# ---- techniques", "# techniques", ["# ---- techniques"]),
])
def test_a_block_that_is_none_is_refused(old, new, told, tmp_path):
    text = (ROOT / "train_pruning.py").read_text()
    assert old in text
    (tmp_path / "train_pruning.py").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as problem:
        read_lines(tmp_path / "train_pruning.py")
    assert all(part in str(problem.value) for part in told), problem.value


# ---- many blocks

VALUES = [value for group in FIRST for value in (FIRST[group], FIRST[group].upper())] + [
    '"mixup"', "'none'", '"lsq"', '"polynomial"', '"cosine"', "False", "4", "2 * 2", "None", "word", '"', "1e3", "()",
    "3 % 0", "lambda: 1", "__import__('os')", "4 +", "b'ema'", '"l" "1"', "-1"]
blank = st.sampled_from(["", " ", "   "])
line = st.one_of(
    st.builds("{}{}{}={}{}".format, st.sampled_from(["", "", "# ", "#"]), st.sampled_from(list(FIRST)), blank, blank,
              st.sampled_from(VALUES) | st.text(string.printable, max_size=8)),
    st.just(""), st.builds("# {}".format, st.text(string.printable, max_size=20)))


@given(st.lists(line, max_size=12))
def test_any_block_means_what_python_makes_of_it_or_is_one_clear_error(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "train_pruning.py"
    text = "\n".join(["# ---- techniques", *lines, "# ---- more", ""])
    path.write_text(text, newline="")
    try:
        active, choices = read_lines(path)
    except ValueError as problem:
        assert "train_pruning.py" in str(problem) and "\n" not in str(problem)
        return
    made = {}
    exec(compile(text, "block", "exec"), made)
    made = {name: value for name, value in made.items() if name.isupper()}
    assert active == {name.lower(): value for name, value in made.items()}
    for name, value in active.items():
        settings.check_value(train_pruning.SETTINGS[name], value, name)
        assert value in choices[name.upper()]


# ---- what is not in the block

def test_a_checkpoint_with_another_word_does_not_resume(finished, tmp_path):
    for name, value in (("weights", "LSQ"), ("schedule", "onecycle"), ("averaging", "EMA"), ("pruning", "polynomal"),
                        ("score", "LAMP"), ("mixing", "cutmx"), ("shuffle", "False"), ("compile", "maybe"),
                        ("optimizer", "Muon"), ("flips", "alternate"),
                        ("arithmetic", "int8"), ("convolutions", "sparse"), ("recipe", "mine"), ("groups", "8")):
        state = {**finished.states[0], "settings": {**finished.states[0]["settings"], name: value}}
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / "last.pt", state)
        with pytest.raises(ValueError, match=f"{name} '{value}'"):
            train_pruning.main(["--resume", "--out", str(tmp_path / name)])


def test_a_group_without_any_line_is_named(tmp_path, monkeypatch):
    for group in ("AVERAGING", "PRUNING", "OPTIMIZER"):
        text = re.sub(rf"^#? ?{group} = .*\n", "", (ROOT / "train_pruning.py").read_text(), flags=re.MULTILINE)
        script = tmp_path / "train_pruning.py"
        script.write_text(text)
        with pytest.raises(ValueError, match=f"train_pruning.py has no {group} line"):
            experiment.start(str(script), "", train_pruning.SETTINGS, train.RECIPES, SMALL)


def test_no_technique_is_what_remains():
    """A word that a function does not know is an error there too, not the other technique."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for call in (lambda: set_quantization_train.step_weights(model, "LSQ", "glorot", None, {}),
                 lambda: set_quantization_train.after_step(model, "Binary", "glorot"),
                 lambda: set_quantization_train.evaluation_weights(model, "", "glorot", {}),
                 lambda: pruning.global_masks(model, 0.5, score="LAMP"),
                 lambda: pruning.global_masks(model, 0.5, of="everything")):
        with pytest.raises(ValueError, match="choose"):
            call()
    with pytest.raises(KeyError):
        set_pruning_train.prune_on_schedule({"pruning": "polynomal", "sparsity": [0.5], "prune_begin": 0.0,
                                             "prune_end": 1.0, "prune_frequency": 1}, 0, 9, model, None, {})


@pytest.mark.parametrize("script, old, new, told", [
    ("train.py", '\nWEIGHTS = "float"', "\nWEIGHTS = float", ["WEIGHTS = float", "quotation marks"]),
    ("train.py", "\nSHUFFLE = True", "\nSHUFFLE = true", ["SHUFFLE = true", "capital"]),
    ("train_pruning.py", "\nGROUPS = 8", "\nGROUPS = 8 // 0", ["GROUPS = 8 // 0"]),
    ("train_pruning.py", '\nSCORE = "l1"', '\nSCORE = "LAMP"', ["SCORE = 'LAMP'", "'l1', 'lamp'"]),
])
def test_a_slip_in_a_line_is_one_error_from_the_shell(script, old, new, told, tmp_path):
    text = (ROOT / script).read_text()
    assert old in text
    (tmp_path / script).write_text(text.replace(old, new, 1))
    code, line = run_script(tmp_path / script, *SMALL, "--out", tmp_path / "run", PYTHONPATH=str(ROOT))
    assert code == 2 and all(part in line for part in [script, *told]), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train_pruning.py", "test.py", "profil.py"])
def test_a_slip_in_lines_that_another_script_imports_is_one_error_too(script, tmp_path):
    text = (ROOT / "train.py").read_text()
    assert '\nMIXING = "cutmix"' in text
    (tmp_path / "train.py").write_text(text.replace('\nMIXING = "cutmix"', "\nMIXING = cutmx", 1))
    (tmp_path / script).write_text((ROOT / script).read_text())
    code, line = run_script(tmp_path / script, "--help", PYTHONPATH=str(ROOT))
    assert code == 2 and "train.py, line " in line and "MIXING = cutmx" in line, line


@pytest.mark.parametrize("name, word", [("averaging", "EMA"), ("flips", "alternate"), ("schedule", "onecycle"),
                                        ("optimizer", "Muon")])
def test_a_run_with_another_word_does_not_begin(name, word, tmp_path):
    """Also where nothing has checked its settings: it must not be trained without the technique."""
    run = experiment.start(str(ROOT / "train.py"), "", train.SETTINGS, train.RECIPES,
                           [*SMALL, "--model", "lenet5", "--out", str(tmp_path / "run")])
    other = {**run.settings, "out": str(tmp_path / "other")}
    experiment.begin_round(experiment.prepare(other, None))
    with pytest.raises(KeyError, match=word):
        experiment.begin_round(experiment.prepare({**other, name: word}, None))
