"""What history.csv has, for those who watch runs in TensorBoard: `tensorboard --logdir runs`."""
import importlib.util
import numbers


def check(wanted):
    """ValueError where TensorBoard's files are wanted and the package that writes them is not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package of that name: pip install tensorboard; or leave the flag out")


def opened(folder, rows):
    """A writer for rows of a history from the `rows`-th on: what its folder holds of later ones is not shown."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=rows)


def add(writer, row):
    """Write one row of a history, {column: value}: each number under its column, at the step of its epoch."""
    for name, value in row.items():
        if isinstance(value, numbers.Number) and name != "epoch":
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()
