"""Read and check a study's JSON file: whatever would fail or mislead later is refused before any training.

`read_study` returns the study; `settings_of` the settings of an arm; `check_runs` compares
these with the existing runs; `check_out` checks that the table's folder belongs to this study.
"""
import itertools
import json
import math
import os
import shlex
from pathlib import Path

import cifar10
import experiment
import networks
import train
import train_pruning
from engine import checkpoint, commandline, files, run_files
from engine.settings import defaults_of, names_of

PARTS = {"flags": str, "seeds": list, "arms": list}      # of every study; factors with a run make the arms
KNOWN = {"a study": {*PARTS, "title", "factors", "run"},
         "an arm": {"group", "name", "run", "keep", "against"}}
SCRIPTS = {"train.py": train, "train_pruning.py": train_pruning}
OWN = {"seed", "out", "data", "resume", "force", "dry_run"}          # set by the study itself
NOT_COMPARED = {*names_of(train.SETTINGS, "free"), "lines", "script"}
WRITTEN = {"runs.csv", "table.csv", "table.md", "accuracy.png", "influence.csv", "influence.png", "study.json"}


# ---- the file

def read_study(path):
    """The study in a JSON file; ValueError if a part is missing or malformed, or an arm's flags are refused."""
    try:
        study = files.parse_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is no JSON: {problem}") from None
    if not isinstance(study, dict):
        raise ValueError(f"{path} holds {str(study)[:40]!r}; a study is an object with {', '.join(PARTS)}")
    check_known(path, "a study", study)
    if "factors" in study:
        study["arms"] = combine(path, study)
    for name, form in PARTS.items():
        if not isinstance(study.get(name), form) or not study[name] and form is list:
            raise ValueError(f"{path}: {name!r} must be a {form.__name__}" + (" that is not empty" * (form is list)))
    if not isinstance(study.setdefault("title", Path(path).stem), str):
        raise ValueError(f"{path}: 'title' must be text")
    check_seeds(study["seeds"], f"{path}: 'seeds'")
    for place, arm in enumerate(study["arms"]):
        check_arm(path, place, arm)
        if "factors" not in study:        # arms made from factors hold their factors, too
            check_known(path, "an arm", arm)
    check_names(path, study["arms"])
    for arm in study["arms"]:
        check_flags(path, study, arm)
    return study


def check_known(path, kind, held):
    """ValueError for an unknown part of a study or arm: a misspelt name would otherwise be ignored silently."""
    unknown = [name for name in held if name not in KNOWN[kind]]
    if unknown:
        raise ValueError(f"{path}: {unknown[0][:40]!a} is no part of {kind}; there are "
                         f"{', '.join(sorted(KNOWN[kind]))}")


def check_seeds(seeds, where):
    """ValueError unless all seeds are distinct whole numbers of at least 0."""
    for place, seed in enumerate(seeds):
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"{where} holds {str(seed)[:40]!r}; a seed is a whole number from 0")
        if seed in seeds[:place]:
            raise ValueError(f"{where} holds {seed} twice; one run would count as two")


def check_arm(path, place, arm):
    """ValueError unless an arm has all its parts, in the right form."""
    if not isinstance(arm, dict) or not all(isinstance(arm.get(part), str) for part in ("group", "name", "run")):
        raise ValueError(f"{path}: arm {place} must have a group, a name and a run, all text")
    for part in ("group", "name"):
        if not arm[part].isprintable():           # a table has one line per arm, and is UTF-8
            raise ValueError(f"{path}: arm {place} has the {part} {arm[part][:40]!a}; it must be one line of text")
    if not any(letter.isalnum() for letter in arm["name"]):
        raise ValueError(f"{path}: arm {place} is called {arm['name']!r}; a name needs a letter or a digit")
    if arm["run"].split()[:1] not in [[script] for script in SCRIPTS]:
        raise ValueError(f"{path}: arm {arm['name']!r} must run {' or '.join(SCRIPTS)}")
    keep = arm.setdefault("keep", {})
    if not isinstance(keep, dict) or not all(isinstance(kept, str) for kept in keep.values()):
        raise ValueError(f"{path}: arm {arm['name']!r} keeps {str(keep)[:40]!r}; it must be an object of texts")
    for kept in keep.values():
        if kept in WRITTEN or not kept or kept in (".", "..") or set(kept) & set("/\\\0"):
            raise ValueError(f"{path}: arm {arm['name']!r} keeps a file as {kept!r}, which is no name of its own")


