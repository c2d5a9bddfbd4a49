"""Draw the parameters of a simulated cohort; define the latent variables of its cells and the names of its levels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from ndreamer_dist.datasets.expectation import DISPERSIONS, SCALE, Floats
from ndreamer_dist.errors import CohortError

Codes = NDArray[np.intp]

CELL_TYPE: Final = "cell_type"
CONDITION: Final = "condition"
DONOR: Final = "donor"
BALLAST: Final = "BALLAST"
CELL_PREFIX: Final = "cell_"
"""Prefix of cell names, followed by the position of the cell in seven digits."""

BALLAST_SHARE: Final = 0.2  # share of the ballast before batch effects
FOLD_MIN, FOLD_MAX = 0.7, 3.0  # limits of the absolute log-fold changes of effect genes
STRENGTH_MIN: Final = 0.3  # least effect of a knock-out, as a share of the whole effect of its pathway
OWN_SHARE: Final = 0.3  # genes that only this knock-out changes, relative to the genes of its pathway
STATE_LIMIT: Final = 2.0  # states are standard normal, clipped to plus or minus this
RESPONSE_STEEPNESS: Final = 2.0  # slope of the response to the state, inside Phi
STATE_QUANTILES: Final = 512  # quantiles over which a mean over the states is computed


@dataclass(frozen=True)
class StateLaw:
    """How effects depend on the cell state, and the state on the condition; by default neither does.

    Attributes
    ----------
    effects
        Share of a condition's effect, 0 to 1, that cells of the lowest states lack. A cell shows the share
        `1 - effects * Phi(-2 state)` of the effect, which rises most steeply about state 0.
    shift
        Difference of the mean state between the other conditions and the control, in standard deviations.
    """

    effects: float = 0.0
    shift: float = 0.0

    def response(self, state: Floats) -> Floats:
        """Return the share of the effect on the counts that cells of these states show, (cells,) float32."""
        return (1 - self.effects * special.ndtr(-RESPONSE_STEEPNESS * state)).astype(np.float32)

    def states(self, condition: int) -> Floats:
        """Return the states at even quantiles of a condition, to average over them: (quantiles,) float32."""
        quantiles = (np.arange(STATE_QUANTILES) + 0.5) / STATE_QUANTILES
        states = np.clip(special.ndtri(quantiles), -STATE_LIMIT, STATE_LIMIT)
        return (states + (self.shift if condition else 0)).astype(np.float32)


@dataclass(frozen=True)
class Parameters:
    """The parameters that are drawn once per cohort; each field is an array of the truth store."""

    log_share: Floats  # (types, genes) log share of a control cell in state 0; that of the ballast is not used
    state_load: Floats  # (types, genes) change per unit of state; 0 for most genes
    fold: Floats  # (conditions, types, genes) log-fold change; 0 for all but effect genes
    donor_shape: Floats  # (2, donors, genes) u1 and u2 of the batch effect, before centring
    type_shape: Floats  # (2, types, genes) w1 and w2 of the batch effect
    dispersion: NDArray[np.int8]  # (genes,) index into DISPERSIONS
    group_weight: Floats  # (donors, conditions) shares of all cells; 0 if a donor has no cells of a condition
    type_weight: Floats  # (donors, types) shares of the donor's cells
    pathway: NDArray[np.int16]  # (conditions,) code of each knock-out's pathway; -1 for other conditions


@dataclass(frozen=True)
class SimulatedCells:
    """The latent variables of some cells, (cells,) each: codes of type, condition and donor, state and library size."""

    cell_type: Codes
    condition: Codes
    donor: Codes
    state: Floats
    library: Floats

    def under(self, condition: int) -> SimulatedCells:
        """Return the same cells with another condition."""
        return SimulatedCells(
            self.cell_type, np.full_like(self.condition, condition), self.donor, self.state, self.library
        )

    def __getitem__(self, rows: Any) -> SimulatedCells:
        return SimulatedCells(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.cell_type)


@dataclass(frozen=True)
class CohortShape:
    """The sizes and the design of a simulated cohort; see `simulate`."""

    genes: int
    donors: int
    conditions: int
    cell_types: int
    nested: bool
    pathways: int = 0


def draw_parameters(rng: np.random.Generator, shape: CohortShape) -> Parameters:
    """Draw the parameters of a cohort."""
    genes, donors, conditions, cell_types = shape.genes, shape.donors, shape.conditions, shape.cell_types
    responding = responding_types(cell_types)
    raised, lowered = _effect_sets(rng, genes, 1 + responding * (2 if shape.pathways else 1))
    effect = np.unique(np.concatenate([raised, lowered], axis=None))
    log_share = _log_shares(rng, genes, cell_types, np.unique(raised), np.unique(lowered))
    quiet = np.setdiff1d(np.flatnonzero(log_share[:, :-1].max(0) < math.log(3e-3)), effect)
    state_load = np.zeros((cell_types, genes))
    moved = rng.choice(quiet, min(genes // 10, len(quiet)), replace=False)
    state_load[:, moved] = rng.normal(0, 0.5, (cell_types, len(moved)))
    folds = _pathway_folds if shape.pathways else _type_folds
    fold = folds(rng, log_share, (raised, lowered), responding, pathway := _pathways(conditions, shape.pathways))
    donor_shape = np.tanh(rng.normal(0, 1.5, (2, donors, genes))) * np.array([0.4, 0.09])[:, None, None]
    type_shape = rng.uniform([[[0.4]], [[-1.0]]], 1.0, (2, cell_types, genes))
    dispersion = rng.integers(0, len(DISPERSIONS) - 1, genes, dtype=np.int8)
    dispersion[-1] = len(DISPERSIONS) - 1
    present = np.arange(conditions) == np.arange(donors)[:, None] % conditions if shape.nested else True
    group_weight = rng.gamma(20, size=(donors, conditions)) * present
    type_weight = rng.dirichlet(30 * rng.dirichlet(np.full(cell_types, 8.0)), donors) + 0.01
    return Parameters(
        log_share=log_share.astype(np.float32),
        state_load=state_load.astype(np.float32),
        fold=fold.astype(np.float32),
        donor_shape=donor_shape.astype(np.float32),
        type_shape=type_shape.astype(np.float32),
        dispersion=dispersion,
        group_weight=(group_weight / group_weight.sum()).astype(np.float32),
        type_weight=(type_weight / type_weight.sum(1, keepdims=True)).astype(np.float32),
        pathway=pathway,
    )


def _pathways(conditions: int, pathways: int) -> NDArray[np.int16]:
    """Assign the conditions to pathways in rotation: (conditions,) codes; -1 for the control, or without pathways."""
    codes = np.full(conditions, -1, dtype=np.int16)
    if pathways:
        codes[1:] = np.arange(conditions - 1) % pathways
    return codes


def _type_folds(
    rng: np.random.Generator, log_share: NDArray[Any], sets: tuple[Codes, Codes], responding: int, pathway: NDArray[Any]
) -> Floats:
    """Draw log-fold changes of conditions that change different genes in each type: (conditions, types, genes)."""
    raised, lowered = sets
    fold = np.zeros((len(pathway), *log_share.shape), dtype=np.float32)
    for condition in range(1, len(pathway)):
        for kind in range(responding):
            own = 1 + (kind + condition - 1) % responding  # depends on type and condition; set 0 is common to all
            up, down = raised[[0, own]].ravel(), lowered[[0, own]].ravel()
            fold[condition, kind, up], fold[condition, kind, down] = _folds(rng, log_share[kind], up, down)
    return fold


def _pathway_folds(
    rng: np.random.Generator, log_share: NDArray[Any], sets: tuple[Codes, Codes], responding: int, pathway: NDArray[Any]
) -> Floats:
    """Draw log-fold changes of knock-outs: (conditions, types, genes).

    A pathway changes the same genes in all responding types. Each of its knock-outs shows a share of this effect and
    changes a few genes of its own. All genes come from one pool, so pathways overlap at random.
    """
    pools = [np.unique(pool) for pool in sets]
    size = max(1, min(10, len(pools[0]) // 4))
    whole = np.zeros((int(pathway.max()) + 1, *log_share.shape))

    def draw(into: NDArray[Any], count: int) -> None:
        """Add the changes of `count` more genes in each direction to (types, genes) log-fold changes."""
        up, down = (
            rng.choice(np.setdiff1d(pool, np.flatnonzero(into.any(axis=0))), count, replace=False) for pool in pools
        )
        for kind in range(responding):
            into[kind, up], into[kind, down] = _folds(rng, log_share[kind], up, down)

    for changes in whole:
        draw(changes, size)
    fold = np.zeros((len(pathway), *log_share.shape), dtype=np.float32)
    for condition in range(1, len(pathway)):
        changes = whole[pathway[condition]].copy()
        draw(changes, max(1, round(OWN_SHARE * size)))
        # Scale the gains and losses of shares, not the logs, so that they still cancel and spare the ballast.
        fold[condition] = np.log1p(np.expm1(changes) * rng.uniform(STRENGTH_MIN, 1))
    return fold


def responding_types(cell_types: int) -> int:
    """Return the number of cell types that respond to conditions: the first two thirds, and a single type responds."""
    return cell_types - (max(1, cell_types // 3) if cell_types > 1 else 0)


def _effect_sets(rng: np.random.Generator, genes: int, sets: int) -> tuple[Codes, Codes]:
    """Choose the genes that rise and the genes that fall: (sets, genes per set) each; set 0 is common to all types."""
    size = max(1, min(10, genes // 80))
    needed = 2 * size * sets
    if needed > (genes - 1) // 2:
        msg = f"{genes} genes are too few for {sets} sets of genes with effects; at least {2 * needed + 1} are needed"
        raise CohortError(msg)
    chosen = rng.choice(genes - 1, needed, replace=False).reshape(2, sets, size)
    return chosen[0], chosen[1]


def _log_shares(rng: np.random.Generator, genes: int, cell_types: int, raised: Codes, lowered: Codes) -> NDArray[Any]:
    """Draw the log shares of control cells in state 0: (types, genes)."""
    log_mean = np.tile(rng.normal(0, 2.7, genes), (cell_types, 1)) + rng.normal(0, 0.15, (cell_types, genes))
    for kind in range(cell_types):
        markers = rng.choice(genes - 1, max(2, genes // 25), replace=False)
        log_mean[kind, markers] += rng.uniform(1.0, 2.5, len(markers))
    effect = np.concatenate([raised, lowered])
    # Genes that rise start low and genes that fall start high, so that gains and losses can cancel.
    start = np.concatenate([np.full(len(raised), 0.8), np.full(len(lowered), 4.0)])
    target = np.log(start / SCALE) + rng.normal(0, 0.25, len(effect)) + rng.normal(0, 0.3, (cell_types, len(effect)))
    share = np.exp(log_mean)
    share[:, effect] = share[:, -1] = 0
    room = 1 - BALLAST_SHARE - np.exp(target).sum(1, keepdims=True)
    share = np.minimum(share / share.sum(1, keepdims=True) * room, 0.03 + 3 / genes)  # the ballast takes the excess
    share[:, effect] = np.exp(target)
    share[:, -1] = BALLAST_SHARE
    return np.log(share)


def _folds(rng: np.random.Generator, log_share: NDArray[Any], up: Codes, down: Codes) -> tuple[Any, Any]:
    """Draw log-fold changes of the genes `up` and `down` within the limits, such that gained and lost shares cancel."""
    lost = -_fold(rng.normal(size=len(down)))
    loss = np.exp(log_share[down]) @ -np.expm1(lost)
    z, share = rng.normal(size=len(up)), np.exp(log_share[up])
    low, high = -12.0, 12.0
    for _ in range(60):  # bisect the shift of z at which the gain equals the loss
        middle = (low + high) / 2
        low, high = (low, middle) if share @ np.expm1(_fold(z + middle)) > loss else (middle, high)
    return _fold(z + low), lost


def _fold(z: NDArray[Any]) -> NDArray[Any]:
    """Map real numbers to log-fold changes between FOLD_MIN and FOLD_MAX."""
    return FOLD_MIN + (FOLD_MAX - FOLD_MIN) / (1 + np.exp(-z))


@dataclass(frozen=True)
class Names:
    """The names of genes and levels of a cohort, by code."""

    genes: list[str]
    categories: dict[str, list[str]]  # levels of each column of obs

    @classmethod
    def of(cls, parameters: Parameters) -> Names:
        """Return the names for some parameters."""
        cell_types, genes = parameters.fold.shape[1:]
        effect = affected(parameters)
        gene_names = [f"{'EFFECT' if effect[j] else 'GENE'}{j + 1:05d}" for j in range(genes - 1)]
        categories = {
            CELL_TYPE: [f"type_{t + 1}" for t in range(cell_types)],
            CONDITION: _condition_names(parameters.pathway),
            DONOR: [f"donor_{b + 1:02d}" for b in range(len(parameters.group_weight))],
        }
        return cls([*gene_names, BALLAST], categories)


def _condition_names(pathway: NDArray[Any]) -> list[str]:
    """Return the names of the conditions: `control`, and `treated`, `treated_2`, ... or knock-outs `P01_KO01`, ..."""
    if not (pathway >= 0).any():
        return ["control", "treated", *(f"treated_{c}" for c in range(2, len(pathway)))][: len(pathway)]
    pathways = int(pathway.max()) + 1
    return ["control", *(f"P{code + 1:02d}_KO{c // pathways + 1:02d}" for c, code in enumerate(pathway[1:]))]


def affected(parameters: Parameters) -> NDArray[np.bool_]:
    """Return which genes any condition changes in any cell type: (genes,) bool."""
    return (parameters.fold != 0).any(axis=(0, 1))
