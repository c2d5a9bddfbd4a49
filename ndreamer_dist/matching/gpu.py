"""Find exact nearest neighbours on a GPU, with the same bits as `exact.nearest` (METHOD section 6).

Input: queries and a target group, both on the device. Output: rows and distances of the k nearest targets.

1. FAISS's flat index of the distinct points proposes a few more candidates than needed, by float32 arithmetic. Their
   order among near-ties depends on the device and on tiling.
2. A bound certifies, for each query, that no better target was missed.
3. For uncertified queries, float64 products propose again. Queries that are still uncertified go to `exact.nearest`.
4. Float64 distances of the original coordinates decide. They are summed in numpy's order, so GPU and CPU agree to the
   last bit.

Only rows and distances leave the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ndreamer_dist.compute.engines import faiss_builds
from ndreamer_dist.matching.exact import FLOAT32, FLOAT64, SPARE, Neighbours, certain_limit, distances_of, nothing_found
from ndreamer_dist.matching.exact import nearest as nearest_by_cells
from ndreamer_dist.matching.labels import Placed
from ndreamer_dist.matching.partition import Index, build_index, distinct_rows

SETTLED_QUERIES = 16_384
"""Number of queries that are searched together."""
DOUBLE_PAIRS = 2**27
"""Query-target pairs whose float64 products are held at once: 1 GiB."""
MOST_PROPOSED = 2048
"""FAISS's limit on the number of neighbours on a GPU."""
MORE = 4
"""Float64 candidates per FAISS candidate. More are needed, since near copies are common."""


@dataclass(frozen=True)
class Engine:
    """A torch device, and the function that makes FAISS's flat index there, given the number of dimensions."""

    device: str
    flat: Callable[[int], Any]


def _flat_on_gpu(width: int) -> Any:
    import faiss

    return faiss.GpuIndexFlatL2(_resources(), width)


def _flat_on_host(width: int) -> Any:
    import faiss

    return faiss.IndexFlatL2(width)


@lru_cache(maxsize=1)
def _resources() -> Any:
    """Return FAISS's GPU resources, made once per process because they are costly."""
    import faiss

    return faiss.StandardGpuResources()


ENGINES = {"cuda": Engine("cuda", _flat_on_gpu), "cpu": Engine("cpu", _flat_on_host)}
"""Engines by device. The CPU engine lets tests run everything but FAISS's GPU kernel."""


@lru_cache(maxsize=1)
def resident(cells: Placed, device: str) -> Placed:
    """Copy the coordinates of cells to a device; the copy is cached until the process searches other cells."""
    return Placed(torch.tensor(cells.points, device=ENGINES[device].device), cells.labels)


class Proposals(NamedTuple):
    """Candidates of some queries: (q, c) distinct points, -1 for none, and computed squared distances, nearest first.

    Every point that is not proposed has at least the computed distance of the last candidate. `rounding` is the unit
    roundoff of the computation.
    """

    points: Tensor
    squared: Tensor
    rounding: float


class Settled(NamedTuple):
    """The k best candidates, (q, k) rows and squared distances, and (q,) whether they certainly are the k nearest."""

    rows: Tensor
    squared: Tensor
    final: Tensor


