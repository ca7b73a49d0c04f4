"""Settings, each declared once, in a table of the file that uses it.

    SETTINGS = {"strength": Setting(0.1, "of the penalty", low=0, below=1)}      # --strength, 0.1 where not given

A table is {name: Setting}. Flags, defaults, checks, what a resumed run may change and
what report.py tells of a run are read from the tables, which a script joins; nothing
here knows a technique by name.
"""
import argparse
import math
from typing import NamedTuple


class Setting(NamedTuple):
    """What a setting may be.

    default: of new runs, and of runs that are older than the setting. help: of its
    flag, without the default; None: it has no flag. low, high: closed ends of the
    accepted range; above, below: open ones. form: the type of a value, where the
    default does not tell it. choices: all its values. many: how many values it
    takes, as argparse's nargs. shown: what --help shows in place of a value.
    line: a technique line chooses it. free: may differ when a run goes on, and says
    nothing of the method; fixed: not even --force changes it then. clashes: (own
    values, or () for any but the default; another setting; values of that; why);
    alone: (values, why) that several processes cannot train with. only: pairs of
    (another setting, its values, or () for any but the default), without each of
    which it changes nothing. unless: pairs of (another setting, a value) beside
    which it changes nothing.
    """

    default: object = None
    help: str = None
    low: float = None
    high: float = None
    above: float = None
    below: float = None
    form: type = None
    choices: tuple = None
    many: object = None
    shown: object = None
    line: bool = False
    free: bool = False
    fixed: bool = False
    clashes: tuple = ()
    alone: tuple = ((), "")
    only: tuple = ()
    unless: tuple = ()

    @property
    def kind(self):
        """The type of a value."""
        if self.form is not None:
            return self.form
        return type(self.choices[0] if self.choices else self.default)


def line(default, choices=None, hint="", **more):
    """A setting that a technique line chooses; hint: what --help says beside that."""
    return Setting(default, "overrides the technique line" + hint, choices=choices, line=True, **more)


KINDS = {int: "a whole number", float: "a number", str: "a text in quotation marks", bool: "True or False"}


# ---- tables

def joined(*tables):
    """One table of several; ValueError for a name that two of them declare."""
    whole = {}
    for table in tables:
        twice = sorted(whole.keys() & table.keys())
        if twice:
            raise ValueError(f"two files declare the setting {twice[0]!r}; give one of them another name")
        whole |= table
    return whole


def without_flags(table):
    """The same settings for a script in which they have neither flags nor technique lines, and keep their defaults."""
    return {name: setting._replace(help=None, line=False) for name, setting in table.items()}


def only(name, values, table):
    """The table, of whose settings all that need no other change nothing unless the setting `name` has such a value."""
    return {own: setting._replace(only=setting.only or ((name, tuple(values)),)) for own, setting in table.items()}


def with_defaults(table, **defaults):
    """The table with other defaults."""
    return table | {name: table[name]._replace(default=default) for name, default in defaults.items()}


def defaults_of(table):
    """{name: default}; lists and dictionaries are fresh ones."""
    return {name: type(setting.default)(setting.default) if isinstance(setting.default, (list, dict))
            else setting.default for name, setting in table.items()}


def names_of(table, mark):
    """The names of the settings with a mark: "line", "free" or "fixed"."""
    return [name for name, setting in table.items() if getattr(setting, mark)]


# ---- flags

def flag_of(name, value=True):
    """A setting as its flag, with a value that is not simply on or off: "--lr 0.1", "--all-images", "--no-shuffle"."""
    words = value if isinstance(value, (list, tuple)) else [] if isinstance(value, bool) else [value]
    return " ".join([f"--{'no-' * (value is False)}{name.replace('_', '-')}", *map(str, words)])


def add_flags(parser, table):
    """A flag for each setting that has help; one that is not given should be absent from the result."""
    for name, setting in table.items():
        if setting.help is None:
            continue
        options = {"type": setting.kind, "choices": setting.choices, "nargs": setting.many, "metavar": setting.shown}
        if setting.kind is bool:
            options = {"action": "store_true" if setting.free else argparse.BooleanOptionalAction}
        parser.add_argument(flag_of(name), help=setting.help + default_text(setting),
                            **{option: value for option, value in options.items() if value is not None})


def default_text(setting):
    """The default as --help shows it, behind the help: " (0.5)", or "" where there is none, or a line chooses."""
    value = setting.default
    if setting.line or setting.free and setting.kind is bool or value in (None, [], {}):
        return ""
    if setting.kind is bool:
        return " (yes)" if value else " (no)"
    return f" ({' '.join(map(str, value if isinstance(value, list) else [value]))})"


# ---- checks

def check(table, settings):
    """ValueError with the accepted range, the choices or the type for the first setting that is out of them."""
    check_each(table, settings, table)
    for name, setting in table.items():
        for own, other, values, why in setting.clashes:
            value, theirs = settings[name], settings[other]
            if theirs in values and (value in own if own else value != setting.default):
                raise ValueError(f"{flag_of(name, value)} does not go with {flag_of(other, theirs)}, {why}")


def check_each(table, settings, names):
    """The part of `check` for settings of these names, each by itself."""
    for name in names:
        check_value(table[name], settings[name], f"{name} {settings[name]!r}", flag_of(name, settings[name]))


