"""Train and compare many runs in one table: `python study.py studies/ablation.json`.

A study is a JSON file: `flags` that all its runs share, `seeds`, and `arms`, each
with a `group`, a `name` and the `run` to train (a training script and its own flags).
Every arm is trained for every seed and exported as a compact file (a packed file if
quantized), and that file is tested. An interrupted study resumes when it is started
again. Writes results/<study>/ with runs.csv (one row per run), table.csv and table.md
(mean, standard deviation and 95 % interval over the seeds) and accuracy.png.

In an arm, `against` names the arm that its size and speed are compared with (default:
the first one), and `keep` names files of its first seed's run to copy beside the table:
{"cycle.png": "cycle.png"}, from: to. `{seed}` in a run stands for its seed, so that
an arm can name another one's files.
`factors` instead of arms, together with a `run`, makes an arm for every combination of
the factors' values; influence.csv and influence.png then show how much each factor, and
each product of factors, changes the error and the reduction.

If a run fails, the others continue, the tables mark it, and the exit code is 1.
`studies/study_file.py` defines the form of a study, and what is refused before any
training: names that collide, flags that a script would refuse, and existing runs that
were trained with other settings than their arm has now.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import itertools
import json
import math
import shlex
import sys
from pathlib import Path

import torch

import cifar10
import networks
from engine import commandline, files, folders, run_files, tables
from engine.commandline import call
from studies.study_file import check_out, check_runs, check_seeds, folder_of, read_study, write_record

NUMBERS = ["validation_accuracy", "test_accuracy", "parameters", "nonzero", "sparsity", "macs", "bytes", "score_course",
           "pflop", "minutes", "images_per_second", "test_seconds", "epochs_faster"]
MEASURED = ("parameters", "nonzero", "sparsity", "macs", "binary_weights", "score_course")


def refuse_trained(folder):
    """ValueError for a folder with model.pt but no last.pt: the run is not marked finished and cannot be resumed."""
    if (folder / "model.pt").exists():
        raise ValueError(f"{folder} holds a model.pt, but neither `finished` nor last.pt: if it is this arm's finished "
                         f"run, say so by `touch {shlex.quote(f'{folder}/finished')}`; else move it away")


def train_arm(arm, flags, seed, folder, data="data"):
    """Train, or resume, one run to its end in a process of its own. RuntimeError if that fails."""
    if (folder / "finished").exists():
        return
    if not (folder / "last.pt").exists():
        refuse_trained(folder)
        folders.hold(folder)                  # another process may be training there
        for name in ("config.json", "history.csv", "views.pt"):   # of a run that ended within its first epoch
            (folder / name).unlink(missing_ok=True)
        files.remove_partial(folder)
        folders.let_go(folder)
    script, *own = shlex.split(arm["run"].replace("{seed}", str(seed)))
    command = [script, "--resume"] if (folder / "last.pt").exists() else [script, *shlex.split(flags), *own,
                                                                         "--seed", str(seed)]
    command += ["--data", data]           # it may have moved since the run began
    print(f"\n{arm['name']}, seed {seed}: python {shlex.join(command)} --out {folder}", flush=True)
    call([*command, "--out", str(folder)], show=True)
    (folder / "finished").touch()         # model.pt alone may be of an unfinished L1 cycle


def measure_arm(folder, data):
    """Export a run's network, test the exported file, and store the measurements beside it. Returns a dictionary.

    A float32 network is exported as a compact file, a quantized one as a packed file, tested in exact integers.
    Stored measurements are valid for the model.pt whose SHA-256 they hold; another one is measured again.
    """
    few, model = "bits" in run_files.read_config(folder)["architecture"], folder / "model.pt"
    exported, measured = folder / ("exported.packed.gz" if few else "exported.pt.gz"), folder / "exported.json"
    kept, sha256 = kept_of(measured, model), files.sha256_of(model)
    if kept is None or kept.pop("sha256", sha256) != sha256:
        call(["export.py", "--checkpoint", str(model), "--out", str(exported), "--no-compare"])
        test = json.loads(call(["test.py", "--checkpoint", str(exported), "--data", data, "--json"]))
        profile = json.loads(call(["profil.py", "--checkpoint", str(exported), "--json"]))
        kept = {"test_accuracy": test["accuracy"], "test_images": test["images"], "precision": test["precision"],
                "test_seconds": test["seconds"],
                "bytes": exported.stat().st_size} | {name: profile[name] for name in MEASURED}
        files.write(measured, json.dumps({**kept, "sha256": sha256}, indent=1).encode())
    return kept


def kept_of(measured, model):
    """The stored measurements of a run, or None where there are none or they are outdated.

    A file from an older version has no SHA-256; it is valid unless model.pt is newer. ValueError for a damaged one.
    """
    if not measured.exists():
        return None
    kept = files.read_json(measured)
    for name in ("test_accuracy", "bytes", "test_seconds", *MEASURED):
        run_files.check(measured, kept, name, float, optional=True)
    old = "sha256" not in kept and model.stat().st_mtime_ns > measured.stat().st_mtime_ns
    return None if old or not {"test_accuracy", "bytes", *MEASURED} <= kept.keys() else kept


def keep_files(arm, folder, out):
    """Copy the files that an arm keeps from a run's folder to the table's. FileNotFoundError if one is missing."""
    absent = [name for name in arm["keep"] if not (folder / name).is_file()]
    for name, kept in arm["keep"].items():
        if name not in absent:
            files.write(out / kept, (folder / name).read_bytes())
    if absent:
        raise FileNotFoundError(f"{folder} has no {', '.join(absent)} to keep")


def row_of(arm, seed, folder, data):
    """The row of runs.csv of one finished run."""
    config, history = run_files.read_config(folder), run_files.read_history(folder)
    settings, speed = config["settings"], history["images_per_second"]
    last = row_of_result(history, folder / "model.pt")
    return {"group": arm["group"], "arm": arm["name"], "against": arm["against"], "seed": seed, "run": arm["run"],
            **{f"factor_{name}": value for name, value in arm.get("factors", {}).items()},
            "epochs": "+".join(map(str, history.groupby("round").size())),
            "images_an_epoch": settings.get("limit") or "all",
            "validation_accuracy": last["validation_accuracy"], "validation_loss": last["validation_loss"],
            "train_accuracy": last["train_accuracy"], "parameters_at_first": parameters_of(config["architecture"]),
            **measure_arm(folder, data),
            "pflop": history["pflop"].iloc[-1] if "pflop" in history else None,        # cumulative: of the whole run
            "minutes": round(history["seconds"].sum() / 60, 2), "images_per_second": speed.median(),
            "epochs_faster": epochs_faster(speed, settings),
            "device": config["device"],
            "torch": (config.get("versions") or {}).get("torch"), "started": config.get("started")}


def epochs_faster(speed, settings):
    """The speed of the last three epochs relative to epochs 2 to 4, as training gets faster when channels are removed.

    speed: images a second, a Series. The first epoch is left out: it is slower while memory and caches fill. None if
    the two overlap, or if --resize makes the later images larger.
    """
    if len(speed) < 7 or settings.get("resize"):
        return None
    return speed.tail(3).median() / speed.iloc[1:4].median()


def row_of_result(history, path):
    """The history's row of the network in model.pt, the last of its size; an L1 cycle's last row is over the limit."""
    if "parameters" not in history:
        return history.iloc[-1]
    kept = sum(parameter.numel() for parameter in networks.load_network(path)[0].parameters())
    if not (history["parameters"] == kept).any():
        raise ValueError(f"{path} has {kept:,} parameters, which no row of history.csv has")
    return history[history["parameters"] == kept].iloc[-1]


def parameters_of(architecture):
    """Number of parameters before any were removed; ValueError for an architecture that cannot be built."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in networks.build(**architecture).parameters())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        raise ValueError("config.json is damaged, the architecture that it names cannot be built "
                         f"({str(architecture)[:200]}): {problem}") from None


