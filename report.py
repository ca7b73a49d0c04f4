"""Tables and plots from finished runs: `python report.py runs/a runs/b --out results`.

Reads config.json, history.csv and report.json (written by test.py and profil.py) of each
run; without names, of all runs in runs/ and results/. Draws curves.png and layers.png
beside each run, and writes table.md, table.csv, time.csv, accuracy_size.png,
accuracy_time.png and accuracy_operations.png to --out, with a copy of each run's files; a
run and its copy count once. Runs that differ only in their seed share a row: n, mean and
standard deviation. PFLOP are 10^15 operations of training, if history.csv has them. The
column `other settings` holds settings without a column of their own that differ from the
recipe's. time.csv holds the minutes of epochs, evaluation included, after which each run
first reached each --level, or the highest validation accuracy that all runs on its data
set reached. A run that started from other weights (--start) has no such time, and no curve
in accuracy_time.png.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import json
import sys
from pathlib import Path

import pandas as pd

import cifar10
from engine import commandline, files, run_files, run_plots, tables
from engine.settings import names_of
from filter_pruning import CYCLE, SHRINKING
from train import DEFAULTS, RECIPES, SETTINGS

COLUMNS = ["dataset", "network", "epochs", "pruning", "mixing", "weights", "recipe", "distilled", "continued",
           "device"]
COLUMNS_OF_HISTORY = (*run_files.EPOCH, "epoch", "train_loss", "sparsity")
NOT_IN_TABLE = ("history", "layers", "folder", "settings", "seed", "started")
IN_COLUMNS = {"dataset", "model", "groups", "shuffle", "epochs", "sparsity", "pruning", "score", "mixing", "weights",
              "recipe"}
NOT_OF_THE_METHOD = {*names_of(SETTINGS, "free"), "seed", "lines", "script"} - {"device"}


def read_run(folder):
    """One run as a flat dictionary; FileNotFoundError or ValueError if a file is missing or damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "history.csv").is_file():
        raise FileNotFoundError(f"{folder} is no run: config.json or history.csv is missing")
    config, report = run_files.read_config(folder), run_files.read_report(folder)
    settings, history = config["settings"], run_files.read_history(folder, COLUMNS_OF_HISTORY)
    test, profile = report["test"], report["profile"]
    sizes = test.get("bytes") or {}
    return {"run": as_text(folder.resolve().name), "folder": folder, "dataset": settings["dataset"],
            "network": network_of(config["architecture"]),
            "epochs": epochs_of(settings, history),
            "pruning": pruning_of(settings), "mixing": settings["mixing"],
            "weights": settings.get("weights") or "float",
            "recipe": settings["recipe"], "distilled": bool(settings.get("teacher")),
            "continued": bool(run_files.start_of(settings)),
            "device": config["device"], "other_settings": unusual(settings), "settings": comparable(complete(settings)),
            "validation_accuracy": row_of_result(history, settings, {**test, **profile})["validation_accuracy"],
            "test_accuracy": test.get("accuracy"),
            "pflop": history["pflop"].iloc[-1] if "pflop" in history else None,
            "precision": test.get("precision"), "minutes": history["seconds"].sum() / 60,
            "parameters": profile.get("parameters"), "nonzero": profile.get("nonzero"),
            "parameters_removed": profile.get("parameters_removed"), "macs": profile.get("macs"),
            "macs_removed": profile.get("macs_removed"), "score_course": profile.get("score_course"),
            "bytes": sizes.get("packed", sizes.get("compressed")), "history": history, "layers": profile.get("layers"),
            "seed": settings["seed"], "started": config.get("started")}


def read_runs(folders):
    """(the runs that can be read, error messages of the others); raises the first error if none can be read."""
    runs, wrong = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (ValueError, OSError) as problem:
            wrong.append(problem)
    if not runs:
        raise wrong[0]
    return runs, [f"left out: {problem}" for problem in wrong]


def epochs_of(settings, history):
    """The epochs of a run: "100+25+125"; for an L1 cycle, whose number of steps is not set, "8, then 3 a step"."""
    rounds = [str(count) for count in history.groupby("round").size()]
    if settings.get("pruning") != "l1_cycle":
        return "+".join(rounds)
    steps = (settings.get("cycle_settings") or {}).get("finetuning_epochs", CYCLE["finetuning_epochs"].default)
    return f"{rounds[0]}, then {steps} a step"


