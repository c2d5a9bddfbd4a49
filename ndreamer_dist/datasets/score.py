"""Score how well a run recovers the truth of a simulated cohort.

Input: the truth of `datasets.simulate`, a function that reads rows of the run's layers, and the cell type, condition
and donor of each cell. Output, per cell type and condition: the agreement of the mean treatment effects with the true
ones, and the variance between donors that remains in the denoised expression. One pass over chunks of rows keeps only
sums per (cell type, condition, donor) and gene.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ndreamer_dist import keys
from ndreamer_dist.datasets import Truth
from ndreamer_dist.datasets.local_score import LocalScore
from ndreamer_dist.errors import QueryError

THRESHOLD: Final = 0.25
"""Size of a mean effect, in log-normalised units, above which a gene without a true effect counts as false."""

SCORED: Final = ("X", keys.LAYER_DENOISED, keys.LAYER_ITE)
"""Layers that are read."""

Read = Callable[[str, int, int], NDArray[Any]]
"""`read(layer, start, stop)` returns (rows, genes) of `X` (log-normalised expression), `denoised` or `ite`."""


@dataclass(frozen=True)
class EffectScore:
    """Agreement of estimated and true mean ITE of one condition in one cell type, over the scored genes."""

    cell_type: str
    condition: str
    cells: int
    affected: int  # genes with a true effect
    correlation: float  # Pearson, over all scored genes; NaN if no gene has an effect
    slope: float  # of the estimate on the truth, below 1 if effects are too small; NaN if no gene has an effect
    false_genes: int  # genes without a true effect whose |mean ITE| exceeds the threshold
    false_share: float  # `false_genes` as a share of the genes without a true effect
    largest_false: float  # largest |mean ITE| of a gene without a true effect
    by_chance: float  # expected number of false genes from the sampling noise of the cells alone


@dataclass(frozen=True)
class BatchScore:
    """Variance between donors in one cell type and condition, averaged over genes."""

    cell_type: str
    condition: str
    donors: int
    before: float  # variance of the donors' means of the log-normalised expression, less their sampling variance
    after: float  # the same of the denoised expression
    before_plain: float  # variance of the donors' means of the log-normalised expression
    after_plain: float  # the same of the denoised expression


@dataclass(frozen=True)
class Recovery:
    """Scores of a run on a simulated cohort; `table()` returns them as text."""

    effects: tuple[EffectScore, ...]
    batches: tuple[BatchScore, ...]
    genes: int  # number of scored genes
    threshold: float  # mean effect above which a gene without a true effect counts as false
    local: tuple[LocalScore, ...] = ()  # scores of single cells' effects, if true effects depend on the state

    @property
    def correlation(self) -> float:
        """Mean correlation over the cell types and conditions with an effect; NaN if there is none."""
        return _mean([e.correlation for e in self.effects if e.affected])

    @property
    def false_genes(self) -> int:
        """Total number of false genes in cell types that do not respond."""
        return sum(e.false_genes for e in self.effects if not e.affected)

    @property
    def false_by_chance(self) -> float:
        """Expected number of these false genes from sampling noise alone, a lower bound."""
        return sum(e.by_chance for e in self.effects if not e.affected)

    @property
    def batch_variance_removed(self) -> float:
        """Share of the variance between donors that was removed: 1 all, negative if it grew, NaN without donors."""
        before = sum(b.before for b in self.batches)
        return 1 - sum(b.after for b in self.batches) / before if before > 0 else float("nan")

    def table(self) -> str:
        """Return the scores as text."""
        effect_head = f"{'cell type':<14}{'condition':<12}{'cells':>8}{'affected':>10}{'r':>8}{'slope':>8}"
        batch_head = f"{'cell type':<14}{'condition':<12}{'donors':>8}{'before':>10}{'after':>10}{'removed':>10}"
        lines = [
            f"Mean treatment effects over {self.genes} genes, estimated against true",
            "",
            f"{effect_head}{'false':>8}{'largest':>9}",
            *(_effect_line(e) for e in self.effects),
            "",
            f"false: genes without a true effect whose mean effect exceeds {self.threshold} (log-normalised units);",
            "largest: the largest mean effect of such a gene. Cell types with 0 affected genes do not respond.",
            "",
            "Variance between donors, within cell type and condition (mean over genes, x 1000)",
            "",
            batch_head,
            *(_batch_line(b) for b in self.batches),
            "",
            "The sampling variance of the donors' means is subtracted, as if cells were independent. Denoised cells",
            "share matches, so their sampling variance is larger, and the column 'after' is an upper bound.",
            "",
            f"Mean correlation {self.correlation:.3f};",
            f"{self.false_genes} genes called in cell types without effect{_chance(self.false_by_chance)};",
            f"{self.batch_variance_removed:.0%} of the variance between donors removed.",
            *_local_lines(self.local),
        ]
        return "\n".join(lines)


def recovery(
    truth: Truth,
    read: Read,
    *,
    cell_type: ArrayLike,
    condition: ArrayLike,
    donor: ArrayLike,
    genes: Sequence[str],
    chunk_rows: int = 4096,
    threshold: float = THRESHOLD,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Score the layers of a run against the truth in one pass.

    Parameters
    ----------
    truth
        Truth of the simulated cohort.
    read
        `read(layer, start, stop)` returns a range of rows of `X`, `denoised` or `ite`, (rows, genes). The `ite` of
        control cells is ignored.
    cell_type, condition, donor
        (rows,) names for the rows of `read`. Cells may be in any order, and some may be missing.
    genes
        Names of the columns of `read`.
    chunk_rows
        Rows of one read.
    threshold
        Mean effect above which a gene without a true effect counts as false.
    progress
        Called after each chunk with the rows read and the total number of rows.

    Raises
    ------
    QueryError
        A name is not in the cohort, or shapes differ.
    """
    sums = _Sums(truth, cell_type, condition, donor, len(genes))
    truth.mean_ite(truth.cell_types[0], truth.conditions[0], genes)  # refuses unknown genes before the long pass
    for start in range(0, sums.rows, chunk_rows):
        stop = min(start + chunk_rows, sums.rows)
        sums.add(start, stop, {layer: read(layer, start, stop) for layer in SCORED})
        if progress is not None:
            progress(stop, sums.rows)
    means, cells = sums.mean_effects()
    effects = score_effects(truth, means, genes=genes, cells=cells, threshold=threshold, errors=sums.standard_errors())
    return Recovery(effects, sums.batch_scores(), len(genes), threshold)