def table_of(runs):
    """One row per arm: n, mean and standard deviation over its seeds. runs: a DataFrame of `row_of` rows.

    test_accuracy_low and _high: Student's 95 % interval of the mean over the seeds.
    parameters_fewer and macs_fewer, in %, and times_faster (testing the exported file)
    are relative to the arm named in `against`; epochs_faster compares the last epochs of a
    run with its first ones. failed: seeds and reasons of failed runs; n counts the others.
    """
    from scipy import stats
    runs = runs.assign(**runs.reindex(columns=NUMBERS).astype(float))        # pflop is absent in old runs
    by_arm = runs.groupby(["group", "arm"], sort=False)
    table = by_arm[NUMBERS].mean()
    table.insert(0, "n", by_arm["validation_accuracy"].count())
    for name in ("validation_accuracy", "test_accuracy"):
        table.insert(list(table).index(name) + 1, f"{name}_sd", by_arm[name].std())
    margin = stats.t.ppf(0.975, table["n"] - 1) * table["test_accuracy_sd"] / table["n"] ** 0.5
    for name, sign in (("test_accuracy_low", -1), ("test_accuracy_high", 1)):
        table[name] = table["test_accuracy"] + sign * margin
    table = table.reset_index()
    other = table.set_index("arm").reindex(runs.groupby("arm", sort=False)["against"].first()[table["arm"]])
    for name, column in (("parameters_fewer", "nonzero"), ("macs_fewer", "macs")):
        table[name] = 100 * (1 - table[column] / other[column].to_numpy())
    table["times_faster"] = other["test_seconds"].to_numpy() / table["test_seconds"]
    if "failed" in runs:
        texts = "seed " + runs["seed"].astype(str) + ": " + runs["failed"]
        texts = texts.groupby(runs["arm"], sort=False).agg(lambda each: "; ".join(each.dropna()))
        table["failed"] = texts[table["arm"]].to_numpy()
    return table


