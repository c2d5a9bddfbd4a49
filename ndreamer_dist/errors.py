"""The errors that the package raises on purpose, and helpers for their messages.

Each error is also a `ValueError` or `RuntimeError`; the command line prints it as one line. A message names the thing at
fault, what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

LONGEST_NAME = 80
"""Maximum number of characters of a name in a message."""
MEND = "`ndreamer-dist check DIR --mend` removes what is damaged in a run, and its `run` command makes that again"
"""Default advice for a damaged file."""
MOST_COMPARED = 20_000
"""Maximum number of names that `suggest` compares."""


class NDreamerError(Exception):
    """Base of all errors raised on purpose by this package; the command line turns them into exit code 2."""


class SettingsError(NDreamerError, ValueError):
    """A setting is unknown, malformed or out of range."""


class CohortError(NDreamerError, ValueError):
    """The input cohort cannot be used."""


class StoreError(NDreamerError, RuntimeError):
    """A store is missing, truncated or damaged; the message names store, array and chunk."""


class DamagedError(StoreError):
    """A file that a run made is damaged or missing.

    Parameters
    ----------
    what
        The file, or store, array and chunk, and what is wrong with it.
    url
        Address of the file.
    advice
        What to do; ends the message.
    """

    def __init__(self, what: str, url: str, advice: str = MEND) -> None:
        super().__init__(what, url, advice)  # pickle calls the class with these arguments
        self.what, self.url, self.advice = what, url, advice

    @classmethod
    def of(cls, url: str, why: object) -> DamagedError:
        """Return the error for a damaged file; `why` is the evidence."""
        return cls(f"{url} is damaged ({why})", url)

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class RunError(NDreamerError, RuntimeError):
    """A run directory cannot be used: it is locked, or holds another run or results of other settings."""


class ResourceError(NDreamerError, RuntimeError):
    """Memory, disk or processors do not suffice."""


class QueryError(NDreamerError, ValueError):
    """A query names cells, genes, conditions or columns that the results do not have."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'a' or 'b'?``, or an empty string if no known name is similar.

    Names that differ only in case come before all others.
    """
    likely = [str(k) for k in itertools.islice(known, MOST_COMPARED) if len(str(k)) <= LONGEST_NAME]
    same = [k for k in likely if k.casefold() == str(name).casefold()][:3]
    near = same or difflib.get_close_matches(str(name)[:LONGEST_NAME], likely, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def quoted(name: object) -> str:
    """Return a name for a message: quoted, with control characters escaped, cut if it is long."""
    text = str(name)
    return repr(text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}...")


def has_controls(text: str) -> bool:
    """Return whether text holds control characters: line ends, NUL, escape sequences."""
    return any(ord(c) < 32 or ord(c) == 127 for c in text)


def is_unicode(text: str) -> bool:
    """Return whether text can be stored as UTF-8."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in text)


def printable(text: str) -> str:
    """Return text as one line with control characters escaped, since names come from files of unknown origin."""
    line = " ".join(part.strip() for part in text.splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def shown(name: str) -> str:
    """Return a name for a table: on one line, cut if it is long."""
    return printable(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}...")


def listing(names: Iterable[object], *, limit: int = 8) -> str:
    """Return names for a message: the first `limit`, quoted, and the number of the others."""
    items = [quoted(n) for n in names]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
