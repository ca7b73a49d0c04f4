"""How fast, and what for: `python benchmark.py inference`, `training`, `profile`, `deployment`, `overview` or `check`.

inference: images a second of several networks in PyTorch and ONNX Runtime.
training: the loop of train.py against the published run's.
profile: where the time of a training step goes, by kind of kernel.
deployment: trained networks in use: accuracy, bytes and milliseconds of every form of each.
overview: every network that ships, tested and counted, beside results of others.
check: whether every technique runs on a GPU, and what is slow there.
`python benchmark.py profile --help` lists the flags of one; benchmarks/ holds them.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import importlib

from engine import commandline

PARTS = ("inference", "training", "profile", "deployment", "overview", "check")


def main(argv):
    """Run the part that the first argument names."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return
    if argv[0] not in PARTS:
        raise ValueError(f"benchmark.py {argv[0]}: choose from {', '.join(PARTS)}")
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    commandline.command(main)
