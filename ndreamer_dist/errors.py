"""The errors a user can meet, each a `ValueError` or `RuntimeError` that the command line shows as one line.

Every message names the thing, what was found, what was expected and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NDreamerError(Exception):
    """Base of all errors raised on purpose by this package; the command line turns them into exit code 2."""


class SettingsError(NDreamerError, ValueError):
    """A setting is unknown, malformed or out of range."""


class CohortError(NDreamerError, ValueError):
    """The input cohort cannot be used as it is."""


class StoreError(NDreamerError, RuntimeError):
    """A store is missing, truncated or damaged; the message names store, array and chunk."""


class RunError(NDreamerError, RuntimeError):
    """A run directory cannot be used as asked: another run's, locked, or made with other settings."""


class ResourceError(NDreamerError, RuntimeError):
    """Memory, disk or processors will not do for the plan."""


class QueryError(NDreamerError, ValueError):
    """A question to the results names cells, genes or conditions that are not there."""


def suggest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return `` Did you mean 'a' or 'b'?``, or an empty string where no known name is near."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=limit, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def listing(names: Iterable[object], *, limit: int = 8) -> str:
    """Return names for a message: the first few, quoted, and how many more there are."""
    items = [repr(str(n)) for n in names]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
