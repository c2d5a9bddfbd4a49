"""Compute layers on demand: effects of any condition on any cell, for any gene of the input (METHOD sections 6, 8).

Input: a question (which averages, and how to combine them), the matches of a finished run, and expression of the run or
of the input cohort. Output: float32 values of cells and genes, equal to a stored layer bit by bit. Memory beyond the
answer is bounded: expression is held for a limited number of genes at a time, and cells are processed in parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.effects.averages import (
    Average,
    Term,
    average_over,
    average_through,
    layer_terms,
    layer_values,
    segments,
)
from ndreamer_dist.effects.expression import HELD_VALUES, Expression
from ndreamer_dist.errors import StoreError
from ndreamer_dist.matching.between import SearchBetween
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.results.read import read_dense, read_element, read_sparse
from ndreamer_dist.settings import DenoiseSettings, MatchSettings
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.files import ConsolidatedStorage, Storage

SUM_VALUES = 2**22
"""Largest number of averages (cells x genes) that are computed at a time."""
PART_ENTRIES = 2**20
"""Largest number of matches (cells x groups x neighbours) that are held at a time."""
BATCH_ENTRIES = 2**22
"""Stored values of the expression that are read at a time, before genes are selected."""

GroupPairs = Iterable[tuple[int, int]]
FoundMatches = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Question:
    """A value to compute for every cell and gene.

    Attributes
    ----------
    terms
        Averages over matched cells that the value is made from.
    answer
        Computes the values (cells, genes) float32 from the cells' own expression and the averages of the terms.
    expression
        Whether `answer` uses the cells' own expression.
    """

    terms: tuple[Term, ...]
    answer: Callable[[sparse.csr_matrix, Sequence[np.ndarray]], np.ndarray]
    expression: bool = False


def layer_question(name: str, keep_bits: int | None = None) -> Question:
    """Return the question whose answer is a layer.

    Parameters
    ----------
    keep_bits
        Bits of the mantissa that the values keep; `None` for all.
    """

    def answer(values: sparse.csr_matrix, sums: Sequence[np.ndarray]) -> np.ndarray:
        return layer_values(name, values.toarray(), sums[0], sums[1] if len(sums) > 1 else None, keep_bits)

    return Question(layer_terms(name), answer, expression=name == keys.LAYER_BATCH_EFFECT)


def effect_question(condition: int, baseline: int) -> Question:
    """Return the question for the effect of one condition against another on any cell."""
    return Question((Term(condition), Term(baseline)), lambda _, sums: (sums[0] - sums[1]).astype(np.float32))


def counterfactual_question(condition: int) -> Question:
    """Return the question for the expected expression of any cell under a condition."""
    return Question((Term(condition),), lambda _, sums: sums[0].astype(np.float32))


@dataclass(frozen=True)
class StoredExpression:
    """The expression `X` of a results.zarr; implements `Expression`.

    Attributes
    ----------
    pointers
        `indptr` of `X`, (cells + 1,).
    genes
        Number of genes of `X`.
    """

    storage: Storage
    pointers: np.ndarray
    genes: int

    @property
    def density(self) -> float:
        """See `Expression.density`."""
        return float(self.pointers[-1]) / max(1, (len(self.pointers) - 1) * self.genes)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `Expression.read`."""
        every = np.array_equal(columns, np.arange(self.genes))
        parts = []
        for batch in read_batches(rows, np.diff(self.pointers)[rows]):
            found = read_sparse(self.storage, batch, self.pointers, self.genes)
            parts.append(found if every else found[:, columns])
        return sparse.vstack(parts, format="csr")


def read_batches(rows: np.ndarray, stored: np.ndarray) -> Iterator[np.ndarray]:
    """Yield rows in batches of a bounded number of stored values.

    Parameters
    ----------
    stored
        (rows,) number of stored values of every row.
    """
    number = np.cumsum(stored) // BATCH_ENTRIES
    yield from np.split(rows, np.flatnonzero(np.diff(number)) + 1)


