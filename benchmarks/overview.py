"""Compare our networks with others: `python benchmark.py overview` tests and counts every network that ships.

benchmarks/overview.json lists them: our files, which test.py and profil.py measure on all
test images, and results of others as reported by their authors. Writes
results/overview.json with the numbers, overview.md, the table of docs/results.md,
overview_short.md, the README's table without the rows marked `aside`, and overview.png.
--draw writes tables and plot again from the stored numbers.
"""
import json
import os
from pathlib import Path

import cifar10
from engine import commandline, files, tables
from engine.commandline import call
from profil import DENSE_MACS, DENSE_PARAMETERS

ROOT = Path(__file__).resolve().parents[1]
NAMED = Path(__file__).with_suffix(".json")
BAR = 90              # test accuracy in %, from which on the course's score counts
AXES = {"parameters": "parameters that are not zero", "score": "course score"}


def measure(network, data):
    """The row of one of our networks, measured by test.py and profil.py on its file."""
    file = str(ROOT / network["file"])
    test = json.loads(call(["test.py", "--checkpoint", file, "--data", data, "--json"]))
    profile = json.loads(call(["profil.py", "--checkpoint", file, "--json"]))
    return {**network, "accuracy": [test["accuracy"]], "images": test["images"], "device": test["device"],
            "parameters": profile["nonzero"], "parameters_removed": profile["parameters_removed"],
            "macs": profile["macs"], "macs_removed": profile["macs_removed"], "score": profile["score_course"],
            "bytes": os.path.getsize(file)}


def completed(row):
    """A cited row with the shares removed, relative to dense ResNet-18, computed where it has the numbers."""
    for name, whole in (("parameters", DENSE_PARAMETERS), ("macs", DENSE_MACS)):
        if name in row:
            row = {f"{name}_removed": 1 - row[name] / whole, **row}
    return row


def markdown_of(rows):
    """The table of README and docs in Markdown."""
    lines = ["| CIFAR-10 | test accuracy | n | parameters left | removed | MACs | removed | course score | bytes |",
             "|---" * 9 + "|"]
    for row in rows:
        ours, name = "file" in row, f"[{row['name']}]({row['link']})" if "link" in row else row["name"]
        accuracy = " to ".join(f"{value:.2f}" if ours else str(value) for value in row["accuracy"]) + " %"
        cells = [f"**ours, {name}**" if ours else f"{name}, as cited", f"**{accuracy}**" if ours else accuracy,
                 str(row.get("n", "")), count(row, "parameters"), share(row, "parameters_removed"), count(row, "macs"),
                 share(row, "macs_removed"), score(row), count(row, "bytes")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def count(row, name):
    """A whole number as text, or "" if the row has none."""
    return f"{row[name]:,.0f}" if name in row else ""


def share(row, name):
    """A share in % as text; "0" if it is zero or None, "" if the row has none."""
    return f"{100 * row[name]:.1f} %" if row.get(name) else "0" if name in row else ""


def score(row):
    """The score with two significant digits, or "" if the row has none."""
    if "score" not in row:
        return ""
    return f"{row['score']:.4f}" if row["score"] < 0.01 else f"{row['score']:.3f}".rstrip("0")


def draw(path, rows):
    """Plot test accuracy against parameters left and against the score; a range is a bar.

    Short names stand above the cited and below ours, save where `above` is true.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        for row in rows:
            place = row.get(name, row.get(f"about_{name}"))       # estimated from a cited share
            if place is None:
                continue
            ours, low, high = "file" in row, min(row["accuracy"]), max(row["accuracy"])
            style = {"marker": "o" if ours else "x", "color": "tab:blue" if ours else "gray"}
            axes.plot([place] * 2, [low, high], **style)
            below = ours and not row.get("above")
            end, offset, side = (low, -7, "top") if below else (high, 7, "bottom")
            axes.annotate(row["short"], (place, end), xytext=(0, offset), textcoords="offset points", fontsize=8,
                          ha="center", va=side, color=style["color"])
        axes.axhline(BAR, color="gray", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel=label, ylabel="test accuracy (%)" * (name == "parameters"))
        axes.margins(x=0.3, y=0.12)
        axes.annotate("better", (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=8, color="gray",
                      style="italic")
    axes.plot([], [], "o", color="tab:blue", label="ours")
    axes.plot([], [], "x", color="gray", label="cited")
    axes.legend(loc="lower right", fontsize=8)
    files.save_figure(path, figure)


def parse(argv):
    """The flags of this benchmark."""
    parser = commandline.Parser(prog="benchmark.py overview", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data", help="folder of CIFAR-10's files (data)")
    parser.add_argument("--out", default="results", help="folder to write to (results)")
    parser.add_argument("--draw", action="store_true", help="measure nothing, write tables and plot again")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(argv):
    """Measure, print, write."""
    arguments = parse(argv)
    numbers, named = Path(arguments.out) / "overview.json", files.read_json(NAMED)
    if arguments.draw and not numbers.exists():
        raise FileNotFoundError(f"there are no numbers at {numbers}; leave out --draw, and they will be measured")
    cifar10.check_folder(numbers.parent)          # before minutes of measuring
    ours = files.read_json(numbers).get("ours") if arguments.draw else [
        measure(network, arguments.data) for network in named["ours"]]
    try:
        rows = [*ours, *map(completed, named["cited"])]
        markdown_of(rows)
    except (AttributeError, LookupError, TypeError, ValueError) as problem:
        raise ValueError(f"{numbers} does not hold the rows that this script writes ({problem!r}); leave out --draw, "
                         "and they will be measured") from None
    print(markdown_of(rows))
    if not arguments.draw:
        files.write(numbers, (json.dumps({"ours": ours}, indent=1) + "\n").encode())
    files.write(numbers.with_suffix(".md"), markdown_of(rows).encode())
    short = [row for row in rows if not row.get("aside")]
    files.write(numbers.with_name("overview_short.md"), markdown_of(short).encode())
    draw(numbers.with_suffix(".png"), rows)
    tables.update(arguments.out)
