"""Write the columns of history.csv for TensorBoard: `tensorboard --logdir runs`."""
import importlib.util
import numbers


def check(wanted):
    """ValueError if TensorBoard's files are wanted and its package is not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package of that name: pip install tensorboard; or leave the flag out")


def opened(folder, rows):
    """A writer for a history that has `rows` rows so far; TensorBoard hides what the folder holds of later steps."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=rows)


def add(writer, row):
    """Write one row of a history, {column: value}: each number under its column's name, with its epoch as the step."""
    for name, value in row.items():
        if isinstance(value, numbers.Number) and name != "epoch":
            writer.add_scalar(name, value, row["epoch"])
    writer.flush()