def markdown_of(table):
    """The table in Markdown, with failed runs listed below it; a comparison that was not made is left empty."""
    lines = ["| group | arm | n | validation % | test %, exported file | parameters left | fewer | MACs | fewer "
             "| course score | bytes | PFLOP | training s | test s | times faster | epochs faster |",
             "|---" * 16 + "|"]
    failed = []
    for row in table.to_dict("records"):
        spread = ["", ""]
        if row["n"] > 1:
            spread = [f" ± {row['validation_accuracy_sd']:.2f}", " ± {test_accuracy_sd:.2f} (95 %: "
                      "{test_accuracy_low:.2f} to {test_accuracy_high:.2f})".format(**row)]
        problem = row.get("failed") or ""
        failed += [f"Failed: {row['arm']}, {problem}."] * bool(problem)
        cells = [row["group"], row["arm"] + " (failed)" * bool(problem), str(row["n"]),
                 shown(row["validation_accuracy"], "{:.2f}") + spread[0],
                 shown(row["test_accuracy"], "{:.2f}") + spread[1],
                 shown(row["nonzero"], "{:,.0f}"), shown(row["parameters_fewer"], "{:.1f} %", ""),
                 shown(row["macs"], "{:,.0f}"), shown(row["macs_fewer"], "{:.1f} %", ""),
                 shown(row["score_course"], "{:.4f}"), shown(row["bytes"], "{:,.0f}"), shown(row["pflop"], "{:.3g}"),
                 shown(60 * row["minutes"], "{:.0f}"), shown(row["test_seconds"], "{:.2f}"),
                 shown(row["times_faster"], "{:.1f}", ""), shown(row["epochs_faster"], "{:.2f}", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n{line}\n" for line in failed)


def shown(value, form, absent="-"):
    """A number as text, or `absent` if it is NaN; what rounds to zero has no minus sign."""
    text = absent if math.isnan(value) else form.format(value)
    return text.removeprefix("-") if text.startswith("-0") and not set("123456789") & set(text) else text


def draw_accuracy(path, table, title):
    """Plot validation accuracy by arm, groups by colour, with the standard deviation if there are several seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    table = table.dropna(subset=["validation_accuracy"])
    longest = max(map(len, table["arm"]))
    figure, axes = plt.subplots(figsize=(max(8, 5 + 0.08 * longest), 1.6 + 0.32 * len(table)), layout="constrained")
    places = {name: len(table) - place for place, name in enumerate(table["arm"])}
    for number, (group, rows) in enumerate(table.groupby("group", sort=False)):
        axes.errorbar(rows["validation_accuracy"], [places[name] for name in rows["arm"]], capsize=3,
                      fmt="os^"[number // 10 % 3], xerr=rows["validation_accuracy_sd"].fillna(0), label=group)
    for row in table.itertuples():
        axes.annotate(f"{row.validation_accuracy:.2f}", (row.validation_accuracy, places[row.arm]), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_ylim(0.4, len(table) + 0.9)                     # room for the number above the first arm
    axes.grid(axis="x", alpha=0.4)
    axes.set(xlabel="validation accuracy (%)")
    axes.margins(x=0.1)                                      # room beside the lowest and highest
    low, high = axes.get_xlim()
    missing = max(0, 1 - (high - low)) / 2                   # at least 1 %: less is noise, and should look small
    axes.set_xlim(low - missing, high + missing)
    figure.suptitle(title, fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    files.save_figure(path, figure)
    plt.close(figure)


def influence_of(runs, factors, target):
    """{term: coefficient}: least-squares fit of a column to all products of the factors, each scaled to [-1, 1].

    With three factors, f = a0 + a1 E + a2 P + a3 I + a4 E P + a5 E I + a6 P I + a7 E P I; a
    coefficient is half the change of f from a factor's smallest value to its largest.
    """
    import numpy as np
    given = {name: runs[f"factor_{name}"] for name in factors}
    coded = {name: (2 * values - values.max() - values.min()) / (values.max() - values.min())
             for name, values in given.items()}
    terms = [term for size in range(len(factors) + 1) for term in itertools.combinations(factors, size)]
    columns = [np.prod([coded[name] for name in term], axis=0) * np.ones(len(runs)) for term in terms]
    found = np.linalg.lstsq(np.stack(columns, 1), runs[target].to_numpy(float), rcond=None)[0]
    return {" x ".join(term) or "mean": float(value) for term, value in zip(terms, found, strict=True)}


def write_influence(out, runs, factors):
    """Write influence.csv and influence.png: effects on the validation error and the parameters removed, both in %."""
    import pandas as pd
    from matplotlib.figure import Figure
    runs = runs.assign(error=100 - runs["validation_accuracy"],
                       removed=100 * (1 - runs["nonzero"] / runs["parameters_at_first"]))
    table = pd.DataFrame({target: influence_of(runs, factors, target) for target in ("error", "removed")})
    files.write(out / "influence.csv", table.to_csv(index_label="term", float_format="%.5g").encode())
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (target, values) in zip(figure.subplots(1, 2, sharey=True), table.iloc[1:].items(), strict=True):
        bars = axes.barh(list(values.index), values, color=["tab:blue" if v > 0 else "tab:orange" for v in values])
        axes.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.margins(x=0.2)
        axes.set_title(f"{target}: mean {table[target].iloc[0]:.3g} %", fontsize=10)
        axes.set_xlabel("% from the middle of a factor to its end")
    figure.axes[0].invert_yaxis()
    files.save_figure(out / "influence.png", figure)


def write_results(out, study, rows):
    """Write runs.csv, table.csv, table.md and the plots of the rows so far. Returns the table."""
    import pandas as pd
    runs = pd.DataFrame(rows)
    table = table_of(runs)
    files.write(out / "runs.csv", runs.to_csv(index=False).encode())
    files.write(out / "table.csv", table.to_csv(index=False, float_format="%.10g").encode())
    files.write(out / "table.md", markdown_of(table).encode())
    measured = runs.dropna(subset=["validation_accuracy"]) if "validation_accuracy" in runs else runs[:0]
    with files.noted():
        if len(measured):
            draw_accuracy(out / "accuracy.png", table, study["title"])
        if "factors" in study and set(measured.get("arm", ())) == {arm["name"] for arm in study["arms"]}:
            write_influence(out, measured, list(study["factors"]))
    return table


def make_row(arm, seed, folder, out, flags, data, first):
    """Train one run and measure it. Returns its row; if something failed, with the reason as `failed`.

    first: copy the files that its arm keeps beside the table.
    """
    row = {"group": arm["group"], "arm": arm["name"], "against": arm["against"], "seed": seed, "run": arm["run"]}
    try:
        train_arm(arm, flags, seed, folder, data)
        row = row_of(arm, seed, folder, data)
        if first:
            keep_files(arm, folder, out)
    except (ValueError, OSError, RuntimeError) as problem:
        row["failed"] = " ".join(str(problem).split())
        print(f"note: {arm['name']}, seed {seed} failed, the others go on: {row['failed']}", file=sys.stderr,
              flush=True)
    return row


def parse(argv):
    """The flags of this script."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("study", help="the study's JSON file")
    parser.add_argument("--data", default="data", help="folder of the data set's files (data)")
    parser.add_argument("--out", help="where the table goes (results/<study>)")
    parser.add_argument("--seeds", type=int, nargs="+",
                        help="train only these; the table also holds finished runs of the study's other seeds")
    parser.add_argument("--arms", nargs="+", metavar="NAME",
                        help="train only these; the table also holds finished runs of the other arms")
    parser.add_argument("--finished", action="store_true", help="train nothing, write the table of the finished runs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    check_seeds(arguments.seeds or [], "--seeds")
    return arguments


def chosen_arms(arguments, names):
    """The names of the arms to train, out of `names`; ValueError for an unknown one."""
    unknown = [each for each in arguments.arms or [] if each not in names]
    if unknown:
        raise ValueError(f"--arms: {arguments.study} has no arm {unknown[0]!r}; it has {', '.join(map(repr, names))}")
    return [] if arguments.finished else arguments.arms or names


def due(name, runs, done, wanted):
    """Index in `runs` of the next run, finished runs first, then those to train; None at the end.

    Finished runs, also of other processes, come first so that no table holds fewer runs than the one before it.
    done: indices already in the table; wanted: whether each run may be trained.
    """
    left = [place for place in range(len(runs)) if place not in done]
    there = [place for place in left if (folder_of(name, runs[place][1], runs[place][0]) / "finished").exists()]
    return next(iter([*there, *(place for place in left if wanted[place])]), None)


def main(argv):
    """Train the runs that are not finished, measure them, write the table."""
    arguments = parse(argv)
    study, name = read_study(arguments.study), Path(arguments.study).stem
    out, seeds = Path(arguments.out or Path("results") / name), list(dict.fromkeys(
        [*study["seeds"], *(arguments.seeds or [])]))
    chosen = chosen_arms(arguments, [arm["name"] for arm in study["arms"]])
    check_out(arguments.study, out)
    check_runs(name, study, seeds)
    flags, kept = study["flags"], {}      # {arm: index of the run whose files are kept}
    runs = list(itertools.product(seeds, study["arms"]))
    wanted = [arm["name"] in chosen and seed in (arguments.seeds or seeds) for seed, arm in runs]
    rows = {}                             # {index in `runs`: row}
    while (place := due(name, runs, rows, wanted)) is not None:
        seed, arm = runs[place]
        cifar10.check_folder(out)
        rows[place] = make_row(arm, seed, folder_of(name, arm, seed), out, flags, arguments.data,
                               place < kept.get(arm["name"], len(runs)))
        kept[arm["name"]] = min(place, kept.get(arm["name"], place))
        write_record(arguments.study, out)
        table = write_results(out, study, [rows[each] for each in sorted(rows)])
    if not rows:
        raise FileNotFoundError(f"no run of {name} is finished")
    print(markdown_of(table) + f"\nwritten: {out}/runs.csv, table.csv, table.md, accuracy.png")
    tables.update(out)
    failed = [rows[place] for place in sorted(rows) if "failed" in rows[place]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(rows)} runs failed, {out}/table.md marks them; the first is "
                           f"{failed[0]['arm']}, seed {failed[0]['seed']}: {failed[0]['failed']}")


if __name__ == "__main__":
    commandline.command(main)
