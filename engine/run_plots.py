"""Plots of runs, from their histories and from a report's table.

A run is the dictionary of report.read_run; every plot is written as a PNG to `path`.
"""
import math

from engine import files


def figure_of(width, height, columns=1):
    """(figure, its axes; an array of axes if columns > 1); sizes in inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_curves(path, run):
    """Plot loss and accuracy by epoch, training and validation, with the pruning rounds marked."""
    history = run["history"]
    figure, (left, right) = figure_of(10, 3.8, columns=2)
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for part in ("train", "validation"):
            axes.plot(history["epoch"], history[f"{part}_{what}"], marker=".", label=part)
        last = history.groupby("round")["epoch"].max()
        after = history.groupby("round").first()
        for round_, epoch in list(last.items())[:-1]:
            axes.axvline(epoch + 0.5, color="gray", linestyle="--")
            top = what == "loss"
            axes.annotate(pruned_to(after.loc[round_ + 1]), (epoch + 0.5, float(top)), rotation=90, fontsize=8,
                          xycoords=("data", "axes fraction"), xytext=(3, -4 if top else 4),
                          textcoords="offset points", va="top" if top else "bottom")
        axes.set(xlabel="epoch", ylabel=what + (" (%)" if what == "accuracy" else ""))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    right.set_title(f"{run['dataset']}, {run['network']}", fontsize=10)
    files.save_figure(path, figure)


def pruned_to(row):
    """A label for a pruning at a row of history.csv: the share of zeros, or the number of parameters left."""
    if not row["sparsity"] and "parameters" in row:
        return f"{row['parameters']:,.0f} parameters"
    return f"pruned to {row['sparsity']:.0%}"


def draw_layers(path, run):
    """Plot the weights by layer before and after pruning, on a logarithmic axis."""
    import pandas as pd
    layers = pd.DataFrame(run["layers"])
    places, left = range(len(layers)), layers["weights"] - layers["zero_weights"]
    figure, axes = figure_of(10, 4)
    axes.bar(places, layers["weights"], color="lightsteelblue", label="before")
    axes.bar(places, left, color="tab:blue", width=0.5, label="after")
    for place, kept, whole in zip(places, left, layers["weights"], strict=True):
        axes.annotate(f"{kept / whole:.0%}", (place, whole), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(places, layers["name"], rotation=60, ha="right", fontsize=8)
    axes.set(yscale="log", ylabel="weights", title=f"weights by layer and the share left: {run['run']}")
    axes.legend(loc="upper left")
    files.save_figure(path, figure)


def draw_accuracy_size(path, table):
    """Plot test accuracy against parameters left: a point per row of a report's table, a colour per data set."""
    tested = table.dropna(subset=["test_accuracy", "nonzero"])
    figure, axes = figure_of(7, 4.5)
    for dataset, rows in tested.groupby("dataset"):
        axes.scatter(rows["nonzero"], rows["test_accuracy"], label=dataset)
    axes.set(xscale="log", xlabel="parameters that are not zero", ylabel="test accuracy (%)")
    axes.margins(x=0.25, y=0.15)
    axes.set_xlim(left=axes.get_xlim()[0] / 25)              # room for the names on the left
    axes.set_ylim(axes.get_ylim())
    place = -math.inf                                        # labels are at least 10 points apart
    for row in tested.sort_values("test_accuracy").itertuples():
        height = axes.transData.transform((row.nonzero, row.test_accuracy))[1] * 72 / figure.dpi
        place = max(height, place + 10)
        axes.annotate(f"{row.network}, {row.epochs} epochs" + " more" * row.continued
                      + ", distilled" * row.distilled,
                      (row.nonzero, row.test_accuracy), xytext=(-6, place - height - 3), textcoords="offset points",
                      ha="right", fontsize=8)
    if axes.collections:
        axes.legend(loc="lower right")
    files.save_figure(path, figure)


def draw_accuracy_time(path, runs):
    """Plot validation accuracy against minutes of training, evaluation included; the time on a log scale."""
    draw_progress(path, {run["run"]: (run["history"]["seconds"].cumsum() / 60, run["history"]) for run in runs},
                  "minutes of epochs")


def draw_accuracy_operations(path, runs):
    """Plot validation accuracy against operations of training so far, for runs that count them; on a log scale."""
    draw_progress(path, {run["run"]: (run["history"]["pflop"], run["history"]) for run in runs
                         if "pflop" in run["history"]}, "PFLOP of training so far")


def draw_progress(path, lines, label):
    """Plot validation accuracy against a cost. lines: {name: (cost so far by epoch, history)}."""
    figure, axes = figure_of(8, 4.5)
    for name, (spent, history) in lines.items():
        axes.plot(spent, history["validation_accuracy"], marker=".", label=name)
    axes.set(xlabel=label, ylabel="validation accuracy (%)")
    if any((spent > 0).any() for spent, _ in lines.values()):      # in tiny runs seconds may be 0.0
        axes.set_xscale("log")
    axes.grid(alpha=0.4)
    if lines:
        axes.legend(fontsize=8)
    files.save_figure(path, figure)
