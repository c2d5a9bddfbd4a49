"""Simulate cohorts of any size with known true expression and effects.

`simulate` writes counts as a plain AnnData zarr v3 store, chunk of cells by chunk of cells, and the truth beside it
(`cohort.zarr` and `cohort.truth.zarr`); `load_truth` opens the latter. Neither holds a cells x genes matrix: the truth
is a function of a few numbers per cell and per gene, computed for the requested rows and genes.

The model of a cell. Each cell type has a baseline and marker genes. Each cell has a continuous state that moves about a
tenth of the genes by type-specific amounts. A condition changes the genes named `EFFECT...` in the types that respond
to it. This gives the *shares* of a cell's counts. Let `phi(share)` be the expected log-normalised value
`log1p(1e4 y / library)` of a negative binomial count y with mean share x library, averaged over the log-normal
distribution of the library size. Then

    f(X, c) = phi(share of X under c)                      what METHOD calls the true expression
    g(X, c, b) = h1(f) u1_bc w1_type + h2(f) u2_bc w2_type   with h1(f) = tanh f, h2(f) = f exp(-f)

where the u of the donors are centred over the donors that have condition c, so that E[g | X, c] = 0 exactly for any f.
Counts are drawn with the shares `phi^-1(f + g)`. One abundant gene, `BALLAST`, takes the rest of the shares, so that
they sum to 1; without it, normalisation would spread the batch effect of each gene over all genes. It is the only gene
whose g is not centred. It has no treatment effect, because the gains and losses of a condition cancel.
"""

from __future__ import annotations

from ndreamer_dist.datasets.parameters import BALLAST, CELL_TYPE, CONDITION, DONOR
from ndreamer_dist.datasets.simulation import simulate
from ndreamer_dist.datasets.truth import Truth, load_truth, truth_path

__all__ = ["BALLAST", "CELL_TYPE", "CONDITION", "DONOR", "Truth", "load_truth", "simulate", "truth_path"]