class GpuIndex:
    """A target group on a device: its distinct points, FAISS's index of them, and the target rows of each point.

    Parameters
    ----------
    targets
        (t, d) float32, at least one, on the engine's device.
    """

    def __init__(self, targets: Tensor, engine: Engine) -> None:
        import faiss.contrib.torch_utils  # noqa: F401 - lets indexes take tensors

        self._targets = targets
        order, starts = distinct_rows(targets.cpu().numpy())
        copies = np.diff(np.append(starts, len(order)))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.repeat(np.arange(len(starts)), copies)
        self._order, self._first, self._copies, self._place = (
            torch.tensor(part, device=targets.device) for part in (order, starts, copies, place)
        )
        self._most_copies = int(copies.max())
        self._points = targets[self._order[self._first]].double()
        self._centre = targets.double().mean(0)
        self._flat = engine.flat(targets.shape[1])
        self._flat.add(self._centred(self._points))

    def _centred(self, points: Tensor) -> Tensor:
        """Centre points and round them once to float32. Centring keeps norms, and so rounding errors, small."""
        return (points - self._centre).float().contiguous()

    def nearest(self, queries: Tensor, k: int, *, exclude: np.ndarray | None = None) -> Neighbours:
        """Return the k nearest targets of every query; see `exact.nearest`.

        Parameters
        ----------
        queries
            (q, d) float32 coordinates on the targets' device.
        """
        skipped = np.full(len(queries), -1, dtype=np.int64) if exclude is None else np.asarray(exclude, dtype=np.int64)
        sent = torch.tensor(skipped, device=queries.device)
        tiles = [slice(start, start + SETTLED_QUERIES) for start in range(0, len(queries), SETTLED_QUERIES)]
        parts = [self._search(queries[tile], sent[tile], k) for tile in tiles]
        if not parts:
            return Neighbours(*distances_of(*nothing_found(0, k)), np.zeros(0, dtype=bool))
        rows, distances, widened, open_ = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        left = np.flatnonzero(open_)
        if len(left):
            found = nearest_by_cells(queries[left].cpu().numpy(), self._by_cells, k, exclude=skipped[left])
            rows[left], distances[left] = found.rows, found.distances
        return Neighbours(rows, distances, widened)

    @cached_property
    def _by_cells(self) -> Index:
        """Index of the same targets on the CPU, for the few queries that stay uncertified here."""
        return build_index(self._targets.cpu().numpy())

    def _search(self, queries: Tensor, skipped: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows, distances, which queries FAISS left uncertified, and which are still uncertified."""
        settled = self._settled(queries, skipped, self._proposed(queries, k), k)
        open_ = ~settled.final
        left = open_.nonzero().squeeze(1)
        for part in self._few(left):
            again = self._settled(queries[part], skipped[part], self._proposed_in_double(queries[part], k), k)
            for whole, new in zip(settled, again, strict=True):
                whole[part] = new
        none = settled.rows < 0
        distances = settled.squared.sqrt().masked_fill(none, torch.nan).float()
        return settled.rows, distances, open_, ~settled.final

    def _few(self, queries: Tensor) -> Iterator[Tensor]:
        """Cut queries so that their products with all points fit into `DOUBLE_PAIRS`."""
        return iter(queries.split(max(1, DOUBLE_PAIRS // len(self._points)))) if len(queries) else iter(())

    def _proposed(self, queries: Tensor, k: int) -> Proposals:
        """Return FAISS's candidates, by float32 distances."""
        count = min(len(self._points), k + 1 + SPARE, MOST_PROPOSED)
        squared, points = self._flat.search(self._centred(queries.double()), count)
        return Proposals(points, squared.double(), FLOAT32)

    def _proposed_in_double(self, queries: Tensor, k: int) -> Proposals:
        """Return candidates by float64 distances."""
        count = min(len(self._points), MORE * (k + 1 + SPARE))
        moved, points = queries.double() - self._centre, self._points - self._centre
        squared = torch.baddbmm(
            (moved.square().sum(1)[:, None] + points.square().sum(1))[None], moved[None], points.T[None], alpha=-2
        )[0]
        nearest, found = squared.topk(count, largest=False)
        return Proposals(found, nearest, FLOAT64)

    def _settled(self, queries: Tensor, skipped: Tensor, proposals: Proposals, k: int) -> Settled:
        """Return the k best candidates, and for which queries they are certainly the k nearest targets."""
        points, count = proposals.points.clamp_min(0), proposals.points.shape[1]
        absent = proposals.points < 0
        own = torch.where(skipped >= 0, self._place[skipped.clamp_min(0)], -1)
        # The excluded target's point is no candidate, unless it has copies; then `_ranked` drops the row alone.
        alone = (points == own[:, None]) & (self._copies[points] == 1)
        computed = proposals.squared.masked_fill(absent | alone, torch.inf)
        kth = computed.kthvalue(k, dim=1).values if count >= k else computed.new_full((len(queries),), torch.inf)
        norms = (queries.double() - self._centre).square().sum(1).sqrt()
        limit = certain_limit(kth, norms, queries.shape[1], proposals.rounding)
        last = proposals.squared[:, -1]
        # FAISS returns no point for an infinite distance. So a full list proves nothing if an entry is absent.
        whole = ~absent.any(1) if count == len(self._points) else torch.zeros_like(last, dtype=torch.bool)
        rows, squared = self._ranked(queries, skipped, points, absent, k)
        return Settled(rows, squared, last.isfinite() & (whole | (last > limit)))

    def _ranked(
        self, queries: Tensor, skipped: Tensor, points: Tensor, absent: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Return the k best rows of the candidate points, by exact distance and then by row, and squared distances."""
        copy = torch.arange(min(self._most_copies, k + 1), device=points.device)  # + 1: one may be the excluded row
        held = self._copies[points][..., None]
        row = self._order[self._first[points][..., None] + torch.minimum(copy, held - 1)]
        none = (copy >= held) | absent[..., None] | (row == skipped[:, None, None])
        difference = (queries.double()[:, None] - self._points[points]).square_()
        exact = summed_as_numpy(difference)[..., None].expand_as(row).masked_fill(none, torch.inf).flatten(1)
        row, by_row = row.masked_fill(none, torch.iinfo(row.dtype).max).flatten(1).sort(dim=1)
        squared, by_distance = exact.gather(1, by_row).sort(dim=1, stable=True)
        row = row.gather(1, by_distance).masked_fill_(squared.isinf(), -1)
        wider = max(0, k - row.shape[1])
        return functional.pad(row[:, :k], (0, wider), value=-1), functional.pad(
            squared[:, :k], (0, wider), value=torch.inf
        )


def summed_as_numpy(values: Tensor) -> Tensor:
    """Sum over the last dimension in the order in which `numpy.sum` adds contiguous rows.

    Up to 128 numbers are added in eight interleaved columns, whose sums are added in pairs. Longer rows are halved.
    Each addition is a separate operation, so no compiler can fuse it with another.
    """
    count = values.shape[-1]
    if count < 8:
        total = values.new_zeros(values.shape[:-1])
        for number in values.unbind(-1):
            total = total + number
        return total
    if count > 128:
        half = count // 2 - count // 2 % 8
        return summed_as_numpy(values[..., :half]) + summed_as_numpy(values[..., half:])
    columns = values[..., :8]
    for start in range(8, count - count % 8, 8):
        columns = columns + values[..., start : start + 8]
    while columns.shape[-1] > 1:
        columns = columns[..., ::2] + columns[..., 1::2]
    total = columns[..., 0]
    for number in values[..., count - count % 8 :].unbind(-1):
        total = total + number
    return total


# --- checks of the GPU -----------------------------------------------------------------------------------------------


def faiss_finding() -> str | None:
    """Return why FAISS or torch cannot search on this process's GPU, or None; see `engines.chosen_device`."""
    import faiss

    from ndreamer_dist.compute.engines import torch_finding

    builds = faiss_builds()
    if not hasattr(faiss, "GpuIndexFlatL2"):
        both = ", which are in each other's way: uninstall both first" if len(builds) > 1 else ""
        return f"{' and '.join(builds) or 'FAISS'} cannot use a GPU{both}; install faiss-gpu in place of faiss-cpu"
    wrong = torch_finding()
    if wrong:
        return wrong
    if faiss.get_num_gpus() == 0:
        return f"{builds[0] if builds else 'FAISS'} sees no GPU; it needs NVIDIA driver 525 or later"
    return search_finding("cuda")


def search_finding(device: str) -> str | None:
    """Return a message if the errors of a search on a device exceed the bound of the certificate, else None."""
    points = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32)
    group = GpuIndex(torch.tensor(points, device=device), ENGINES[device])
    proposed = group._proposed(torch.tensor(points, device=device), 1)
    squared, rows = proposed.squared.cpu().numpy(), proposed.points.cpu().numpy()
    exact = ((points[:, None].astype(np.float64) - points[rows]) ** 2).sum(axis=2)
    norms = np.sqrt(((points - points.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=1))
    over = certain_limit(exact, norms[:, None], points.shape[1], FLOAT32) - exact
    if (np.abs(squared - exact) <= over).all():
        return None
    return "FAISS's float32 distances err by more than IEEE's; unset NVIDIA_TF32_OVERRIDE and what emulates products"