def check_names(path, arms):
    """ValueError if two arms share a name, a folder or a kept file, or `against` names no arm. Sets `against`."""
    names, folders, kept = [arm["name"] for arm in arms], {}, {}
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: two arms are called {twice[0]!r}")
    for arm in arms:
        # some file systems do not distinguish upper and lower case
        other = folders.setdefault(str(folder_of("", arm, 0)).casefold(), arm["name"])
        if other != arm["name"]:
            raise ValueError(f"{path}: arms {other!r} and {arm['name']!r} would share a folder, since only letters and "
                             "digits of a name are in it; rename one")
        for name in arm["keep"].values():
            if kept.setdefault(name, arm["name"]) != arm["name"] or list(arm["keep"].values()).count(name) > 1:
                raise ValueError(f"{path}: two files are kept as {name!r}, by {kept[name]!r} and {arm['name']!r}")
        against = arm.setdefault("against", names[0])
        if against not in names:
            raise ValueError(f"{path}: arm {arm['name']!r} is against {str(against)[:40]!r}, which is no arm")


def combine(path, study):
    """An arm for every combination of the factors' values; ValueError for a malformed factor."""
    factors, run = study["factors"], study.get("run")
    if not isinstance(factors, dict) or not factors:
        raise ValueError(f"{path}: factors must be an object that is not empty")
    for name, factor in factors.items():
        values = factor.get("values") if isinstance(factor, dict) else None
        if not isinstance(run, str) or not isinstance(values, list) or len(values) < 2 or not is_flag(factor):
            raise ValueError(f"{path}: factors need a run, and {name!r} a flag and two values or more")
        if not all(type(value) in (int, float) and run_files.small(value) for value in values):
            raise ValueError(f"{path}: factor {name!r} has values that are no numbers ({str(values)[:60]}); its "
                             "influence is reckoned from them: make arms of such a choice")
        if len(set(values)) < len(values):
            raise ValueError(f"{path}: factor {name!r} has a value twice: {str(values)[:60]}")
    if "arms" in study:
        raise ValueError(f"{path}: factors make the arms; leave out one of the two")
    if math.prod(len(factor["values"]) for factor in factors.values()) > 10_000:
        raise ValueError(f"{path}: the factors have more than 10,000 combinations")
    flags = [factor["flag"] for factor in factors.values()]
    twice = next((flag for flag in flags if flags.count(flag) > 1), None)
    if twice:
        raise ValueError(f"{path}: two factors are of the flag {twice}, and only the last would count")
    arms = []
    for values in itertools.product(*(factor["values"] for factor in factors.values())):
        chosen = dict(zip(factors, values, strict=True))
        flags = " ".join(f"{factors[name]['flag']} {value}" for name, value in chosen.items())
        arms.append({"group": "factors", "name": ", ".join(f"{name} {value}" for name, value in chosen.items()),
                     "run": f"{run} {flags}", "factors": chosen})
    return arms


def is_flag(factor):
    """Whether a factor's flag has the form of a flag."""
    flag = factor.get("flag")
    return isinstance(flag, str) and flag.startswith("--") and len(flag.split()) == 1


# ---- what an arm trains with

def folder_of(study, arm, seed):
    """The folder of an arm's run: runs/<study>-<arm>-s<seed>."""
    words = "".join(letter if letter.isalnum() else " " for letter in arm["name"]).split()
    return Path("runs") / "-".join([study, *words, f"s{seed}"])


def command_of(study, arm, seed):
    """The script of an arm, and its flags for a seed as a list, without those that the study itself sets."""
    script, *own = shlex.split(arm["run"].replace("{seed}", str(seed)))
    return script, [*shlex.split(study["flags"]), *own]


def given_flags(script, flags):
    """({name: value} of the given flags of a training script, its technique lines)."""
    module = SCRIPTS[script]
    lines = commandline.lines_of(module.__file__, module.SETTINGS)
    return vars(commandline.training_parser("", module.SETTINGS).parse_args(flags)), lines


