"""The command line of all scripts: technique lines, flags, one-line errors.

A training script opens with a block of technique lines. A line sets the default of the
flag of the same name, and the flag overrides it. The allowed values are declared in tables
of settings (`engine/settings.py`).
"""
import argparse
import ast
import io
import math
import shlex
import signal
import subprocess
import sys
import tokenize
import traceback
import warnings
from pathlib import Path

import torch

from engine import settings, streams

ARITHMETIC = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Not,
              ast.USub, ast.UAdd)


# ---- technique lines

def lines_of(script, table):
    """{group: value} of the active technique lines of a script; ValueError if a group of `table` has no active line."""
    lines, _ = read_lines(script, table)
    absent = [name for name in settings.names_of(table, "line") if name not in lines]
    if absent:
        raise ValueError(f"{Path(script).name} has no {absent[0].upper()} line; one is needed")
    return lines


def read_lines(path, table):
    """({group: value} of the active technique lines of a script, {group: [values]} of all its lines).

    The block goes from the comment `# ---- techniques` to the next `# ----`; it may contain
    GROUP = value, such lines as comments, other comments, and blank lines. ValueError with
    the group and its choices unless exactly one line of each group is active and has a value
    that the table of settings allows.
    """
    groups = settings.names_of(table, "line")
    name, active, choices = Path(path).name, {}, {}
    for number, group, value, is_active in technique_lines(path):
        if group.lower() not in groups:
            if is_active:
                raise ValueError(f"{name}, line {number}: no group is called {group}; there are "
                                 f"{', '.join(known.upper() for known in groups)}")
            continue
        choices.setdefault(group, []).append(value)
        active.setdefault(group, []).extend([(number, value)] * is_active)
    for group, found in active.items():
        if len(found) != 1:
            raise ValueError(f"{name} has {len(found)} active {group} lines; leave one of "
                             f"{', '.join(map(repr, choices[group]))} without its #")
        number, value = found[0]
        settings.check_value(table[group.lower()], value, f"{name}, line {number}: {group} = {value!r}", line=True)
    return {group.lower(): found[0][1] for group, found in active.items()}, choices


def check_lines(script):
    """Exit with one error line if the technique lines of `script` cannot be read.

    A script calls this above its technique lines, before Python executes them, also when it is imported.
    """
    with streams.guarded():
        code = code_of(lambda argv: technique_lines(script))
    if code:
        sys.exit(code)


def technique_lines(path):
    """[(line number, group, value, whether it is active)] of the block, in order; ValueError for other statements."""
    name = Path(path).name
    try:
        with tokenize.open(path) as file:
            text = file.read()
        statements = ast.parse(text).body
    except (SyntaxError, ValueError) as problem:          # UnicodeDecodeError is a ValueError
        where = f", line {problem.lineno}" if getattr(problem, "lineno", None) else ""
        raise ValueError(f"{name}{where}: Python cannot read it: {getattr(problem, 'msg', problem)}") from None
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")}
    heads = [number for number, comment in comments.items() if comment.startswith("# ----")]
    first = next((number for number in heads if comments[number].startswith("# ---- techniques")), None)
    if first is None:
        raise ValueError(f"{name} has no line that starts with '# ---- techniques', above its technique lines")
    last = next((number for number in heads if number > first), math.inf)
    found = [(node.lineno, *read_line(node, f"{name}, line {node.lineno}"), True) for node in statements
             if first < node.lineno < last]
    for number, comment in comments.items():
        if first < number < last:
            found += commented_line(number, comment)
    return sorted(found, key=lambda line: line[0])


def commented_line(number, comment):
    """[(line number, group, value, False)] of a comment that is a technique line, [] of any other comment."""
    try:
        (node,) = ast.parse(comment.lstrip("# \t")).body
        return [(number, *read_line(node, ""), False)]
    except (SyntaxError, ValueError):
        return []


