"""What a directory of mapped cells tells of the run that they are mapped onto."""

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
"""Share of far cells from which a cohort does not belong to the run."""
NOTABLE = 0.1
"""Share of far cells that is worth a warning."""
Opened = TypeVar("Opened", bound=Storage)


@dataclass(frozen=True)
class Onto:
    """A finished run, and how far the cells that were mapped onto it are from its own.

    Attributes
    ----------
    url, path
        Address of the run's directory, and the path to it from the directory of the mapped cells, where both are local.
    space
        The matching space.
    key
        Key of its results, by which they are known again.
    near
        Distance within which a cell has a near control match, as in the run: what `obs["ndreamer_overlap"]` goes by.
    limit
        The 99th percentile of the run's cells' own distances to the control.
    far
        Share of the mapped cells beyond the limit; about 0.01 where they are like the run's.
    unlike
        Share of the mapped cells whose expression is less like that of their control matches than that of 99 % of the run's own
        cells is; about 0.01 where they are like the run's.
    far_by_group, unlike_by_group
        The same of every group.
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
            f"of the mapped cells {self.far:.1%} are farther from the run's controls than 99 % of the run's own cells, and "
            f"{self.unlike:.1%} are less like their control matches"
        )
        if not self.belongs:
            return f"these cells do not belong to the run, and their effects mean nothing: {line}"
        return f"{line}; the effects of those are not to be trusted" if self.is_notable else line

    @property
    def is_notable(self) -> bool:
        """Whether so many cells are unlike those of the run that users should be warned."""
        return max(self.far, self.unlike) >= NOTABLE

    @property
    def belongs(self) -> bool:
        """Whether the cells are like those of the run; their effects mean nothing where they are not."""
        return max(self.far, self.unlike) < FOREIGN

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def read(cls, text: str, where: str) -> Onto | None:
        """Read what `to_json` gave, none of `null`; `StoreError` where it was anything else: it comes from a file."""
        try:
            told = json.loads(text)
            return None if told is None else cls(**told)
        except (TypeError, ValueError, RecursionError) as error:
            msg = f"{where}: what it tells of the run that it is mapped onto is damaged ({type(error).__name__})"
            raise StoreError(msg) from error

    def measured(self, design: Design, distances: np.ndarray) -> Onto:
        """Return it with how far the mapped cells are, by their distances to the control, (cells,); log it.

        Cells without a distance are not counted.
        """
        names = {group.name: slice(group.start, group.stop) for group in design.own_groups}
        first = design.first_row
        shares = {name: self._far(distances[rows.start - first : rows.stop - first]) for name, rows in names.items()}
        found = replace(self, far=self._far(distances), far_by_group=shares)
        logger.log(logging.WARNING if found.is_notable else logging.INFO, "map: %s", found)
        return found

    def _far(self, distances: np.ndarray) -> float:
        known = distances[np.isfinite(distances)]
        return float((known > self.limit).mean()) if len(known) else 0.0

    def place(self, here: str) -> str:
        """Return where the run's directory is: beside a directory of cells that were mapped onto it, or at its address."""
        beside = None if self.path is None else os.path.normpath(f"{here}/{self.path}")
        return beside if beside and Path(beside).is_dir() else self.url

    def found(self, results: Storage, opened: Callable[[str, str], Opened]) -> Opened:
        """Return the results of the run, from where it lies beside these, or from its address.

        Raises
        ------
        StoreError
            They are not there.
        """
        try:
            return opened(self.place(results.url.rpartition("/")[0]), self.space)
        except StoreError as error:
            msg = f"{results.url} is of cells mapped onto {self.url}, which is needed and cannot be opened: {error}"
            raise StoreError(msg) from error


def warn_of(mapped: Onto | None, what: str) -> None:
    """Warn that what is asked of mapped cells cannot be trusted, where many are unlike those of the run."""
    if mapped is not None and mapped.is_notable:
        logger.warning("%s: %s", what, mapped)
