"""The errors that users can meet: each is a `ValueError` or `RuntimeError`, shown as one line by the command line.

Every message names the thing, what was found, what was expected and what to do about it.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

LONGEST_NAME = 80
"""Characters of a name that a message shows."""
MEND = "`ndreamer-dist check DIR --mend` removes what is damaged in a run, and its `run` command makes that again"
"""What to do about a damaged file, where the run's own driver is not there to do it."""
MOST_COMPARED = 20_000
"""Names that are looked at for one that was meant."""


class NDreamerError(Exception):
    """Base of all errors raised on purpose by this package; the command line turns them into exit code 2."""


class SettingsError(NDreamerError, ValueError):
    """A setting is unknown, malformed or out of range."""


class CohortError(NDreamerError, ValueError):
    """The input cohort cannot be used as it is."""


class StoreError(NDreamerError, RuntimeError):
    """A store is missing, truncated or damaged; the message names store, array and chunk."""


class DamagedError(StoreError):
    """A file that a run made is damaged or missing.

    Parameters
    ----------
    what
        Names the file, or store, array and chunk, and what is wrong.
    url
        The file's address.
    advice
        What to do; added to the message.
    """

    def __init__(self, what: str, url: str, advice: str = MEND) -> None:
        super().__init__(what, url, advice)  # all of them, so that it can be pickled
        self.what, self.url, self.advice = what, url, advice

    @classmethod
    def of(cls, url: str, why: object) -> DamagedError:
        """Return the error that a file is damaged, and how that is known."""
        return cls(f"{url} is damaged ({why})", url)

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class RunError(NDreamerError, RuntimeError):
    """A run directory cannot be used as asked: another run's, locked, or made with other settings."""


class ResourceError(NDreamerError, RuntimeError):
    """Memory, disk or processors will not do for the plan."""


class QueryError(NDreamerError, ValueError):
    """A question to the results names cells, genes or conditions that are not there."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?``, or an empty string where no known name is near.

    A name that differs in small and capital letters alone is nearer than all others.
    """
    likely = [str(k) for k in itertools.islice(known, MOST_COMPARED) if len(str(k)) <= LONGEST_NAME]
    same = [k for k in likely if k.casefold() == str(name).casefold()][:3]
    near = same or difflib.get_close_matches(str(name)[:LONGEST_NAME], likely, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def quoted(name: object) -> str:
    """Return a name for a message: in quotes, control characters escaped, a long one cut."""
    text = str(name)
    return repr(text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}...")


def has_controls(text: str) -> bool:
    """Return whether text holds control characters: line ends, NUL, what steers a terminal."""
    return any(ord(c) < 32 or ord(c) == 127 for c in text)


def is_unicode(text: str) -> bool:
    """Return whether text can be stored as UTF-8."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in text)


def printable(text: str) -> str:
    """Return text on one line, what a terminal would obey rather than show escaped: names come from files."""
    line = " ".join(part.strip() for part in text.splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def shown(name: str) -> str:
    """Return a name for a table: on one line, a long one cut."""
    return printable(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}...")


def listing(names: Iterable[object], *, limit: int = 8) -> str:
    """Return names for a message: the first few, quoted, and how many more there are."""
    items = [quoted(n) for n in names]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