@dataclass(frozen=True)
class Counterparts:
    """The matches of a finished run, read from results.zarr or from the matches.zarr beside it.

    Attributes
    ----------
    storage
        The results.zarr.
    neighbours, denoise_neighbours
        Number of a cell's matches in a group that are averaged, for effects and for `denoised`.
    bandwidth
        Bandwidth of the kernel that weights several neighbours (`match.bandwidth`).
    hubs
        Correction of the distances for hubs (`match.hubs`).
    within, within_cells
        Column of the labels inside which cells are matched, if any, and how many cells of a label are enough
        (`match.within` and `match.within_cells`).
    search
        Searches matches that are not stored when they are needed; without it, missing matches raise an error.
    stored
        For cells that are mapped onto a finished run: the matches of that run, whose rows precede theirs.
    """

    storage: Storage
    design: Design
    neighbours: int
    bandwidth: float
    denoise_neighbours: int = 1
    hubs: str = "none"
    within: str | None = None
    within_cells: int = 1
    search: SearchBetween | None = None
    stored: Counterparts | None = None

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Codes of the labels inside which cells are matched, (cells,) in packed order, -1 for none; or `None`."""
        if self.within is None:
            return None
        labels = pd.Categorical(read_element(self.storage, f"obs/{keys.OBS_MATCH_LABEL}"))
        own = np.asarray(labels.codes, dtype=np.int32)
        before = None if self.stored is None else self.stored.labels
        return own if before is None else np.concatenate([before, own])

    def dense(self, name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Read packed rows (ascending) of an array: (rows, columns), also of the run that cells are mapped onto."""
        cut = int(np.searchsorted(rows, self.design.first_row))
        own = rows[cut:] - self.design.first_row
        if self.stored is None or not cut:
            return read_dense(self.storage, name, own, columns)
        before = self.stored.dense(name, rows[:cut], columns)
        return np.concatenate([before, read_dense(self.storage, name, own, columns)]) if len(own) else before

    def holds(self, query: int, target: int) -> bool:
        """Return whether a matches.zarr holds the matches of a query group in a target group."""
        if query < self.design.onto:
            return self.stored is not None and target < self.design.onto and self.stored.holds(query, target)
        return self.searched is not None and self.searched.holds(query, target)

    def keeps(self, query: int, target: int) -> bool:
        """Return whether the matches of a query group in a target group are stored: needed by effects, or added."""
        groups, stored = self.design.groups, self.design.stored_for(query)
        if query < self.design.onto:
            return self.stored is not None and target < self.design.onto and self.stored.keeps(query, target)
        needed = groups[target].condition in (0, groups[query].condition)
        return (needed and (target < stored or target == query)) or self.holds(query, target)

    def between(self, embedding: str) -> SearchBetween:
        """Return a search between any groups of cells by their coordinates in `obsm[embedding]`."""
        name = f"obsm/{embedding}"
        columns = np.arange(open_array(self.storage, name).shape[1])

        def points(rows: np.ndarray) -> np.ndarray:
            return self.dense(name, rows, columns)

        return SearchBetween(points, self.labels, self.within_cells, self.hubs == "csls")

    def averages(self, rows: np.ndarray, terms: Sequence[Term]) -> list[Average]:
        """Return, for every term, the matched cells and weights that it averages for some packed rows (ascending).

        Raises
        ------
        StoreError
            Matches of an edge are missing; the message says how to add them.
        """
        pairs = {pair for term in terms for pair in self._pairs(rows, term)}
        most = max((self._counted(term) for term in terms), default=1)
        edges = self.edges(rows, pairs, distances=most > 1, neighbours=most)
        return [average_over(self.design, edges, rows, term, self.bandwidth, self._counted(term)) for term in terms]

    def _counted(self, term: Term) -> int:
        """Return the number of neighbours that a term averages in a group."""
        return self.denoise_neighbours if term.denoised else self.neighbours

    def edges(
        self, rows: np.ndarray, pairs: GroupPairs, *, distances: bool = True, neighbours: int | None = None
    ) -> FoundMatches:
        """Return the matches of some packed rows (ascending) along edges.

        Parameters
        ----------
        pairs
            Edges, each a query group and a target group.
        distances
            Whether to read the distances; otherwise they may be 0.
        neighbours
            Number of neighbours that is needed at least; by default as many as effects average.

        Returns
        -------
        For every edge of a group that holds some of the rows: rows and distances of the matches, both (rows of the
        query group, k).
        """
        parts = {group.code: (group, here) for group, here in segments(self.design, rows)}
        wanted = sorted(pair for pair in pairs if pair[0] in parts)
        found: FoundMatches = {}
        if self.stored is not None:
            cut, onto = int(np.searchsorted(rows, self.design.first_row)), self.design.onto
            before = [pair for pair in wanted if max(pair) < onto and (not self.search or self.stored.keeps(*pair))]
            found = self.stored.edges(rows[:cut], before, distances=distances, neighbours=neighbours) if before else {}
            wanted = [pair for pair in wanted if pair not in found]
        if (neighbours or self.neighbours) == 1 and self.nearest_stored:
            own = [pair for pair in wanted if pair[0] >= self.design.onto]
            found |= self._nearest(rows, own, {code: here for code, (_, here) in parts.items()}, distances)
        for query, target in wanted:
            if (query, target) not in found:
                group, here = parts[query]
                found[query, target] = self._searched(group, self.design.groups[target], rows[here])
        return self._inside(found)

    def _inside(self, found: FoundMatches) -> FoundMatches:
        """Return matches; raise `StoreError` if they name rows that do not exist, since their file may be damaged."""
        for (query, target), (near, _) in found.items():
            if near.size and not -1 <= near.min() <= near.max() < self.design.n_cells:
                msg = f"{self.storage.url}: the matches of group {query} in group {target} are damaged: no such cells"
                raise StoreError(msg)
        return found

    def of_cell(self, row: int) -> FoundMatches:
        """Return the matches of one packed row along all edges that were searched."""
        (group, _), *_ = segments(self.design, np.array([row]))
        pairs = [(group.code, target.code) for target in self.design.groups]
        if self.neighbours == 1 and self.nearest_stored:
            found = self._nearest(np.array([row]), pairs, {group.code: slice(0, 1)}, True)
        else:
            found = {}
            self._matches(group, group)  # raises if there is no matches.zarr
        if self.searched is not None:
            there = [pair for pair in pairs if pair not in found and self.searched.holds(*pair)]
            found |= {pair: self._searched(group, self.design.groups[pair[1]], np.array([row])) for pair in there}
        return dict(sorted(found.items()))

    @cached_property
    def nearest_stored(self) -> bool:
        """Whether results.zarr holds the nearest neighbours."""
        return ConsolidatedStorage(self.storage.url).node(f"obsm/{keys.OBSM_MATCH}") is not None

    @cached_property
    def searched(self) -> Matches | None:
        """The matches.zarr beside results.zarr; `None` if there is none."""
        folder = self.storage.url.rpartition("/")[0]
        store = Storage(f"{folder}/{keys.MATCHES}")
        there = store.exists(f"{keys.block_name(self.design.onto)}/{keys.MATCH_ROW}/zarr.json")
        return Matches(store) if there else None

    @cached_property
    def _checked(self) -> dict[tuple[int, int], Matches]:
        """The matches.zarr of every edge that was found and checked."""
        return {}

    def _pairs(self, rows: np.ndarray, term: Term) -> Iterator[tuple[int, int]]:
        """Yield the edges that a term needs for some packed rows; a group needs none to itself."""
        for group, _ in segments(self.design, rows):
            if group.condition == term.without:
                continue
            condition = group.condition if term.condition is None else term.condition
            targets = self.design.counted(condition, group)
            yield from ((group.code, target.code) for target in targets if target.code != group.code)

    def _nearest(
        self, rows: np.ndarray, pairs: Sequence[tuple[int, int]], parts: Mapping[int, slice], distances: bool
    ) -> FoundMatches:
        """Return the nearest neighbours in results.zarr along edges; edges that it does not hold are left out.

        Parameters
        ----------
        parts
            Slice of `rows` of every query group.
        """
        if not pairs:
            return {}
        columns = np.unique([target for _, target in pairs])
        first = int(np.searchsorted(rows, self.design.first_row))  # earlier rows are in the store of another run
        own = rows[first:] - self.design.first_row
        near = np.full((len(rows), len(columns)), -1, dtype=np.int64)
        near[first:] = read_dense(self.storage, f"obsm/{keys.OBSM_MATCH}", own, columns)
        far = np.zeros(near.shape, dtype=np.float32)
        if distances:
            far[first:] = read_dense(self.storage, f"obsm/{keys.OBSM_MATCH_DISTANCE}", own, columns)
        found = {}
        for query, target in pairs:
            here, column = parts[query], np.searchsorted(columns, target)
            group, other = (self.design.groups[code] for code in (query, target))
            taking = self.design.taking(group, other, rows[here] - group.start)
            if (near[here, column][taking] >= 0).all():
                found[query, target] = near[here, column, None], far[here, column, None]
        return found

    def _searched(self, query: Group, target: Group, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the matches of rows of a query group along one edge, from matches.zarr or from a search now."""
        pair = (query.code, target.code)
        if self.search is not None and not self.holds(*pair):
            found, distances = self._search_now(query, target)
            return found[rows - query.start], distances[rows - query.start]
        if pair not in self._checked:
            self._checked[pair] = self._matches(query, target)
            self._check_same(self._checked[pair], query, int(rows.min()))
        matches = self._checked[pair]
        local = rows - query.start
        first, last = int(local.min()), int(local.max()) + 1
        found, distances = matches.edge(query.code, target.code, first, last)
        return found[local - first], distances[local - first]

    @cached_property
    def _search_cache(self) -> FoundMatches:
        """Cache of `_search_now`: the edges of one query group."""
        return {}

    def _search_now(self, query: Group, target: Group) -> tuple[np.ndarray, np.ndarray]:
        """Search an edge for the whole query group; the edges of the last query group are cached."""
        pair = (query.code, target.code)
        if any(other != query.code for other, _ in self._search_cache):
            self._search_cache.clear()
        if pair not in self._search_cache and self.search is not None:
            k = max(self.neighbours, self.denoise_neighbours)
            self._search_cache[pair] = self.search.edge(self.design, query, target, k)
        return self._search_cache[pair]

    def _matches(self, query: Group, target: Group) -> Matches:
        """Return the matches.zarr; raise `StoreError` if it does not exist or does not hold the edge."""
        edge = f"the matches of group {query.name!r} in group {target.name!r}"
        if self.searched is None:
            msg = f"{edge} are not in {self.storage.url}, nor is a {keys.MATCHES} beside it; open the run directory"
            raise StoreError(msg)
        if not self.searched.holds(query.code, target.code):
            folder = self.storage.url.rpartition("/")[0]
            name = self.design.conditions[target.condition]
            msg = f"{edge} have not been searched; `ndreamer-dist match {folder} --edges {name!r}` adds them (or all)"
            raise StoreError(msg)
        return self.searched

    def _check_same(self, matches: Matches, query: Group, row: int) -> None:
        """Raise `StoreError` if matches.zarr is of other results: then a cell's neighbour in its own group differs."""
        if not self.nearest_stored or query.cells == 1:
            return
        place = np.array([row - self.design.first_row]), np.array([query.code])
        stored = int(read_dense(self.storage, f"obsm/{keys.OBSM_MATCH}", *place)[0, 0])
        found = int(matches.edge(query.code, query.code, row - query.start, row - query.start + 1)[0][0, 0])
        if stored not in (-1, found):
            msg = (
                f"{matches.storage.url} does not belong to {self.storage.url}: finish the run, or open its own results"
            )
            raise StoreError(msg)


def counterparts_of(
    storage: Storage, design: Design, settings: Mapping[str, Any], stored: Counterparts | None
) -> Counterparts:
    """Return the matches of results.

    Parameters
    ----------
    settings
        Settings of the run, as the results hold them.
    stored
        For cells that are mapped onto a finished run: the matches of that run.

    Raises
    ------
    StoreError
        The settings are damaged.
    """
    try:
        values = settings["match"]  # results of an earlier version have neither denoise.neighbours nor match.hubs
        match = MatchSettings(**{name: values[name] for name in MatchSettings.model_fields if name in values})
        denoise = DenoiseSettings(**settings.get("denoise", {"neighbours": values["neighbours"]}))
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{storage.url}: the settings of the matches are damaged ({type(error).__name__})"
        raise StoreError(msg) from error
    return Counterparts(
        storage, design, match.neighbours, match.bandwidth, denoise.counted(design.fewest_groups), match.hubs, match.within,
        match.within_cells, stored=stored,
    )  # fmt: skip


def compute(
    question: Question,
    counterparts: Counterparts,
    expression: Expression,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Answer a question for some cells and genes.

    Parameters
    ----------
    rows
        Packed rows of the cells, in any order.
    columns
        Columns of the genes in the expression.
    out
        Array (rows, columns) float32 for the answer, for example a `numpy.memmap`; by default a new one.

    Returns
    -------
    (rows, columns) float32; NaN for a cell without an answer.

    Raises
    ------
    StoreError
        Matches of an edge are missing, or a chunk is missing or damaged.
    """
    order = np.argsort(rows, kind="stable")
    ordered, values = rows[order], np.empty((len(rows), len(columns)), dtype=np.float32) if out is None else out
    most = max(counterparts.neighbours, counterparts.denoise_neighbours)
    groups = sum(
        len(counterparts.design.with_condition(code)) for code in _conditions_of(counterparts.design, question)
    )
    step = _part_rows(len(columns), groups * most)
    parts = [slice(start, start + step) for start in range(0, len(rows), step)]

    @functools.lru_cache(maxsize=1)  # usually there is one part, whose matches are then read once
    def averages(number: int) -> list[Average]:
        return counterparts.averages(ordered[parts[number]], question.terms)

    wanted = np.zeros(counterparts.design.n_cells, dtype=bool)
    wanted[ordered] = question.expression
    for number in range(len(parts)):
        for average in averages(number):
            wanted[average.row] = True
    held_rows = np.flatnonzero(wanted)
    for span in _gene_spans(len(columns), len(held_rows), expression.density):
        held = expression.read(held_rows, columns[span])
        for number, part in enumerate(parts):
            sums = average_through(averages(number), [(held_rows, held)], held.shape[1])
            own = held[np.searchsorted(held_rows, ordered[part])] if question.expression else held[:0]
            values[order[part], span] = question.answer(own, sums)
    return values


def _conditions_of(design: Design, question: Question) -> list[int]:
    """Return the condition of every term of a question; for a cell's own condition, the one with most groups."""
    largest = max(range(len(design.conditions)), key=lambda code: len(design.with_condition(code)))
    return [largest if term.condition is None else term.condition for term in question.terms]


def _part_rows(genes: int, counterparts: int) -> int:
    """Return the number of cells of a part, given the numbers of genes and of counterparts per cell."""
    return max(1, min(SUM_VALUES // max(genes, 1), PART_ENTRIES // max(counterparts, 1)))


def _gene_spans(genes: int, rows: int, density: float) -> list[slice]:
    """Return spans of genes whose expression in so many rows can be held in memory.

    Genes that users select are often expressed above average, hence the factor 4.
    """
    step = max(1, int(HELD_VALUES // max(1.0, rows * min(1.0, 4 * density))))
    return [slice(start, min(start + step, genes)) for start in range(0, genes, step)]
