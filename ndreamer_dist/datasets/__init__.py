"""Simulated cohorts of any size, whose true expression and effects are known.

`simulate` writes counts as a plain AnnData zarr v3 store, chunk of cells by chunk of cells, and the truth beside it
(`cohort.zarr` and `cohort.truth.zarr`); `load_truth` opens the latter. Nothing of size cells x genes is ever held: the
truth is a function of a few numbers per cell and per gene, computed for the rows and genes that are asked for.

How a cell comes about. A type has a baseline and marker genes, a cell a continuous state that moves about a tenth of
the genes by type-specific amounts; a condition changes the genes named `EFFECT...` in the types that respond to it.
This gives the *shares* of a cell's counts. With `phi(share)` the expected log-normalised value `log1p(1e4 y / library)`
of a negative binomial count y of mean share x library, averaged over the libraries' log-normal law,

    f(X, c) = phi(share of X under c)                      what METHOD calls the true expression
    g(X, c, b) = h1(f) u1_bc w1_type + h2(f) u2_bc w2_type   with h1(f) = tanh f, h2(f) = f exp(-f)

where the donors' u are centred over the donors that hold c, so that E[g | X, c] = 0 exactly, whatever f. Counts are
drawn with the shares `phi^-1(f + g)`. Their sum is kept at 1 by one abundant gene, `BALLAST`, which takes what the
distortions leave: without it, normalising would spread every gene's batch effect over all genes. It is the only gene
whose g is not centred. A condition's gains and losses cancel, so it has no treatment effect.
"""

from __future__ import annotations

from ndreamer_dist.datasets.parameters import BALLAST, CELL_TYPE, CONDITION, DONOR
from ndreamer_dist.datasets.simulation import simulate
from ndreamer_dist.datasets.truth import Truth, load_truth, truth_path

__all__ = ["BALLAST", "CELL_TYPE", "CONDITION", "DONOR", "Truth", "load_truth", "simulate", "truth_path"]