def read_line(node, where):
    """(group, value) of one statement; ValueError, beginning with `where`, unless it has the form GROUP = value."""
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.isupper()):
        raise ValueError(f"{where}: {shortened(ast.unparse(node))} is no technique line; one reads GROUP = value, "
                         "and the block ends at the next line that starts with '# ----'")
    group, parts = node.targets[0].id, list(ast.walk(node.value))
    words = [part.id for part in parts if isinstance(part, ast.Name)]
    try:
        if not all(isinstance(part, ARITHMETIC) for part in parts):
            raise ValueError(f"write {words[0]!r} with quotation marks, or True or False with a capital" if words
                             else "it must be a text, a whole number, True or False")
        return group, eval(compile(ast.Expression(node.value), group, "eval"), {"__builtins__": {}})
    except (ArithmeticError, MemoryError, TypeError, ValueError) as problem:
        raise ValueError(f"{where}: {group} = {shortened(ast.unparse(node.value))}: {problem}") from None


def shortened(text, length=60):
    """A text on one line, cut off after `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "..."


# ---- flags

class Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as ValueError with one line."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def training_parser(description, table):
    """A parser for the flags of a table of settings; flags that are not given are absent from its result."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    settings.add_flags(parser, table)
    return parser


def pick_device(name):
    """The torch.device called `name`; "auto" prefers CUDA, then MPS, then the CPU. ValueError lists those present."""
    with warnings.catch_warnings(record=True) as told:          # torch warns of a driver that is too old for it
        usable = torch.cuda.is_available()
    present = [f"cuda:{index}" for index in range(torch.cuda.device_count() if usable else 0)]
    present += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    reason = f" ({str(told[0].message).split(' (')[0]})" if told else ""
    if name == "auto":
        if reason and not usable:
            print(f"note: no GPU is used{reason}", file=sys.stderr, flush=True)
        return torch.device(present[0])
    if name not in present and f"{name}:0" not in present:
        raise ValueError(f"device {name!r} is absent; present: {', '.join(present)}{reason}")
    return torch.device(name)


def device_name(device):
    """The name of a device for tables: the GPU's name, or the type and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def call(command, show=False):
    """Run a script of this project. Returns its output, or shows it if `show`.

    RuntimeError that names the script if it fails, with its error line if that was not shown.
    """
    program = [sys.executable, str(Path(__file__).resolve().parents[1] / command[0]), *command[1:]]
    if show:
        code, output, error = streams.run_shown(program), None, ""
    else:
        done = subprocess.run(program, capture_output=True, text=True)
        code, output, error = done.returncode, done.stdout, "; " + "".join(done.stderr.strip().splitlines()[-1:])
    if code:
        raise RuntimeError(f"python {shlex.join(command)} failed with exit code {code}{error}")
    return output


def command(main):
    """Run a script's main(argv) and exit with code 0, or 2 for bad input, 1 for a failed run, 130 for Ctrl-C.

    All exceptions are handled here: they become one line on stderr, with --debug after
    their traceback. After the first Ctrl-C further ones are ignored, so that they cannot
    interrupt the cleanup. If a standard stream is closed or full, the work continues and its
    files are complete; for a full one the exit code is 1, and the other stream reports it.
    """
    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, interrupt)
    with streams.guarded() as (output, errors):
        code = code_of(main)
        errors.flush()
        if errors.problem is not None and not isinstance(errors.problem, BrokenPipeError):
            code = code or 1
            if "--json" not in sys.argv:          # standard output must stay JSON
                print(f"note: standard error could not be written ({errors.problem}): what was to be told there is "
                      "lost, files are whole")
        output.flush()
        if output.problem is not None and not isinstance(output.problem, BrokenPipeError):
            code = code or report(f"standard output could not be written ({output.problem}): what was printed from "
                                  "there on is lost, files are whole", 1)
    if code:
        sys.exit(code)


def code_of(main):
    """Run main(sys.argv[1:]) and print its error, if any. Returns the exit code."""
    try:
        main(sys.argv[1:])
    except SystemExit as end:             # --help
        return end.code or 0
    except KeyboardInterrupt as problem:
        return report(f"interrupted{'; ' if str(problem) else ''}{problem}", 130)
    except (ValueError, OSError) as problem:
        return report(problem, 2)
    except RuntimeError as problem:
        return report(problem, 1)
    except Exception as problem:
        return report(f"{type(problem).__name__}: {problem}; this is a fault of the program, --debug shows where", 1)
    return 0


def report(problem, code):
    """Print one error line, with --debug after the traceback. Returns the exit code."""
    if "--debug" in sys.argv:
        traceback.print_exc()
    text = " ".join(str(problem).split()) or type(problem).__name__
    print(f"error: {text}", file=sys.stderr, flush=True)
    return code
