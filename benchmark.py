"""Benchmarks: `python benchmark.py inference`, `training`, `profile`, `deployment`, `overview` or `check`.

inference: images a second of several networks in PyTorch and ONNX Runtime.
training: speed of the training loop in train.py against that of the published run.
profile: where the time of a training step goes, by kind of kernel.
deployment: accuracy, bytes and milliseconds of trained networks in every export format.
overview: tests and counts every network that ships and lists it beside results of others.
check: whether every technique runs on a GPU, and what is slow there.
`python benchmark.py profile --help` lists the flags of one benchmark; their code is in benchmarks/.
"""
import engine.interrupts  # isort: skip  # noqa: F401
import importlib

from engine import commandline

PARTS = ("inference", "training", "profile", "deployment", "overview", "check")


def main(argv):
    """Run the benchmark that the first argument names."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return
    if argv[0] not in PARTS:
        raise ValueError(f"benchmark.py {argv[0]}: choose from {', '.join(PARTS)}")
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    commandline.command(main)