def settings_of(study, arm, seed):
    """The settings that the training script would derive from an arm's flags (as in `experiment.start`)."""
    script, flags = command_of(study, arm, seed)
    given, lines = given_flags(script, flags)
    table = SCRIPTS[script].SETTINGS
    given |= {name: str(checkpoint.meant(given[name])) for name in ("teacher", "start") if given.get(name)}
    settings = experiment.fresh_settings(script, table, lines, train.RECIPES, {**given, "seed": seed})
    experiment.check_settings(table, settings)
    return settings


def check_flags(path, study, arm):
    """ValueError with the arm's name if its training script would refuse its flags, or the study sets them itself."""
    try:
        given, _ = given_flags(*command_of(study, arm, study["seeds"][0]))
        taken = sorted(OWN & given.keys())
        if taken:
            raise ValueError(f"--{taken[0].replace('_', '-')} is set by study.py itself")
        networks.architecture_of(settings_of(study, arm, study["seeds"][0]))
    except (ValueError, OSError) as problem:
        raise ValueError(f"{path}: arm {arm['name']!r}: {problem}") from None
    except SystemExit:
        raise ValueError(f"{path}: arm {arm['name']!r}: --help trains nothing") from None


# ---- existing runs and tables

def check_runs(name, study, seeds):
    """ValueError if an existing run was trained with other settings than its arm has now."""
    for arm, seed in itertools.product(study["arms"], seeds):
        folder = folder_of(name, arm, seed)
        if (folder / "config.json").exists() and ((folder / "finished").exists() or (folder / "last.pt").exists()):
            before = defaults_of(SCRIPTS[command_of(study, arm, seed)[0]].SETTINGS)
            config = run_files.read_config(folder)
            stored = {**before, **config["settings"]}
            differ = differences(stored, settings_of(study, arm, seed))
            if differ:
                raise ValueError(f"{folder} was trained with other settings than arm {arm['name']!r} has now "
                                 f"({'; '.join(differ)}); rename the arm or the study, or move that folder away")
            refuse_other_files(folder, stored, config.get("sha256") or {})


def refuse_other_files(folder, stored, sha256):
    """ValueError if the teacher, the start or the pictures have changed since the run in `folder` began."""
    start = run_files.start_of(stored)
    paths = {"teacher": stored.get("teacher"), "start": start and checkpoint.meant(start),
             "pictures": stored["dataset"]}
    for name, before in sha256.items():
        path = paths.get(name)
        if not path or not Path(path).exists():
            continue
        now = cifar10.sha256_of(cifar10.load(path)) if name == "pictures" else files.sha256_of(path)
        if now != before:
            raise ValueError(f"{folder} was trained with another {name} than {path} is now; move that folder away to "
                             "train it again, or put back what was there")


def differences(stored, wanted):
    """["lr: 0.1 then, 0.2 now", ...] where a run's settings differ from an arm's; those not stored are skipped.

    An L1 cycle appends the epochs of its steps to those that it was given.
    """
    wanted = json.loads(json.dumps({name: value for name, value in wanted.items() if name not in NOT_COMPARED}))
    stored = dict(stored)
    if stored.get("pruning") == "l1_cycle" and isinstance(stored.get("epochs"), list):
        stored["epochs"] = stored["epochs"][:len(wanted["epochs"])]
    return [f"{name}: {stored[name]} then, {value} now" for name, value in wanted.items()
            if name in stored and stored[name] != value]


def check_out(path, out):
    """ValueError if the table in `out` belongs to another study file that still exists."""
    if (Path(out) / "time.csv").exists():
        raise ValueError(f"{out} holds the tables of report.py; choose another --out")
    record = Path(out) / "study.json"
    other = files.read_json(record).get("study") if record.exists() else None
    if isinstance(other, str) and Path(other).is_file() and not os.path.samefile(other, path):
        raise ValueError(f"{out} holds the table of {other}, not of {path}; rename one of the two, or choose another "
                         "--out")


def write_record(path, out):
    """Store beside the table the path of its study file, relative if that is below the current folder."""
    path, here = Path(path).resolve(), Path.cwd().resolve()
    named = path.relative_to(here) if path.is_relative_to(here) else path
    files.write(Path(out) / "study.json", (json.dumps({"study": named.as_posix()}) + "\n").encode())
