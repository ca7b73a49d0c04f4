"""A network in evaluation or training mode for a while."""
from contextlib import contextmanager


@contextmanager
def in_mode(model, training=False):
    """`model` in evaluation, or in training mode, within a with block; then each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(training)
    finally:
        for module, mode in modes:
            module.training = mode
