"""Find exact nearest neighbours on a GPU, with the same bits as `exact` and `hubs` (METHOD sections 6 and 9).

Input: queries and a target group, both on the device. Output: rows and distances of the k nearest targets.

1. FAISS's flat index of the distinct points proposes a few more candidates than needed, by float32 arithmetic. Their
   order among near-ties depends on the device and on tiling. Where distances are corrected for hubs, the candidates come
   from float32 products, since FAISS ranks by distance alone.
2. A bound certifies, for each query, that no better target was missed.
3. For uncertified queries, float64 products propose again. Queries that are still uncertified go to the CPU.
4. Float64 distances of the original coordinates decide. They are summed in numpy's order, so GPU and CPU agree to the
   last bit.

Only rows and distances leave the device.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ndreamer_dist.compute.engines import ENGINES, Engine, faiss_builds
from ndreamer_dist.matching.exact import (
    FAR,
    FLOAT32,
    FLOAT64,
    SPARE,
    Neighbours,
    Tile,
    certain_limit,
    distances_of,
    nothing_found,
)
from ndreamer_dist.matching.hubs import NEAREST_QUERIES, CorrectedTile, Frame, Remoteness
from ndreamer_dist.matching.labels import Placed
from ndreamer_dist.matching.partition import Index, build_index, distinct_rows

SETTLED_QUERIES = 16_384
"""Number of queries that are searched together."""
PRODUCT_PAIRS = 2**27
"""Query-target pairs whose products are held at once: 1 GiB of float64."""
MOST_PROPOSED = 2048
"""FAISS's limit on the number of neighbours on a GPU."""
MORE = 4
"""Float64 candidates per FAISS candidate. More are needed, since near copies are common."""


@lru_cache(maxsize=1)
def resident(cells: Placed, device: str) -> Placed:
    """Copy the coordinates of cells to a device; the copy is cached until the process searches other cells."""
    return Placed(torch.tensor(cells.points, device=ENGINES[device].device), cells.labels)


class DeviceQueries(NamedTuple):
    """Queries of a search, on the device.

    Attributes
    ----------
    queries
        (q, d) float32 coordinates.
    skipped
        (q,) the target row that is no candidate, or -1.
    group
        (q,) the query's row of h, where distances are corrected for hubs.
    """

    queries: Tensor
    skipped: Tensor
    group: Tensor

    def of(self, part: slice | Tensor) -> DeviceQueries:
        """Return some of the queries."""
        return DeviceQueries(*(each[part] for each in self))


class Proposals(NamedTuple):
    """Candidates of some queries: (q, c) distinct points, -1 for none, and their computed values, lowest first.

    The value is the squared distance, or `d - h` where distances are corrected for hubs. Every point that is not proposed
    has at least the value of the last candidate. `rounding` is the unit roundoff of the computation.
    """

    points: Tensor
    values: Tensor
    rounding: float


