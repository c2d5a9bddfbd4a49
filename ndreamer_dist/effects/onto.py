"""The record of the run that cells were mapped onto, kept with the mapped cells."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ndreamer_dist.cohort.design import Design
from ndreamer_dist.errors import StoreError
from ndreamer_dist.storage.files import Storage

logger = logging.getLogger(__name__)

FOREIGN = 0.5
"""Share of far or unlike cells from which a cohort does not belong to the run."""
NOTABLE = 0.1
"""Share of far or unlike cells from which we warn."""
Opened = TypeVar("Opened", bound=Storage)


@dataclass(frozen=True)
class Onto:
    """A finished run, and how much the mapped cells differ from its own cells.

    Attributes
    ----------
    url, path
        Address of the run directory, and the relative path to it from that of the mapped cells; None unless both are
        local.
    space
        Name of the matching space.
    key
        Key of the run's results, which identifies them.
    near
        Largest distance of a near control match, as in the run; defines `obs["ndreamer_overlap"]`.
    limit
        99th percentile of the distances of the run's own cells to the control.
    far
        Share of the mapped cells beyond the limit. About 0.01 is expected of cells like the run's.
    unlike
        Share of the mapped cells whose likeness to their control matches is below the first percentile of the run's own
        cells (`mapping.likeness`). About 0.01 is expected of cells like the run's.
    far_by_group, unlike_by_group
        The same shares, by group name.
    """

    url: str
    path: str | None
    space: str
    key: str
    near: float = 0.0
    limit: float = 0.0
    far: float = 0.0
    unlike: float = 0.0
    far_by_group: Mapping[str, float] | None = None
    unlike_by_group: Mapping[str, float] | None = None

    def __str__(self) -> str:
        line = (
            f"of the mapped cells {self.far:.1%} are farther from the run's controls than 99 % of the run's own cells, "
            f"and {self.unlike:.1%} are less like their control matches"
        )
        if not self.belongs:
            return f"these cells do not belong to the run, and their effects mean nothing: {line}"
        return f"{line}; the effects of those are not to be trusted" if self.is_notable else line

    @property
    def is_notable(self) -> bool:
        """Whether enough cells differ from those of the run to warn users."""
        return max(self.far, self.unlike) >= NOTABLE

    @property
    def belongs(self) -> bool:
        """Whether the cells are like those of the run; if not, their effects mean nothing."""
        return max(self.far, self.unlike) < FOREIGN

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)

    @classmethod
    def read(cls, text: str, where: str) -> Onto | None:
        """Read from JSON text of a store, None from `null`; raise `StoreError` if the text is damaged."""
        try:
            fields = json.loads(text)
            return None if fields is None else cls(**fields)
        except (TypeError, ValueError, RecursionError) as error:
            msg = f"{where}: its record of the run that it is mapped onto is damaged ({type(error).__name__})"
            raise StoreError(msg) from error

    def measured(self, design: Design, distances: np.ndarray) -> Onto:
        """Return the record with `far` and `far_by_group` set, and log it.

        Parameters
        ----------
        distances
            (cells,) distances of the mapped cells to the control; cells without one (NaN) do not count.
        """
        first = design.first_row
        shares = {g.name: self._far(distances[g.start - first : g.stop - first]) for g in design.own_groups}
        found = replace(self, far=self._far(distances), far_by_group=shares)
        logger.log(logging.WARNING if found.is_notable else logging.INFO, "map: %s", found)
        return found

    def _far(self, distances: np.ndarray) -> float:
        finite = distances[np.isfinite(distances)]
        return float((finite > self.limit).mean()) if len(finite) else 0.0

    def place(self, here: str) -> str:
        """Return the run directory: by the path from `here`, the directory of the mapped cells, or else its address."""
        beside = None if self.path is None else os.path.normpath(f"{here}/{self.path}")
        return beside if beside and Path(beside).is_dir() else self.url

    def found(self, results: Storage, opened: Callable[[str, str], Opened]) -> Opened:
        """Open the results of the run.

        Parameters
        ----------
        results
            Results of the mapped cells.
        opened
            Function that opens results, given a run directory and a matching space.

        Raises
        ------
        StoreError
            The results are not there.
        """
        try:
            return opened(self.place(results.url.rpartition("/")[0]), self.space)
        except StoreError as error:
            msg = f"{results.url} is of cells mapped onto {self.url}, which is needed and cannot be opened: {error}"
            raise StoreError(msg) from error


def warn_of(mapped: Onto | None, what: str) -> None:
    """Warn that a result on mapped cells cannot be trusted, if many of them differ from those of the run."""
    if mapped is not None and mapped.is_notable:
        logger.warning("%s: %s", what, mapped)
