"""Networks as safetensors files: weights that other programs can read, structure and data set in the metadata.

    content = to_bytes(network, 1)       # network: architecture, widths, weights, and dataset and kind if known
    state = read("a.safetensors", content)
"""
import hashlib
import json

import torch

STRUCTURE = "architecture", "widths", "dataset", "kind"


def to_bytes(network, version):
    """The bytes of a safetensors file with a network; `read` is the inverse."""
    from safetensors.torch import save
    structure = json.dumps({name: network[name] for name in STRUCTURE if name in network})
    weights = {name: tensor.contiguous() for name, tensor in network["weights"].items()}
    return save(weights, {"format": str(version), "network": structure, "sha256": digest_of(structure, weights)})


def digest_of(structure, weights):
    """The SHA-256 of a network as text; safetensors files have no checksum of their own."""
    digest = hashlib.sha256(structure.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read(path, content):
    """The dictionary in the bytes of a safetensors file; ValueError if it is damaged or not of this project.

    path: named in the error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        weights = load(content)
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as problem:
        raise ValueError(f"{path} is damaged: {problem}") from None
    if "network" not in header:
        raise ValueError(f"{path} holds tensors alone; a network of this project has its structure in the metadata")
    if header.get("sha256", written := digest_of(header["network"], weights)) != written:
        raise ValueError(f"{path} is damaged: its SHA-256 is {written}, it was written with {header['sha256']}")
    try:
        return {"format": int(header["format"]), **json.loads(header["network"]), "weights": weights}
    except (KeyError, TypeError, ValueError, RecursionError) as problem:
        raise ValueError(f"{path} has a structure in its metadata that cannot be read: {problem}") from None
