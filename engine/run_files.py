"""Write and read a run's files beside its checkpoints: `config.json`, `history.csv`, `report.json`.

Each reading function returns plain values in the form that study.py and report.py rely on;
otherwise ValueError names the file and the first value of another form.
"""
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from engine import checkpoint, commandline, files, originals, parallel

# {setting: its type}; those of OPTIONAL may be missing or null
SETTINGS = {"dataset": str, "mixing": str, "recipe": str, "seed": int, "sparsity": list}
OWN = ("config.json", "history.csv", "last.pt", "model.pt", "previous.pt", "report.json", "views.pt")
OPTIONAL = {"pruning": str, "score": str, "weights": str, "cycle_settings": dict, "limit": int}
EPOCH = ("round", "seconds", "images_per_second", "train_accuracy", "validation_loss", "validation_accuracy")
PROFILE = ("parameters", "nonzero", "parameters_removed", "macs", "macs_removed", "score_course")
FOLDERS = ("engine", "models", "deploy")      # folders whose sources a run stores, besides the scripts
NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def is_result(path):
    """Whether a checkpoint is the one that a run's report.json describes: model.pt, or last.pt if there is none."""
    path = Path(path)
    return (path.parent / "config.json").exists() and (
        path.name == "model.pt" or path.name == "last.pt" and not (path.parent / "model.pt").exists())


def keep_measured(path, sha256, network, part, measured):
    """Store `measured`, measured on a run's result with this SHA-256, in its report.json as `part`, test or profile.

    network: the file's dictionary. If writing fails or the file has changed since, this only prints a note.
    """
    with files.noted():
        if files.sha256_of(path) != sha256:
            raise ValueError(f"{path} has changed since it was read; its {part} is not kept in report.json")
        epochs = network.get("epochs", len(network.get("history") or ()) or None)
        files.merge_json(Path(path).parent / "report.json", {part: {**measured, "epochs": epochs, "sha256": sha256}})


def refuse_own(flag, path):
    """ValueError if the output file `path` of `flag` is one that a run needs."""
    path = Path(path)
    if path.name in OWN and (path.parent / "config.json").exists():
        raise ValueError(f"{flag} {path} is a file of the run in {path.parent}, which would be lost; name another file")


def check_target(path, reads=(), beside=()):
    """ValueError if the numbers of --json cannot be written to `path`; reads: the checkpoints that they come from.

    `path` must end in .json and must not be a file that a run needs. beside: endings of the table and plot written
    beside it; if they exist without the .json file they belong to something else and are not overwritten.
    """
    if Path(path).suffix != ".json":
        raise ValueError(f"--json {path}: it must end in .json")
    refuse_own("--json", path)
    other = next((other for ending in beside if (other := Path(path).with_suffix(ending)).exists()), None)
    if other and not Path(path).exists():
        raise ValueError(f"--json {path}: {other} would be written over, and there are no numbers that it is of; name "
                         "another file")
    for read in reads:
        checkpoint.refuse_same(read, path, "--json")
    originals.check_folder(Path(path).parent)


def sources_of(folder):
    """{path: text} of the project's Python files in `folder` that a run may use; a note for an unreadable one.

    Hidden files, which editors and file systems add, are left out.
    """
    paths, sources = [path for part in (".", *FOLDERS) for path in (folder / part).glob("*.py")], {}
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        with files.noted():
            sources[path.relative_to(folder).as_posix()] = path.read_bytes().decode(errors="backslashreplace")
    return sources


def write_config(run, sources):
    """Write config.json of a new or resumed run: settings, `sources` (from `sources_of`), versions, device."""
    config = {"settings": run.settings, "architecture": run.architecture,
              "device": commandline.device_name(run.device), "processes": parallel.ranks(),
              "arithmetic": run.arithmetic, "convolutions": run.form,
              "started": time.strftime("%Y-%m-%d %H:%M:%S"),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
              "source": sources}
    path = run.out / "config.json"
    if run.made is None and path.exists():
        with files.noted():              # all that matters is in last.pt
            first = files.read_json(path)
            before = check(path, first, "resumed", list, optional=True) or []
            config |= {"started": first.get("started"), "resumed": [*before, config["started"]],
                       "sha256": check(path, first, "sha256", dict, optional=True) or {}}
    elif run.made is not None:            # a new run
        start = start_of(run.settings)
        found = {"teacher": run.teacher_sha256, "start": start and files.sha256_of(checkpoint.meant(start)),
                 "pictures": run.pictures_sha256}
        config["sha256"] = {name: value for name, value in found.items() if value}
    files.write(path, json.dumps(config, indent=1).encode())


def start_of(settings):
    """The checkpoint, or folder of one, whose weights a run with these settings starts from, or None."""
    return settings.get("start") or (settings.get("cycle_settings") or {}).get("input_model_path")


