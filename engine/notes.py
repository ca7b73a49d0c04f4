"""What is said of a run before its first step, on stderr, and what --force lets pass.

A note is one line. What another run would be is refused, unless --force is given; then
a note names it, so that nothing changes in silence.
"""
import sys

from engine import parallel
from engine.settings import in_words


def note(sentence):
    """Print a note on stderr, of several processes once."""
    if parallel.leads():
        print(f"note: {sentence}", file=sys.stderr, flush=True)


def refuse_over(changed, out):
    """ValueError where a run that has no epoch left would get other settings: it would train nothing with them.

    changed: as `settings.differing` gives it; out: the run's folder. How steps would be computed does not matter.
    """
    if changed.keys() - {"compile", "arithmetic", "convolutions"}:
        raise ValueError(f"the run in {out} is finished and would train nothing with other settings "
                         f"({in_words(changed)}); give it more --epochs, too, or start a new run with another --out")


def tell_changes(changed, out):
    """A note of the settings that --force changes of the run in `out`, if any."""
    if changed:
        note(f"the run in {out} goes on with other settings ({in_words(changed)})")


def refuse_changes(change, forced, over=False):
    """ValueError for a `change` of the files that a run began with, in words or None; a note of it with --force.

    over: the run has no epoch left, and another one's pictures would only change what its network says of them.
    """
    if change and (over or not forced):
        raise ValueError(f"{change}; " + ("the run is finished: put back what it began with, or start a new run with "
                                          "another --out" if over else "--force goes on with it as it is"))
    if change:
        note(f"{change}; the run goes on with it as it is")
