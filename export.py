"""Write a trained network as one compact file: `python export.py --checkpoint runs/a/model.pt --out a.pt.gz`.

Half precision, zeros as one bit each, compressed. The file is read back and
compared with the network it was made from before the command reports success;
test.py and profil.py read it like any checkpoint.
"""
import os
from pathlib import Path

import torch

import checkpoint
import commandline
from train import find_checkpoint, load_network


def export(source, target):
    """Write the network in `source` compactly to `target`, read it back and compare.

    Returns (bytes before, bytes after). Raises ValueError where half precision
    overflows, RuntimeError where what was read back is not the rounded network.
    """
    _, state = load_network(source)
    network = {name: state[name] for name in ("architecture", "widths", "weights", "dataset")}
    checkpoint.save_compact(target, network)
    written = checkpoint.read(target)["weights"]
    for name, tensor in checkpoint.to_half(state["weights"]).items():
        if not torch.equal(written[name], tensor):
            raise RuntimeError(f"{target} does not hold {name} as it was written")
    return os.path.getsize(source), os.path.getsize(target)


def main(argv):
    """Export one checkpoint."""
    parser = commandline.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", help="a run's model.pt or last.pt (the newest run's)")
    parser.add_argument("--out", required=True, help="the file to write, by custom .pt.gz")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    arguments = parser.parse_args(argv)
    source, target = find_checkpoint(arguments.checkpoint), Path(arguments.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    before, after = export(source, target)
    print(f"{source}: {before:,} bytes -> {target}: {after:,} bytes, {before / after:.1f} times smaller")


if __name__ == "__main__":
    commandline.command(main)