def read_config(folder):
    """The config.json of a run, a dictionary: settings, architecture, device and more."""
    path = Path(folder) / "config.json"
    config = files.read_json(path)
    for name, form in (("settings", dict), ("architecture", dict), ("device", str)):
        check(path, config, name, form)
    for name, form in SETTINGS.items():
        check(path, config["settings"], name, form)
    for name, form in OPTIONAL.items():
        check(path, config["settings"], name, form, optional=True)
    for place in range(len(config["settings"]["sparsity"])):
        check(path, dict(enumerate(config["settings"]["sparsity"])), place, float)
    check(path, config["architecture"], "name", str)
    for name in ("versions", "sha256"):
        check(path, config, name, dict, optional=True)
    if "groups" in config["architecture"]:
        check(path, config["architecture"], "groups", int)
        if not isinstance(config["architecture"].get("shuffle"), bool):
            raise ValueError(f"{path} is damaged: 'shuffle' must be true or false")
    return config


def read_history(folder, columns=EPOCH):
    """The history.csv of a run, a DataFrame with a row per epoch; all of `columns` hold finite numbers."""
    import pandas as pd
    path = Path(folder) / "history.csv"
    try:
        history = pd.read_csv(path)
    except ValueError as problem:         # pandas' own errors are of that type
        raise ValueError(f"{path} is damaged, it is no table: {problem}") from None
    if not isinstance(history.index, pd.RangeIndex):         # pandas would shift the values to other columns
        raise ValueError(f"{path} is damaged: a row has more values than there are columns")
    absent = [name for name in columns if name not in history]
    if absent:
        raise ValueError(f"{path} is damaged: it has no column {absent[0]!r}")
    if history.empty:
        raise ValueError(f"{path} has no row: no epoch of that run has ended")
    shown = [name for name in ("pflop",) if name in history]
    for name in [*columns, *shown]:
        numbers = pd.to_numeric(history[name], errors="coerce")
        unusable = ~numbers.map(math.isfinite) & ~(history[name].isna() & (name in shown))
        if unusable.any():
            found = history[name][unusable].iloc[0]
            raise ValueError(f"{path} is damaged: {name} holds {str(found)!r}, not a number")
        history[name] = numbers
    return history


def read_report(folder):
    """The report.json of a run: `test` and `profile` as written by test.py and profil.py, {} if missing or outdated."""
    path = Path(folder) / "report.json"
    report = {"test": {}, "profile": {}} | (files.read_json(path) if path.exists() else {})
    for name, whose in outdated(folder).items():
        print(f"note: {path} has the {name} of {whose}; it is left out until that is measured again", file=sys.stderr,
              flush=True)
        report[name] = {}
    test, profile = report["test"], report["profile"]
    check(path, test, "accuracy", float, optional=True)
    for form in ("compressed", "packed"):
        check(path, check(path, test, "bytes", dict, optional=True) or {}, form, float, optional=True)
    for name in PROFILE:
        check(path, profile, name, float, optional=True)
    for layer in check(path, profile, "layers", list, optional=True) or ():
        for name, form in (("name", str), ("weights", int), ("zero_weights", int)):
            check(path, layer, name, form)
        if not 0 <= layer["zero_weights"] <= layer["weights"] or not layer["weights"]:
            raise ValueError(f"{path} is damaged: {layer['zero_weights']} of {layer['weights']} weights of "
                             f"{layer['name']} are zero")
    return report


def outdated(folder):
    """{part: the network it belongs to} for the parts of report.json, test and profile, that are outdated."""
    path, history = Path(folder) / "report.json", Path(folder) / "history.csv"
    report = {"test": {}, "profile": {}} | (files.read_json(path) if path.exists() else {})
    epochs = len(history.read_bytes().splitlines()) - 1 if history.is_file() else None
    config = files.read_json(path.with_name("config.json")) if path.with_name("config.json").is_file() else {}
    settings = config.get("settings")
    if isinstance(settings, dict) and settings.get("pruning") == "l1_cycle":  # its last network is not the kept one
        epochs = None
    found = {name: earlier(path, check(path, report, name, dict), epochs) for name in ("test", "profile")}
    return {name: whose for name, whose in found.items() if whose}


def earlier(path, measured, epochs):
    """The earlier network that `measured` belongs to, in words, if the run has changed since; None if it has not.

    epochs: of the run now. The measured file, beside `path`, may have been replaced; if missing it counts as unchanged.
    """
    named, sha256 = (check(path, measured, name, str, optional=True) for name in ("checkpoint", "sha256"))
    file, then = path.with_name(Path(named or "none").name or "none"), check(path, measured, "epochs", int, True)
    if named and sha256 and file.is_file() and files.sha256_of(file) != sha256:
        return f"a network that {named} does not hold any more"
    if then is not None and epochs is not None and then != epochs:
        return f"the network after {then} epochs, and the run has {epochs} by now"
    return None


def check(path, held, name, form, optional=False):
    """held[name] if it has the type `form`, float meaning a finite number; otherwise ValueError that names the file."""
    value = held.get(name) if isinstance(held, dict) else None
    kind = (int, float) if form is float else form
    if value is None and optional:
        return None
    if not isinstance(value, kind) or isinstance(value, bool) or form in (int, float) and not small(value):
        raise ValueError(f"{path} is damaged: {name!r} must be {NAMES[form]}, not {str(value)[:40]!r}")
    return value


def small(number):
    """Whether a number is finite and also fits a float."""
    return -1e300 < number < 1e300
