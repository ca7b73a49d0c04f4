"""Settings: each is declared once, in a table of the file that uses it.

    SETTINGS = {"strength": Setting(0.1, "of the penalty", low=0, below=1)}      # --strength, 0.1 where not given

A table is {name: Setting}. A script joins the tables; its flags, defaults and checks, what a
resumed run may change and what report.py shows of a run all follow from them. Nothing here
depends on the name of a technique.
"""
import argparse
import math
from typing import NamedTuple


class Setting(NamedTuple):
    """The declaration of a setting.

    default: for new runs, and for runs older than the setting. help: text of its flag,
    without the default; None: it has no flag. low, high: closed ends of the accepted range;
    above, below: open ends. form: the type of a value, if the default does not show it. reads:
    what turns a flag's text into the value, if that is not the type itself.
    choices: all accepted values. many: how many values it takes, as argparse's nargs. shown:
    what --help shows in place of a value. line: a technique line sets it. free: it may differ
    in a resumed run, and is not part of the method; fixed: not even --force changes it in a
    resumed run. clashes: combinations that are refused, (own values, or () for any but the
    default; another setting; values of that; why). alone: (values, why) that several
    processes cannot train with. only: pairs (another setting, its values, or () for any but
    the default); it has no effect unless all of them hold. unless: pairs (another setting, a
    value); it has no effect if one of them holds.
    """

    default: object = None
    help: str = None
    low: float = None
    high: float = None
    above: float = None
    below: float = None
    form: type = None
    reads: object = None
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
    """A setting that a technique line sets; hint: is added to its text in --help."""
    return Setting(default, "overrides the technique line" + hint, choices=choices, line=True, **more)


KINDS = {int: "a whole number", float: "a number", str: "a text in quotation marks", bool: "True or False"}


# ---- tables

def joined(*tables):
    """Join several tables into one; ValueError for a name that two of them declare."""
    whole = {}
    for table in tables:
        twice = sorted(whole.keys() & table.keys())
        if twice:
            raise ValueError(f"two files declare the setting {twice[0]!r}; give one of them another name")
        whole |= table
    return whole


def without_flags(table):
    """The table without flags and technique lines, for a script in which these settings keep their defaults."""
    return {name: setting._replace(help=None, line=False) for name, setting in table.items()}


def only(name, values, table):
    """The table whose settings have no effect unless `name` is one of `values`; settings with an `only` keep theirs."""
    return {own: setting._replace(only=setting.only or ((name, tuple(values)),)) for own, setting in table.items()}


def with_defaults(table, **defaults):
    """The table with other defaults."""
    return table | {name: table[name]._replace(default=default) for name, default in defaults.items()}


def defaults_of(table):
    """{name: default}; lists and dictionaries are copies."""
    return {name: type(setting.default)(setting.default) if isinstance(setting.default, (list, dict))
            else setting.default for name, setting in table.items()}


def names_of(table, mark):
    """The names of the settings with a mark: "line", "free" or "fixed"."""
    return [name for name, setting in table.items() if getattr(setting, mark)]


# ---- flags

def flag_of(name, value=True):
    """A setting as its flag, with the value unless it is a bool: "--lr 0.1", "--all-images", "--no-shuffle"."""
    words = value if isinstance(value, (list, tuple)) else [] if isinstance(value, bool) else [value]
    return " ".join([f"--{'no-' * (value is False)}{name.replace('_', '-')}", *map(str, words)])


def add_flags(parser, table):
    """Add a flag for each setting with help; flags that are not given should be absent from the parser's result."""
    for name, setting in table.items():
        if setting.help is None:
            continue
        options = {"type": setting.reads or setting.kind, "choices": setting.choices, "nargs": setting.many,
                   "metavar": setting.shown}
        if setting.kind is bool:
            options = {"action": "store_true" if setting.free else argparse.BooleanOptionalAction}
        parser.add_argument(flag_of(name), help=setting.help + default_text(setting),
                            **{option: value for option, value in options.items() if value is not None})


def default_text(setting):
    """The default as --help shows it after the help: " (0.5)", or "" if there is none or a technique line sets it."""
    value = setting.default
    if setting.line or setting.free and setting.kind is bool or value in (None, [], {}):
        return ""
    if setting.kind is bool:
        return " (yes)" if value else " (no)"
    return f" ({' '.join(map(str, value if isinstance(value, list) else [value]))})"


# ---- checks

def check(table, settings):
    """ValueError for the first setting with a wrong value, with the accepted range, choices or type, or for a clash."""
    check_each(table, settings, table)
    for name, setting in table.items():
        for own, other, values, why in setting.clashes:
            value, theirs = settings[name], settings[other]
            if theirs in values and (value in own if own else value != setting.default):
                raise ValueError(f"{flag_of(name, value)} does not go with {flag_of(other, theirs)}, {why}")


def check_each(table, settings, names):
    """The part of `check` that looks at each of these settings by itself."""
    for name in names:
        check_value(table[name], settings[name], f"{name} {settings[name]!r}", flag_of(name, settings[name]))


def check_value(setting, value, told, flagged=None, line=False):
    """ValueError unless a setting may have this value; the default is always accepted, except in a technique `line`.

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
    """Whether a value has the wrong type; an int is accepted as a float, a bool is not accepted as a number."""
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
    """Why these settings need a single process, as sentences; an empty list if several processes can use them."""
    return [f"{flag_of(name, settings[name])} {setting.alone[1]}" for name, setting in table.items()
            if settings[name] in setting.alone[0]]


def idle(table, settings, given):
    """Sentences on the flags in `given` that differ from the default but have no effect with the other settings."""
    found = []
    for name in given:
        if settings[name] == table[name].default:
            continue
        lacks = lacking(table, settings, name)
        if lacks:
            found.append(f"{flag_of(name, settings[name])} changes nothing {lacks}")
    return found


def lacking(table, settings, name):
    """Why a setting has no effect with the others, such as "without --teacher CHECKPOINT"; None if it has one."""
    for other, values in table[name].only:
        theirs = settings[other]
        if theirs not in values if values else theirs == table[other].default:
            need = values[0] if len(values) == 1 else " or ".join(map(str, values)) or table[other].shown or "..."
            return f"without {flag_of(other, need)}"
    return next((f"beside {flag_of(other, value)}" for other, value in table[name].unless if settings[other] == value),
                None)


# ---- resuming a run

def differing(table, before, settings):
    """{name: (value then, value now)} of the settings that differ from a checkpoint's, without the free ones."""
    stored = {**defaults_of(table), **before}
    return {name: (stored[name], settings[name]) for name, setting in table.items()
            if not setting.free and stored[name] != settings[name]}


def in_words(changed):
    """The result of `differing` as text: "lr: 0.1 then, 0.2 now; ..."."""
    return "; ".join(f"{name}: {old} then, {new} now" for name, (old, new) in changed.items())


def to_resume(table, state, lines, given):
    """The settings of a resumed run: those stored in its checkpoint, changed by the flags; defaults for missing ones.

    Raises ValueError that lists changes which need --force, unless it is given, and for a change of a fixed setting.
    """
    free, before = names_of(table, "free"), defaults_of(table)
    stored = {**before, **state["settings"]}
    held = {**{name: before[name] for name in lines}, **stored["lines"]}
    changed = {name: (stored.get(name), value) for name, value in given.items()
               if name not in free and stored.get(name) != value}
    # where a run's value differs from its technique lines, a flag or a recipe had set it: lines do not change it
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