def check_value(setting, value, told, flagged=None, line=False):
    """ValueError unless a setting may have that value; of other than a technique `line`, the default is always one.

    told, flagged: how the message begins for a wrong type or word, and for a number out of range.
    """
    if type(value) is type(setting.default) and value == setting.default and not line:
        return
    values = value if setting.many and isinstance(value, (list, tuple)) else [value]
    if setting.many and not isinstance(value, (list, tuple)) or any(wrong_kind(setting.kind, each) for each in values):
        raise ValueError(f"{told}: it must be {KINDS.get(setting.kind, setting.kind.__name__)}"
                         + ", such as 8" * (setting.kind is int) + ", each of several" * bool(setting.many)
                         + (f"; choose from {', '.join(map(repr, setting.choices))}" if setting.choices else ""))
    if not setting.choices and any(each == "" for each in values):
        raise ValueError(f"{(flagged or told).strip()}: it is empty; give a value, or leave it out")
    if setting.choices and any(each not in setting.choices for each in values):
        raise ValueError(f"{told} is unknown; choose from {', '.join(map(repr, setting.choices))}")
    if any(isinstance(each, (int, float)) and not within(setting, each) for each in values):
        raise ValueError(f"{flagged or told}: {'each' if setting.many else 'it'} must be {range_of(setting)}")


def wrong_kind(kind, value):
    """Whether a value is of another type; a whole number is a number too, True and False are none."""
    return type(value) not in ((int, float) if kind is float else (kind,))


def within(setting, number):
    """Whether a number is finite and in the accepted range."""
    return ((isinstance(number, int) or math.isfinite(number))
            and (setting.low is None or number >= setting.low) and (setting.above is None or number > setting.above)
            and (setting.high is None or number <= setting.high) and (setting.below is None or number < setting.below))


def range_of(setting):
    """The accepted range in words: "at least 0 and at most 1"."""
    ends = (("at least", setting.low), ("above", setting.above), ("at most", setting.high), ("below", setting.below))
    return " and ".join(f"{word} {end:g}" for word, end in ends if end is not None) or "finite"


def alone(table, settings):
    """Why these settings take one process, as sentences; an empty list where several can train with them."""
    return [f"{flag_of(name, settings[name])} {setting.alone[1]}" for name, setting in table.items()
            if settings[name] in setting.alone[0]]


def idle(table, settings, given):
    """What is `given` by a flag, is not the default, and changes nothing beside the other settings, as sentences."""
    found = []
    for name in given:
        if settings[name] == table[name].default:
            continue
        lacks = lacking(table, settings, name)
        if lacks:
            found.append(f"{flag_of(name, settings[name])} changes nothing {lacks}")
    return found


def lacking(table, settings, name):
    """Why a setting changes nothing beside the others: "without --teacher CHECKPOINT", or None where it does."""
    for other, values in table[name].only:
        theirs = settings[other]
        if theirs not in values if values else theirs == table[other].default:
            need = values[0] if len(values) == 1 else " or ".join(map(str, values)) or table[other].shown or "..."
            return f"without {flag_of(other, need)}"
    return next((f"beside {flag_of(other, value)}" for other, value in table[name].unless if settings[other] == value),
                None)


# ---- a run that goes on

def differing(table, before, settings):
    """{name: (value then, value now)} of the settings that are not those of a checkpoint; free ones are left out."""
    stored = {**defaults_of(table), **before}
    return {name: (stored[name], settings[name]) for name in table
            if name not in names_of(table, "free") and stored[name] != settings[name]}


def in_words(changed):
    """What `differing` gives, as "lr: 0.1 then, 0.2 now; ..."."""
    return "; ".join(f"{name}: {old} then, {new} now" for name, (old, new) in changed.items())


def to_resume(table, state, lines, given):
    """The settings stored in a checkpoint, with what may differ taken from the flags; defaults for what it lacks.

    Raises ValueError that lists what must not differ, unless --force is given.
    """
    free, before = names_of(table, "free"), defaults_of(table)
    stored = {**before, **state["settings"]}
    held = {**{name: before[name] for name in lines}, **stored["lines"]}
    changed = {name: (stored.get(name), value) for name, value in given.items()
               if name not in free and stored.get(name) != value}
    # a flag or a recipe had the word where a run has another value than the lines it began with
    changed |= {name: (held.get(name), value) for name, value in lines.items()
                if name not in given and stored.get(name) == held.get(name) != value}
    fixed = [name for name in names_of(table, "fixed") if name in changed]
    if fixed:
        old, new = changed[fixed[0]]
        way = "start a new run with another --out" if fixed[0] in given else f"go on with {flag_of(fixed[0], old)}"
        raise ValueError(f"the run in {given['out']} began with {fixed[0]} {old}; {flag_of(fixed[0])} {new} comes too "
                         f"late, with --force too: {way}")
    if changed and not given.get("force"):
        raise ValueError(f"the run in {given['out']} has other settings ({in_words(changed)}); --force accepts the new "
                         "ones")
    accepted = {name: new for name, (_, new) in changed.items()}
    return {**stored, "dry_run": False, "debug": False, **accepted,
            **{name: given[name] for name in free if name in given}, "lines": {**held, **lines}}
