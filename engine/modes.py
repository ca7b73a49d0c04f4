"""Put a network in evaluation or training mode temporarily."""
from contextlib import contextmanager


@contextmanager
def in_mode(model, training=False):
    """A block with `model` in evaluation mode, or training mode; afterwards each module has its old mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(training)
    finally:
        for module, mode in modes:
            module.training = mode
