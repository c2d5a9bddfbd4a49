"""Compute the sizes of a cohort and of the network, which determine memory, disk and numbers of tasks. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.pack import partition_count
from ndreamer_dist.cohort.statistics import spans_of
from ndreamer_dist.settings import Settings

BASE_BYTES = 450e6
"""Memory of a worker process that has imported torch, scanpy and Ray."""
GIVEN_DIMENSIONS = 100
"""Assumed number of dimensions of coordinates from the input's `obsm`, which are not read for a plan."""


@dataclass(frozen=True)
class CohortSize:
    """The sizes that a plan is computed from.

    Attributes
    ----------
    cells, genes
        Kept cells, and genes of the cohort.
    stored_values
        Entries of the matrix that are stored.
    groups, largest_group
        Number of groups, and cells of the largest one.
    edges
        Pairs of a query group and a target group to match.
    fewest_groups
        Smallest number of groups of one condition that a cell is matched with.
    """

    cells: int
    genes: int
    stored_values: int
    groups: int
    largest_group: int
    edges: int
    conditions: int
    fewest_groups: int

    @classmethod
    def of(cls, design: Design, settings: Settings, *, genes: int, stored_values: int) -> CohortSize:
        """Return the sizes of a designed cohort."""
        return cls(
            cells=design.n_cells,
            genes=genes,
            stored_values=stored_values,
            groups=len(design.groups),
            largest_group=max(group.cells for group in design.groups),
            edges=sum(len(design.targets(group, settings.match.edges)) for group in design.groups),
            conditions=len(design.conditions),
            fewest_groups=design.fewest_groups,
        )

    @property
    def stored_per_cell(self) -> float:
        """Mean number of stored values of a cell."""
        return self.stored_values / max(self.cells, 1)

    def modelled(self, settings: Settings) -> int:
        """Return the number of modelled genes."""
        return min(self.genes, settings.hvg.num_hvg)

    def modelled_per_cell(self, settings: Settings) -> float:
        """Return the estimated stored values of a cell in the modelled genes, which are expressed above average."""
        return self.stored_per_cell * min(1.0, 2.5 * self.modelled(settings) / self.genes)

    def partition_cells(self, settings: Settings) -> int:
        """Return the largest number of cells of one partition of packing."""
        rows = settings.pack.block_rows
        blocks = -(-self.cells // rows)
        partitions = partition_count(blocks, self.stored_values, len(spans_of(self.cells)))
        return min(self.cells, rows * -(-blocks // partitions))


def parameter_count(settings: Settings, genes: int) -> int:
    """Return the number of weights of the network, without biases and the embeddings of conditions and batches."""
    model = settings.model
    widths = [genes, *model.encoder]
    encoder = sum(a * b for a, b in itertools.pairwise(widths))
    codes = model.codebooks * model.code_dim * (model.encoder[-1] + model.codes)
    head = 2 * model.latent * (model.codebooks * model.code_dim + 18 * model.latent)
    widths = [model.latent, *model.decoder, genes]
    decoder = sum(a * b for a, b in itertools.pairwise(widths))
    return encoder + codes + head + decoder
