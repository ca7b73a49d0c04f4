"""Notes on a run before its first step, printed on stderr, and the changes that --force allows.

A note is one line. A change that would make a resumed run a different one is refused unless
--force is given; then a note names it, so that nothing changes silently.
"""
import sys

from engine import parallel
from engine.settings import in_words


def note(sentence):
    """Print a note on stderr, only once if several processes train."""
    if parallel.leads():
        print(f"note: {sentence}", file=sys.stderr, flush=True)


def refuse_over(changed, out):
    """ValueError if a finished run would get other settings: it would train nothing with them.

    changed: from `settings.differing`; out: the run's folder. Settings of how steps are computed may change.
    """
    if changed.keys() - {"compile", "arithmetic", "convolutions"}:
        raise ValueError(f"the run in {out} is finished and would train nothing with other settings "
                         f"({in_words(changed)}); give it more --epochs, too, or start a new run with another --out")


def tell_changes(changed, out):
    """Print a note of the settings that --force changes in the run in `out`, if any."""
    if changed:
        note(f"the run in {out} goes on with other settings ({in_words(changed)})")


def refuse_changes(change, forced, over=False):
    """ValueError for a `change` in the files that a run began with (a sentence, or None); with --force only a note.

    over: the run is finished; --force does not help then, since it would only change what model.pt says of its data.
    """
    if change and (over or not forced):
        raise ValueError(f"{change}; " + ("the run is finished: put back what it began with, or start a new run with "
                                          "another --out" if over else "--force goes on with it as it is"))
    if change:
        note(f"{change}; the run goes on with it as it is")