class Settled(NamedTuple):
    """The k best candidates, (q, k) rows and squared distances, and (q,) whether they certainly are the k best targets."""

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

        self._targets, self._engine = targets, engine
        order, starts = distinct_rows(targets.cpu().numpy())
        copies = np.diff(np.append(starts, len(order)))
        self._order, self._first, self._copies = (
            torch.tensor(part, device=targets.device) for part in (order, starts, copies)
        )
        self._most_copies = int(copies.max())
        self._points = targets[self._order[self._first]].double()
        self._centre = targets.double().mean(0)
        self._radius = (self._points - self._centre).square().sum(1).max().sqrt()

    @cached_property
    def _flat(self) -> Any:
        """FAISS's index of the points."""
        index = self._engine.flat(self._targets.shape[1])
        index.add(self._centred(self._points))
        return index

    def _centred(self, points: Tensor) -> Tensor:
        """Centre points and round them once to float32. Centring keeps norms, and so rounding errors, small."""
        return (points - self._centre).float().contiguous()

    def nearest(
        self, queries: Tensor, k: int, *, exclude: np.ndarray | None = None, remote: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> Neighbours:  # fmt: skip
        """Return the k nearest targets of every query; see `exact.nearest` and `hubs.nearest_corrected`.

        Parameters
        ----------
        queries
            (q, d) float32 coordinates on the targets' device.
        remote, groups
            (groups, t) remoteness of the targets, and (q,) which row of it is a query's; None for plain distances.
        """
        rows, squared, widened = self._searched(queries, k, exclude, remote, groups)
        return Neighbours(*distances_of(rows, squared), widened)

    def mean_distances(self, queries: Tensor, k: int) -> np.ndarray:
        """Return each query's mean distance to its k nearest targets, as `hubs.remoteness` does: (q,) float32."""
        _, squared, _ = self._searched(queries, min(k, len(self._targets)), None, None, None)
        return np.sqrt(squared).mean(axis=1).astype(np.float32)

    def _searched(
        self, queries: Tensor, k: int, exclude: np.ndarray | None, remote: np.ndarray | None, groups: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return rows and float64 squared distances, (q, k) each, and (q,) which queries FAISS left uncertified."""
        skipped, group = (
            np.full(len(queries), none, dtype=np.int64) if each is None else np.asarray(each, dtype=np.int64)
            for each, none in ((exclude, -1), (groups, 0))
        )
        asked = DeviceQueries(queries, *(torch.tensor(each, device=queries.device) for each in (skipped, group)))
        half = None
        if remote is not None:
            half = torch.tensor(remote, device=queries.device).double()[:, self._order[self._first]] / 2
        size = SETTLED_QUERIES if half is None else min(SETTLED_QUERIES, self._together)
        tiles = [slice(start, start + size) for start in range(0, len(queries), size)]
        if not tiles:
            return *nothing_found(0, k), np.zeros(0, dtype=bool)
        parts = [self._search(asked.of(tile), half, k) for tile in tiles]
        rows, squared, widened, open_ = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        left = np.flatnonzero(open_)
        if len(left):
            points, index = queries[left].cpu().numpy(), self._by_cells
            if remote is None:
                tile = Tile(index, points, skipped[left], k)
            else:
                tile = CorrectedTile(Frame(index, remote), points, group[left], k)
            rows[left], squared[left], _ = tile.search()
        return rows, squared, widened

    @cached_property
    def _by_cells(self) -> Index:
        """Index of the same targets on the CPU, for the few queries that stay uncertified here."""
        return build_index(self._targets.cpu().numpy())

    @property
    def _together(self) -> int:
        """How many queries' products with all points fit into `PRODUCT_PAIRS`."""
        return max(1, PRODUCT_PAIRS // len(self._points))

    def _search(self, asked: DeviceQueries, half: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rows, squared distances, which queries float32 left uncertified, and which are still uncertified."""
        settled = self._settled(asked, half, self._proposed(asked, half, k), k)
        open_ = ~settled.final
        left = open_.nonzero().squeeze(1)
        for part in left.split(self._together) if len(left) else ():
            some = asked.of(part)
            proposals = self._by_products(some, half, MORE * (k + 1 + SPARE), torch.float64)
            for whole, new in zip(settled, self._settled(some, half, proposals, k), strict=True):
                whole[part] = new
        return settled.rows, settled.squared, open_, ~settled.final

    def _proposed(self, asked: DeviceQueries, half: Tensor | None, k: int) -> Proposals:
        """Return candidates by float32: FAISS's, or by products where distances are corrected."""
        count = min(len(self._points), k + 1 + SPARE, MOST_PROPOSED)
        if half is not None:
            return self._by_products(asked, half, count, torch.float32)
        squared, points = self._flat.search(self._centred(asked.queries.double()), count)
        return Proposals(points, squared.double(), FLOAT32)

    def _by_products(self, asked: DeviceQueries, half: Tensor | None, count: int, dtype: torch.dtype) -> Proposals:
        """Return candidates by products of float32 or float64."""
        moved, points = ((each - self._centre).to(dtype) for each in (asked.queries.double(), self._points))
        values = torch.baddbmm(
            (moved.square().sum(1)[:, None] + points.square().sum(1))[None], moved[None], points.T[None], alpha=-2
        )[0]
        if half is not None:
            own = half.to(dtype)  # a row for all queries, or one each
            values.clamp_(min=0).sqrt_().sub_(own if len(own) == 1 else own[asked.group])
        nearest, found = values.topk(min(count, len(self._points)), largest=False)
        return Proposals(found, nearest.double(), FLOAT32 if dtype == torch.float32 else FLOAT64)

    def _settled(self, asked: DeviceQueries, half: Tensor | None, proposals: Proposals, k: int) -> Settled:
        """Return the k best candidates, and for which queries they are certainly the k best targets."""
        points, rounding = proposals.points.clamp_min(0), proposals.rounding
        absent = proposals.points < 0
        rows, squared, kth = self._ranked(asked, half, points, absent, k)
        norms, width = (asked.queries.double() - self._centre).square().sum(1).sqrt(), asked.queries.shape[1]
        if half is None:
            limit = certain_limit(kth, norms, width, rounding)
        else:
            least, most = (extreme[asked.group] for extreme in (half.amin(1), half.amax(1)))
            limit = certain_score(kth, norms, (least, most), width, rounding)
        last = proposals.values[:, -1]
        # FAISS returns no point for an infinite distance. So a full list proves nothing if an entry is absent.
        whole = ~absent.any(1) if points.shape[1] == len(self._points) else torch.zeros_like(last, dtype=torch.bool)
        near = (norms + self._radius < FAR) | (rounding == FLOAT64)  # float32 products would overflow
        return Settled(rows, squared, last.isfinite() & near & (whole | (last > limit)))

    def _ranked(
        self, asked: DeviceQueries, half: Tensor | None, points: Tensor, absent: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the k best rows of the candidate points, by exact value and then by row: (q, k) rows and squared distances.

        The third is the k-th exact value, infinite where there are fewer rows: (q,).
        """
        copy = torch.arange(min(self._most_copies, k + 1), device=points.device)  # + 1: one may be the excluded row
        held = self._copies[points][..., None]
        row = self._order[self._first[points][..., None] + torch.minimum(copy, held - 1)]
        none = (copy >= held) | absent[..., None] | (row == asked.skipped[:, None, None])
        exact = summed_as_numpy((asked.queries.double()[:, None] - self._points[points]).square_())
        value = exact if half is None else exact.sqrt() - half[asked.group[:, None], points]
        by_row = row.masked_fill(none, torch.iinfo(row.dtype).max).flatten(1).sort(dim=1)
        value, squared = (
            each[..., None].expand_as(row).masked_fill(none, torch.inf).flatten(1).gather(1, by_row.indices)
            for each in (value, exact)
        )
        value, order = value.sort(dim=1, stable=True)
        rows = by_row.values.gather(1, order).masked_fill_(value.isinf(), -1)
        rows, squared, value = (
            functional.pad(each[:, :k], (0, max(0, k - value.shape[1])), value=none)
            for each, none in ((rows, -1), (squared.gather(1, order), torch.inf), (value, torch.inf))
        )
        return rows, squared, value[:, -1]


class GpuRemoteness(Remoteness):
    """Measure remoteness on the device that holds the coordinates; see `hubs.Remoteness`."""

    def _index_of(self, points: Tensor) -> GpuIndex:
        return GpuIndex(points, ENGINES["cuda"])

    def _measured(self, targets: Tensor, queries: GpuIndex) -> np.ndarray:
        return queries.mean_distances(targets, NEAREST_QUERIES)


def certain_score(kth: Tensor, norms: Tensor, half: tuple[Tensor, Tensor], dimensions: int, rounding: float) -> Tensor:
    """Return the computed `d - h` beyond which no target can be among a query's k best: (q,).

    A target that is as good as the k-th, t, lies within t + h, so that its squared distance is wrong by at most E, as in
    `exact.certain_limit`. The root of what is computed is then at most `E / (t + h)` too large, and less where t + h is small.

    Parameters
    ----------
    kth
        (q,) exact value of the k-th best candidate; infinite where there is none.
    norms
        (q,) norms of the queries.
    half
        (q,) smallest and largest h of the targets.
    rounding
        Unit roundoff.
    """
    near, reach = ((kth + extreme).clamp_min(0) for extreme in half)
    error = (2 * dimensions + 64) * rounding * (2 * norms + reach) ** 2 + dimensions * 2.0**-120
    return kth + error / (near + (near * near + error).sqrt()) + 8 * rounding * (kth.abs() + half[1])


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
    group, sent = GpuIndex(torch.tensor(points, device=device), ENGINES[device]), torch.tensor(points, device=device)
    asked = DeviceQueries(sent, *torch.zeros((2, len(points)), dtype=torch.int64, device=device))
    norms = np.sqrt(((points - points.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=1))
    for name, proposed in (
        ("FAISS", group._proposed(asked, None, 1)),
        ("torch", group._by_products(asked, None, SPARE, torch.float32)),
    ):
        squared, rows = proposed.values.cpu().numpy(), proposed.points.cpu().numpy()
        exact = ((points[:, None].astype(np.float64) - points[rows]) ** 2).sum(axis=2)
        over = certain_limit(exact, norms[:, None], points.shape[1], FLOAT32) - exact
        if not (np.abs(squared - exact) <= over).all():
            return f"{name}'s float32 distances err by more than IEEE's; unset NVIDIA_TF32_OVERRIDE and what emulates products"
    return None
