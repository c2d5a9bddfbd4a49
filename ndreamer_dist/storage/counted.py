"""Count and log the bytes that a query reads from a store."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Concatenate, ParamSpec, TypeVar

from ndreamer_dist.storage.shards import counting

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_Answer = TypeVar("_Answer")
_Reader = TypeVar("_Reader")
_in_query: ContextVar[bool] = ContextVar("in_query", default=False)
"""Whether this thread is inside a query; a query that another query calls is not logged."""


def counted(query: Callable[Concatenate[_Reader, _P], _Answer]) -> Callable[Concatenate[_Reader, _P], _Answer]:
    """Decorate a method that reads a store: keep its counts as `_last_read`, and log them for the outermost query."""

    @functools.wraps(query)
    def counting_query(self: _Reader, *args: _P.args, **kwargs: _P.kwargs) -> _Answer:
        inner = _in_query.get()
        token = _in_query.set(True)
        try:
            with counting() as reads:
                answer = query(self, *args, **kwargs)
        finally:
            _in_query.reset(token)
        object.__setattr__(self, "_last_read", reads)
        if not inner:
            logger.debug("%s: read %s", query.__name__, reads)
        return answer

    return counting_query