def row_of_result(history, settings, measured):
    """The history's last row; for an L1 cycle, whose last network is over the limit, the row of the kept network.

    measured: what was measured on the kept network: its number of epochs, or in older files its size.
    """
    if settings.get("pruning") != "l1_cycle":
        return history.iloc[-1]
    epochs = measured.get("epochs")
    if isinstance(epochs, int) and 0 < epochs <= len(history):
        return history.iloc[epochs - 1]
    kept = history.get("parameters", pd.Series(dtype=float)) == measured.get("parameters")
    return history[kept].iloc[-1] if kept.any() else history.iloc[-1]


def complete(settings):
    """The settings of a run, with defaults for settings that were added after it."""
    return {**DEFAULTS, **RECIPES.get(settings["recipe"], {}), **settings}


def comparable(settings):
    """{name: text} of the settings that distinguish methods; in paths the run's own seed is replaced by s*."""
    seed = f"-s{settings['seed']}/"
    if settings.get("pruning") == "l1_cycle" and isinstance(settings["epochs"], list):
        settings = {**settings, "epochs": settings["epochs"][:1]}      # the others were added by its steps
    return {name: (value if isinstance(value, str) else json.dumps(value)).replace(seed, "-s*/")
            for name, value in sorted(settings.items()) if name not in NOT_OF_THE_METHOD}


def unusual(settings):
    """The settings without a column of their own that differ from the recipe's, as "lr 0.1, resize 20"."""
    recipe = settings["recipe"]
    usual = {**DEFAULTS, **RECIPES.get(recipe, {}), "recipe": recipe}
    usual = comparable({**usual, "seed": settings["seed"]})
    words = [f"recipe {recipe}"] * (recipe != "ours")
    return ", ".join(words + [f"{name} {value}" for name, value in comparable(settings).items()
                              if name not in IN_COLUMNS and value != usual.get(name, value)])


def network_of(architecture):
    """An architecture in a few words: "resnet18 groups 8 shuffle", "lenet5 tanh"."""
    words = [architecture["name"]]
    if "groups" in architecture:
        words.append(f"groups {architecture['groups']}" + " shuffle" * (architecture["shuffle"]
                                                                         and architecture["groups"] > 1))
    usual = {"activation": "relu", "pooling": "max", "shortcut": "B"}
    return " ".join(words + [str(architecture[name]) for name in usual
                             if architecture.get(name, usual[name]) != usual[name]])


def pruning_of(settings):
    """How a run was pruned, in a few words: "70 %+70 %", "91 % polynomial lamp", "filters", "none"."""
    words = ["+".join(f"{100 * share:g} %" for share in settings["sparsity"])
             or "none" * (settings.get("pruning") not in SHRINKING)]
    usual = (None, "rounds", "none", "l1")
    words += [settings[name] for name in ("pruning", "score") if settings.get(name) not in usual]
    return " ".join(filter(None, words))


def table_of(runs):
    """One row for each set of runs that differ only in their seed, as a DataFrame."""
    frame = pd.DataFrame([{name: value for name, value in run.items()
                           if name not in NOT_IN_TABLE} for run in runs])
    methods, tested = [json.dumps(run["settings"]) for run in runs], {}
    for method, run in zip(methods, runs, strict=True):      # an untested run joins the first tested one
        tested[method] = tested.get(method) or run["precision"]
    frame["together"] = [json.dumps([method, run["precision"] or tested[method]])
                         for method, run in zip(methods, runs, strict=True)]
    numbers = ["validation_accuracy", "test_accuracy", "minutes", "nonzero", "parameters_removed", "macs",
               "macs_removed", "score_course", "bytes", "pflop"]
    frame[numbers] = frame[numbers].astype(float)
    groups = frame.groupby([*COLUMNS, "other_settings", "together"], sort=False)
    table = groups[numbers].mean()
    table.insert(0, "runs", groups["run"].agg(" ".join))
    table.insert(1, "n", groups.size())
    table.insert(4, "test_sd", groups["test_accuracy"].std())
    table.insert(5, "tested", groups["test_accuracy"].count())
    return table.reset_index().drop(columns="together")