def score_effects(
    truth: Truth,
    means: Mapping[tuple[str, str], NDArray[Any]],
    *,
    genes: Sequence[str],
    cells: Mapping[tuple[str, str], int] | None = None,
    threshold: float = THRESHOLD,
    errors: Mapping[tuple[str, str], NDArray[Any]] | None = None,
) -> tuple[EffectScore, ...]:
    """Score mean effects against the truth.

    Parameters
    ----------
    truth
        Truth of the simulated cohort.
    means
        By (cell type, condition): mean effects, (genes,).
    genes
        Names of the genes.
    cells
        By (cell type, condition): number of cells, for the table; None for 0.
    threshold
        Mean effect above which a gene without a true effect counts as false.
    errors
        By (cell type, condition): lower bounds of the standard errors of the means, (genes,), from which `by_chance` is
        computed; None for 0.
    """
    scores = []
    for (kind, condition), estimate in means.items():
        true = truth.mean_ite(kind, condition, genes).astype(np.float64)
        affected = true != 0
        null = np.abs(np.asarray(estimate, dtype=np.float64)[~affected])
        false = int((null > threshold).sum())
        error = (errors or {}).get((kind, condition), np.zeros(len(true)))[~affected]
        correlation, slope = _agreement(true, np.asarray(estimate, dtype=np.float64))
        scores.append(
            EffectScore(
                cell_type=kind, condition=condition, cells=(cells or {}).get((kind, condition), 0),
                affected=int(affected.sum()), correlation=correlation, slope=slope, false_genes=false,
                false_share=false / max(1, len(null)), largest_false=float(null.max(initial=0.0)),
                by_chance=float(2 * special.ndtr(-threshold / np.maximum(error, 1e-9)).sum()),
            )
        )  # fmt: skip
    return tuple(scores)