def markdown_of(table):
    """The table in Markdown."""
    names = ["run", "data", "network", "weights", "mixing", "epochs", "pruned", "other settings", "device", "n",
             "validation %", "test %", "parameters left", "removed", "MACs", "removed", "course score", "bytes",
             "PFLOP", "minutes"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in table.itertuples():
        spread = "" if pd.isna(row.test_sd) else f" ± {row.test_sd:.2f}"
        spread += f" ({row.tested} of {row.n})" if 0 < row.tested < row.n else ""
        cells = [row.runs, row.dataset, row.network, row.weights, row.mixing, row.epochs, row.pruning,
                 row.other_settings, row.device, str(row.n),
                 number(row.validation_accuracy, ".2f"), number(row.test_accuracy, ".2f") + spread,
                 number(row.nonzero, ",.0f"), number(row.parameters_removed, ".2%"), number(row.macs, ",.0f"),
                 number(row.macs_removed, ".2%"), number(row.score_course, ".4f"), number(row.bytes, ",.0f"),
                 number(row.pflop, ".3g"), number(row.minutes, ".0f")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def number(value, form):
    """A formatted number, or a dash if a run has none."""
    return "-" if pd.isna(value) else format(value, form)


def times_of(runs, levels=()):
    """Minutes of epochs until each run first reached each level of validation accuracy (%), a row per run and level.

    levels: if empty, the highest level that all runs on the same data set reached. A run that never reached a level
    has no minutes there. Returns a DataFrame.
    """
    names, rows = ["run", "dataset", "network", "recipe", "device", "minutes"], []
    for run in runs:
        accuracies, minutes = run["history"]["validation_accuracy"], run["history"]["seconds"].cumsum() / 60
        reached_by_all = min(other["history"]["validation_accuracy"].max() for other in runs
                             if other["dataset"] == run["dataset"])
        for level in levels or [reached_by_all]:
            first = next((epoch for epoch, accuracy in enumerate(accuracies) if accuracy >= level), None)
            rows.append({**{name: run[name] for name in names},
                         "highest": accuracies.max(), "level": level,
                         "epochs_to_level": None if first is None else first + 1,
                         "minutes_to_level": None if first is None else minutes[first]})
    return pd.DataFrame(rows, columns=[*names, "highest", "level", "epochs_to_level", "minutes_to_level"])


def distinct(runs):
    """The runs, each once: of a run and its copy, or an earlier state of it, the one with more epochs.

    ValueError for two different runs with the same name, whose copies would overwrite each other.
    """
    chosen = {}
    for run in runs:
        other = next((other for other in chosen.values() if same_run(run, other)), None)
        if other is not None:
            print(f"note: {run['folder']} and {other['folder']} hold one run; it counts once", file=sys.stderr,
                  flush=True)
            if rank_of(run) <= rank_of(other):
                continue
        if chosen.get(run["run"], other) is not other:
            raise ValueError(f"{chosen[run['run']]['folder']} and {run['folder']} are different runs of one name; "
                             "rename the folder of one, or leave it out")
        if other is None:
            chosen[run["run"]] = run
        else:
            chosen = {run["run"] if held is other else name: run if held is other else held
                      for name, held in chosen.items()}
    return list(chosen.values())


def rank_of(run):
    """The rank of a copy of a run, the highest counts: by number of epochs, then whether model.pt is beside it."""
    return len(run["history"]), (run["folder"] / "model.pt").exists()


def one_a_seed(runs):
    """The runs without repetitions of the same settings and seed, which add no information; the first one counts."""
    chosen = {}
    for run in runs:
        first = chosen.setdefault((*(str(run[name]) for name in COLUMNS), run["other_settings"], run["seed"],
                                   json.dumps(run["settings"])), run)
        if first is not run:
            print(f"note: {run['folder']} has the settings and the seed of {first['folder']}; of the two the table "
                  "has that one", file=sys.stderr, flush=True)
    return list(chosen.values())


def same_run(one, other):
    """Whether two folders hold the same run: the same folder, or the history of one begins with that of the other.

    A run that was resumed may have other settings than its copy.
    """
    if one["folder"].resolve() == other["folder"].resolve():
        return True
    rows = min(len(one["history"]), len(other["history"]))
    first = [run["history"][list(COLUMNS_OF_HISTORY)][:rows].astype(float) for run in (one, other)]
    return one["seed"] == other["seed"] and one["started"] == other["started"] and first[0].equals(first[1])


def check_kept(runs, out):
    """ValueError where the copy of a run, out/<run>/, would overwrite that of another run with the same name."""
    for run in runs:
        copied = [out / run["run"] / name for name in ("config.json", "history.csv")]
        if all(path.exists() for path in copied) and not same_run(run, read_run(out / run["run"])):
            raise ValueError(f"{out / run['run']} holds a copy of another run than {run['folder']}; rename the folder "
                             "of one of them, or choose another --out")


def draw_beside(run, out):
    """Draw curves.png and layers.png into a run's copy, out/<run>/, and if possible into its own folder."""
    target = out / run["run"]
    for name, draw in (("curves.png", run_plots.draw_curves), ("layers.png", run_plots.draw_layers)):
        if name == "curves.png" or run["layers"]:
            draw(target / name, run)
            if target.resolve() != run["folder"].resolve():
                with files.noted():
                    files.write(run["folder"] / name, (target / name).read_bytes())


def keep(run, out):
    """Copy a run's settings (no sources, no paths), history, report and confusion.png to out/<run>/."""
    target = out / run["run"]
    if target.resolve() == run["folder"].resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    config = files.read_json(run["folder"] / "config.json")
    config.pop("source", None)
    config["settings"] = {name: value for name, value in config["settings"].items()
                          if name not in ("out", "data", "debug", "dry_run", "resume", "force")}
    files.write(target / "config.json", (json.dumps(config, indent=1) + "\n").encode())
    for name in ("history.csv", "report.json", "confusion.png"):
        if (run["folder"] / name).exists():
            files.write(target / name, (run["folder"] / name).read_bytes())
    outdated = run_files.outdated(run["folder"])
    if outdated:                          # without the network beside the copy this could not be detected there
        files.merge_json(target / "report.json", dict.fromkeys(outdated, {}))


def find_runs():
    """The folders of all runs in results/ and runs/; those with the same name side by side, the one in runs/ first."""
    found = [config.parent for parent in ("results", "runs") for config in sorted(Path(parent).glob("*/config.json"))
             if (config.parent / "history.csv").exists()]
    if not found:
        raise FileNotFoundError("there is no run in runs/ or results/; train first: python train_pruning.py")
    names = list(dict.fromkeys(folder.name for folder in found))
    return sorted(found, key=lambda folder: (names.index(folder.name), folder.parent.name != "runs"))


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="folders of runs (all in runs/ and results/)")
    parser.add_argument("--out", default="results", help="where table and plots go (results)")
    parser.add_argument("--level", type=float, nargs="+", default=[], metavar="ACCURACY",
                        help="validation accuracies in %% to find the times of (the highest that all runs reached)")
    parser.add_argument("--pages", action="store_true",
                        help="only update the tables in README.md and docs/ from the files that they name")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def as_text(text):
    """A text that UTF-8 can encode; the name of a run's folder need not be valid UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def main(argv):
    """Read the runs, print and write the tables, draw the plots."""
    arguments = parse(argv)
    if arguments.pages:
        if not tables.pages_of("."):
            raise ValueError("there is no README.md here and no docs/; run it in the project's folder")
        changed = tables.write_pages()
        print(f"written: tables in {', '.join(map(str, changed))}" if changed else "all pages are up to date")
        return
    out = Path(arguments.out)
    if (out / "study.json").exists():
        raise ValueError(f"{out} holds the tables of a study; choose another --out")
    runs, wrong = read_runs(arguments.runs or find_runs())
    runs = distinct(runs)
    check_kept(runs, out)
    cifar10.check_folder(out)
    table, from_nothing = table_of(one_a_seed(runs)), [run for run in runs if not run["continued"]]
    print(markdown_of(table))
    files.write(out / "table.md", markdown_of(table).encode())
    files.write(out / "table.csv", table.to_csv(index=False).encode())
    files.write(out / "time.csv", times_of(from_nothing, arguments.level).to_csv(index=False).encode())
    for run in runs:
        with files.noted():
            keep(run, out)
            draw_beside(run, out)
    for name, what in (("size", table), ("time", from_nothing), ("operations", from_nothing)):
        with files.noted():
            getattr(run_plots, f"draw_accuracy_{name}")(out / f"accuracy_{name}.png", what)
    print(f"written: {out}/table.md, table.csv, time.csv, accuracy_size.png, accuracy_time.png, "
          "accuracy_operations.png, and curves and layers by run")
    tables.update(out)
    if wrong:
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    commandline.command(main)