@dataclass
class _Moments:
    """Sums and sums of squares of one layer, per kind and gene; a kind is a (cell type, condition, donor)."""

    total: NDArray[np.float64]  # (kinds, genes)
    squares: NDArray[np.float64]  # (kinds, genes)

    def add(self, values: NDArray[Any], kind: NDArray[Any]) -> None:
        for k in np.unique(kind):
            rows = values[kind == k].astype(np.float64)
            self.total[k] += rows.sum(0)
            self.squares[k] += (rows * rows).sum(0)


@dataclass
class _Sums:
    """Sums over the cells of each kind, the observed combinations of cell type, condition and donor."""

    truth: Truth
    cell_type: ArrayLike
    condition: ArrayLike
    donor: ArrayLike
    genes: int
    layers: dict[str, _Moments] = field(init=False)

    def __post_init__(self) -> None:
        columns = [np.asarray(c) for c in (self.cell_type, self.condition, self.donor)]
        self.rows = len(columns[0])
        if len({len(column) for column in columns}) > 1:
            msg = f"cell_type, condition and donor have {', '.join(str(len(c)) for c in columns)} rows; they must agree"
            raise QueryError(msg)
        known = (self.truth.cell_types, self.truth.conditions, self.truth.donors)
        coded = np.stack([_codes(c, k) for c, k in zip(columns, known, strict=True)])
        self.kinds, self.kind = np.unique(coded, axis=1, return_inverse=True)  # (3, kinds), (rows,)
        self.kind = self.kind.ravel()
        self.count = np.bincount(self.kind, minlength=self.kinds.shape[1])
        shape = (self.kinds.shape[1], self.genes)
        self.layers = {name: _Moments(np.zeros(shape), np.zeros(shape)) for name in SCORED}

    def add(self, start: int, stop: int, layers: Mapping[str, NDArray[Any]]) -> None:
        kind = self.kind[start:stop]
        for name, values in layers.items():
            if values.shape != (stop - start, self.genes):
                expected = (stop - start, self.genes)
                msg = f"layer '{name}' gave {values.shape} for rows {start} to {stop}, expected {expected}"
                raise QueryError(msg)
            treated = self.kinds[1, kind] > 0
            use = treated if name == keys.LAYER_ITE else np.ones(len(kind), bool)
            self.layers[name].add(values[use], kind[use])

    def groups(self) -> list[tuple[int, int, NDArray[Any]]]:
        """Return cell type, condition and the kinds of each observed pair of cell type and condition."""
        pairs = np.unique(self.kinds[:2], axis=1).T
        return [(int(t), int(c), np.flatnonzero((self.kinds[0] == t) & (self.kinds[1] == c))) for t, c in pairs]

    def mean_effects(self) -> tuple[dict[tuple[str, str], NDArray[Any]], dict[tuple[str, str], int]]:
        """Return mean effects, (genes,), and numbers of cells by (cell type, condition)."""
        means, cells = {}, {}
        for kind, condition, rows in self.groups():
            if condition > 0:
                name = (self.truth.cell_types[kind], self.truth.conditions[condition])
                cells[name] = int(self.count[rows].sum())
                means[name] = self.layers[keys.LAYER_ITE].total[rows].sum(0) / cells[name]
        return means, cells

    def standard_errors(self) -> dict[tuple[str, str], NDArray[Any]]:
        """Return lower bounds of the standard errors of the mean effects, (genes,), by (cell type, condition).

        They are the standard errors of the difference of the plain means under condition and control. Matches use some
        control cells more often than others, so a mean ITE has at least this error.
        """
        squared = {(kind, condition): self._squared_error(rows) for kind, condition, rows in self.groups()}
        return {
            (self.truth.cell_types[kind], self.truth.conditions[condition]): np.sqrt(error + squared[kind, 0])
            for (kind, condition), error in squared.items()
            if condition > 0 and (kind, 0) in squared
        }

    def _squared_error(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Return the squared standard error of the mean over some kinds, from the variance inside donors: (genes,)."""
        n, layer = self.count[rows], self.layers["X"]
        within = np.maximum(layer.squares[rows] - layer.total[rows] ** 2 / n[:, None], 0).sum(0)
        return within / max(1, n.sum() - len(rows)) / n.sum()

    def batch_scores(self) -> tuple[BatchScore, ...]:
        """Return the variances between donors, for cell types and conditions with at least two donors of two cells."""
        scores = []
        for kind, condition, rows in self.groups():
            rows = rows[self.count[rows] > 1]  # a donor with one cell has no sampling variance
            if len(rows) > 1:
                parts = [
                    _between(self.count[rows], layer.total[rows], layer.squares[rows])
                    for layer in (self.layers["X"], self.layers[keys.LAYER_DENOISED])
                ]
                (before, before_plain), (after, after_plain) = parts
                names = (self.truth.cell_types[kind], self.truth.conditions[condition])
                scores.append(BatchScore(*names, len(rows), before, after, before_plain, after_plain))
        return tuple(scores)


def _codes(names: NDArray[Any], known: Sequence[str]) -> NDArray[np.intp]:
    unique, inverse = np.unique(names.astype(str), return_inverse=True)
    unknown = [name for name in unique if name not in known]
    if unknown:
        msg = f"{str(unknown[0])!r} is no name of the simulated cohort; expected one of {', '.join(known)}"
        raise QueryError(msg)
    return np.array([known.index(name) for name in unique], dtype=np.intp)[inverse]


def _between(count: NDArray[Any], total: NDArray[Any], squares: NDArray[Any]) -> tuple[float, float]:
    """Return the mean over genes of the variance of the donors' means, less and including their sampling variance."""
    n = count[:, None].astype(np.float64)
    mean = total / n
    within = np.maximum(squares - n * mean * mean, 0) / (n - 1)
    plain = mean.var(axis=0, ddof=1)
    return float((plain - (within / n).mean(0)).mean()), float(plain.mean())


def _agreement(true: NDArray[Any], estimate: NDArray[Any]) -> tuple[float, float]:
    """Return correlation and slope of the estimate on the truth; NaN for a constant truth, 0 for a constant estimate."""
    t, e = true - true.mean(), estimate - estimate.mean()
    if not t.any():
        return float("nan"), float("nan")
    norm = float(np.sqrt((t @ t) * (e @ e)))
    return (float(t @ e) / norm if norm > 0 else 0.0), float(t @ e) / float(t @ t)


def _chance(expected: float) -> str:
    """Return the expected number of false genes as text; empty below 1."""
    return f" ({expected:.0f} or more by chance: the cells are few)" if expected >= 1 else ""


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _effect_line(e: EffectScore) -> str:
    agreement = f"{e.correlation:>8.3f}{e.slope:>8.2f}" if e.affected else f"{'-':>8}{'-':>8}"
    return (
        f"{e.cell_type:<14}{e.condition:<12}{e.cells:>8}{e.affected:>10}{agreement}"
        f"{e.false_genes:>8}{e.largest_false:>9.3f}"
    )


def _local_lines(scores: Sequence[LocalScore]) -> list[str]:
    """Return the scores of single cells' effects as lines of text; empty without scores."""
    if not scores:
        return []
    return [
        "",
        "Effects of single cells, which depend on their state here, smoothed over neighbours, against the true ones",
        "",
        f"{'cell type':<14}{'condition':<12}{'cells':>8}{'affected':>10}{'local r':>9}",
        *(f"{s.cell_type:<14}{s.condition:<12}{s.cells:>8}{s.genes:>10}{s.correlation:>9.3f}" for s in scores),
        "",
        f"Mean local correlation {_mean([s.correlation for s in scores]):.3f} (about 0 where a cell's match is any of its type).",
    ]


def _batch_line(b: BatchScore) -> str:
    removed = f"{1 - b.after / b.before:>10.0%}" if b.before > 0 else f"{'-':>10}"
    return f"{b.cell_type:<14}{b.condition:<12}{b.donors:>8}{b.before * 1000:>10.2f}{round(b.after * 1000, 2) + 0.0:>10.2f}{removed}"
