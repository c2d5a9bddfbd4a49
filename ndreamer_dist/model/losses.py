"""The losses (METHOD section 3), each over the global mini-batch, whichever share of it this worker holds.

The first half are pure functions of tensors; `total_loss` combines them. Sums over cells cover the worker's own cells
and are then added over workers. The losses inside groups compare the worker's own cells (anchors) with all cells of the
group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ndreamer_dist.model.batch import GroupRows, Labels, Merge, MiniBatch, Nested, rows_of_groups
from ndreamer_dist.model.codebooks import LOG_FLOOR, Quantised
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.network import Outputs
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.settings import LossSettings

NORM_FLOOR = 1e-12
VARIANCE_FLOOR = 1e-8
NO_ENTROPY = 1e-8
"""Sum of entropies below which there is one label and one code: the 1e-10 in the logarithm keeps it from being 0."""
DIRECT_BELOW = 1e-3
"""Squared distances below this fraction of the squared norms are computed from differences: a product loses digits."""
SAME_WITHIN = 1e-5
"""Distances below this fraction of the norms are set to 0."""
DIRECT_PAIRS = 16_384
"""Cell pairs whose differences are held at a time."""


@dataclass(frozen=True)
class Terms:
    """The value of each loss, as 0-dimensional tensors that are equal on all workers."""

    reconstruction: Tensor
    cosine: Tensor
    kl: Tensor
    independence_condition: Tensor
    independence_batch: Tensor
    independence_batch_within: Tensor
    dependence: Tensor
    triplet: Tensor
    neighbourhood: Tensor
    commitment: Tensor


@dataclass(frozen=True)
class LossTerms:
    """The total loss, and its terms before and after weighting (METHOD section 3)."""

    total: Tensor
    unweighted: Terms
    weighted: Terms

    def as_tensors(self) -> dict[str, Tensor]:
        """Return the total and the unweighted terms by name."""
        return {"total": self.total} | {f.name: getattr(self.unweighted, f.name) for f in fields(Terms)}

    def as_floats(self) -> dict[str, float]:
        """Return `as_tensors` as numbers; this waits for a GPU."""
        values = self.as_tensors()
        # One transfer to the host for all, since each waits for the device.
        return dict(zip(values, torch.stack([value.detach() for value in values.values()]).tolist(), strict=True))


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the mean squared error over genes of each cell, (cells,)."""
    return (x - reconstruction).square().mean(1)


def one_minus_cosine(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return 1 - cosine(x, reconstruction) of each cell, (cells,); norms are at least 1e-12."""
    norms = [torch.linalg.vector_norm(side, dim=1).clamp_min(NORM_FLOOR) for side in (x, reconstruction)]
    return 1 - (x * reconstruction).sum(1) / (norms[0] * norms[1])


def kl_to_standard_normal(mean: Tensor, variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, I)) of each cell, (cells,)."""
    return 0.5 * (variance + mean.square() - 1 - variance.log()).sum(1)


def correlation_penalty(values: Tensor, cells: int, collective: Collective) -> Tensor:
    """Return the mean squared entry of (correlation matrix - I) over the mini-batch, given own values, (own cells, z).

    Covariances are normalised by n - 1, and 1e-8 is added to each variance. With a single cell all covariances are 0.
    """
    # The derivative of the covariance by the centre is 0, so the centre needs no gradient.
    centre = collective.all_sum(values.detach().sum(0)) / cells
    centred = values - centre
    covariance = collective.loss_sum(centred.T @ centred) / max(cells - 1, 1)
    scale = (covariance.diagonal() + VARIANCE_FLOOR).rsqrt()
    correlation = covariance * scale * scale[:, None]
    return (correlation - torch.eye(len(scale), dtype=scale.dtype, device=scale.device)).square().mean()


def entropy(probs: Tensor) -> Tensor:
    """Return `-sum p log(p + 1e-10)` over the last dimension."""
    return -(probs * (probs + LOG_FLOOR).log()).sum(-1)


def nmi_from_entropies(of_label: Tensor, of_code: Tensor, of_both: Tensor) -> Tensor:
    """Return `2 (H_A + H_B - H_AB) / (H_A + H_B)`, or 0 if there is one label and one code."""
    apart = of_label + of_code
    defined = apart > NO_ENTROPY
    return torch.where(defined, 2 * (apart - of_both) / torch.where(defined, apart, 1), 0)


def nmi(joint: Tensor) -> Tensor:
    """Return the normalised mutual information of joint tables, (..., labels, codes), with any positive sum."""
    probs = joint / joint.sum((-1, -2), keepdim=True)
    return nmi_from_entropies(entropy(probs.sum(-1)), entropy(probs.sum(-2)), entropy(probs.flatten(-2)))


def independence_condition(quantised: Quantised, labels: Labels) -> Tensor:
    """Return the NMI of codes and condition, mean over codebooks."""
    return nmi(_merge_groups(quantised.group_probs, labels.condition)).mean()


def independence_batch(quantised: Quantised, labels: Labels) -> Tensor:
    """Return the NMI of codes and batch, mean over codebooks, summed over batch covariates; 0 without covariates."""
    terms = [nmi(_merge_groups(quantised.group_probs, batch)).mean() for batch in labels.batches]
    return torch.stack([quantised.group_probs.new_zeros(()), *terms]).sum()


def independence_batch_within(quantised: Quantised, labels: Labels) -> Tensor:
    """Return the NMI of codes and batch inside conditions, mean over conditions, summed over batch covariates.

    If each donor has one condition, this does not penalise what all donors of a condition have in common. A condition
    with a single batch counts as 0.
    """
    terms = [
        _unpadded_mean(batch.outer.padding_ratio, nmi_within(quantised.group_probs, batch).mean())
        for batch in labels.within
    ]
    return torch.stack([quantised.group_probs.new_zeros(()), *terms]).sum()


def nmi_within(group_probs: Tensor, labels: Nested) -> Tensor:
    """Return the NMI of codes and inner labels inside each outer label, (codebooks, outer labels).

    Parameters
    ----------
    group_probs
        (codebooks, groups, codes), with any positive sum.
    """
    joint, outer_of_pair = _merge_groups(group_probs, labels.pairs), labels.outer.row
    of_outer = _merge_groups(joint, labels.outer)
    cells = of_outer.sum(-1).clamp_min(LOG_FLOOR)  # (codebooks, outer labels); padding has none
    probs = joint / cells[:, outer_of_pair, None]
    terms = torch.stack([entropy(probs.sum(-1, keepdim=True)), entropy(probs)])
    of_label, of_both = terms.new_zeros((2, *cells.shape)).index_add(2, outer_of_pair, terms)
    return nmi_from_entropies(of_label, entropy(of_outer / cells[..., None]), of_both)


def dependence(quantised: Quantised, labels: Labels) -> Tensor:
    """Return the NMI of codes and low cluster plus that of codes and high cluster, inside groups, mean over groups.

    A group with a single label or a single cell counts as 0.
    """
    segments, dtype = labels.segments, quantised.group_probs.dtype
    groups = len(labels.group_cells)
    group_cells = labels.group_cells
    of_code = entropy(quantised.group_probs / group_cells.to(dtype)[:, None])
    shares = segments.row_cells / group_cells[segments.row_group]
    row_terms = torch.cat([(shares * (shares + LOG_FLOOR).log()).to(dtype)[None], quantised.negentropy])
    total = of_code.new_zeros(())
    for half in (slice(segments.low_rows), slice(segments.low_rows, None)):
        sums = row_terms.new_zeros((len(row_terms), groups))
        entropies = -sums.index_add(1, segments.row_group[half], row_terms[:, half])
        total = total + nmi_from_entropies(entropies[0], of_code, entropies[1:]).mean()
    return _unpadded_mean(labels.padding_ratio, total)


def _unpadded_mean(padding_ratio: Tensor | None, mean: Tensor) -> Tensor:
    """Correct a mean over padded entries, which are 0; the ratio is that of sizes with and without padding."""
    return mean if padding_ratio is None else mean * padding_ratio


def _merge_groups(group_probs: Tensor, merge: Merge) -> Tensor:
    """Sum (codebooks, groups, codes) over the groups that `merge` joins: (codebooks, sums, codes)."""
    shape = (len(group_probs), merge.sums, group_probs.shape[2])
    return group_probs.new_zeros(shape).index_add(1, merge.row, group_probs)


def commitment(quantised: Quantised) -> Tensor:
    """Return `sum((sg(q) - e*)^2) + 0.25 sum((q - sg(e*))^2)` over codebooks, own cells and dimensions (sg: detach)."""
    q, nearest = quantised.vectors, quantised.nearest
    return (q.detach() - nearest).square().sum() + 0.25 * (q - nearest.detach()).square().sum()


def triplet(squared: Tensor, positive: Tensor, negative: Tensor, keys: Tensor, *, pairs: int, margin: float) -> Tensor:
    """Return the sum of `ReLU(||a-p||^2 - ||a-n||^2 + margin)` and the number of its terms, (2,).

    Each anchor takes the `m = min(pairs, #positives, #negatives)` positives and negatives with the smallest keys,
    paired in the order of their keys.

    Parameters
    ----------
    squared, positive, negative, keys
        (..., anchors, candidates): squared distances, masks of positives and of negatives, random numbers in [0, 1).
    """
    m = torch.minimum(positive.sum(-1), negative.sum(-1)).clamp_max(pairs)
    taken = torch.arange(min(pairs, squared.shape[-1]), device=squared.device) < m[..., None]
    picked = [
        squared.gather(-1, torch.where(among, keys, 2).topk(taken.shape[-1], largest=False).indices)
        for among in (positive, negative)
    ]
    terms = functional.relu(picked[0] - picked[1] + margin) * taken
    return torch.stack([terms.sum(), m.sum().to(terms.dtype)])


def neighbourhood(
    expression: Tensor,
    embedding: Tensor,
    others: Tensor,
    crosses: Tensor,
    *,
    neighbours: int,
    sigma: float,
    across: float,
) -> Tensor:
    """Return the sum over each anchor's neighbours of `((P - Q) * weight)^2`, (..., anchors).

    Parameters
    ----------
    expression, embedding
        Distances of anchors to cells, (..., anchors, cells).
    others, crosses
        (..., anchors, cells): masks of the other cells of the anchor's group, and of the pairs that cross clusters.
    neighbours
        k; neighbours are the k + 1 nearest cells by either distance.
    sigma
        Temperature of P.
    across
        The weight is 1 + `across` for pairs that cross clusters, else 1.
    """
    available = others.sum(-1)
    count = torch.minimum(available.clamp_max(neighbours) + 1, available)
    most = min(neighbours + 1, others.shape[-1])
    near = nearest_mask(expression, others, count, most) | nearest_mask(embedding.detach(), others, count, most)
    # For an anchor without neighbours P and Q are both uniform, so both value and gradient are 0.
    nowhere = torch.finfo(embedding.dtype).min
    p = (-expression / sigma).masked_fill(~near, nowhere).softmax(-1)
    q = (-embedding).masked_fill(~near, nowhere).softmax(-1)
    return ((p - q) * (1 + across * crosses)).square().sum(-1)


def nearest_mask(distance: Tensor, others: Tensor, count: Tensor, most: int) -> Tensor:
    """Mark the `count` nearest, (...,), of each row's `others`, (..., cells); of ties and near-ties the first columns.

    Copies of a cell are common, and rounding must not choose among them. So distances are rounded to 33 significant
    bits (16 in single precision), and the column number goes into the bits below. `most` is an upper bound of `count`.
    """
    bits = 20 if distance.dtype == torch.float64 else 8
    scaled = distance * (2**bits + 1)
    coarse = (scaled - (scaled - distance)).double()
    column = torch.arange(distance.shape[-1], dtype=torch.float64, device=distance.device)
    ranked = ((coarse + 1e-300) * (1 + column * 2.0**-48)).masked_fill(~others, torch.inf)
    chosen = torch.arange(most, device=distance.device) < count[..., None]
    return torch.zeros_like(others).scatter_(-1, ranked.topk(most, largest=False).indices, chosen)


class Distance(torch.autograd.Function):
    """Euclidean distances of rows a, (..., m, d), to rows b, (..., n, d); the gradient of a distance of 0 is 0.

    Cells with the same codes have the same embedding up to rounding and small weights of other codes. The direction
    between them is noise that depends on the hardware, yet it would have full weight in the gradient. So distances
    below `SAME_WITHIN` are set to 0.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, wanted: Tensor) -> Tensor:
        """Return the distances; those that are not `wanted` may lose digits."""
        same = SAME_WITHIN**2 * _squared_norms(a, b)
        centre = b.mean(-2, keepdim=True)
        a, b = a - centre, b - centre
        squared = squared_in_double(a, b) if a.is_cuda else squared_with_repairs(a, b, wanted)
        distance = squared.masked_fill_(squared <= same, 0).sqrt_()
        ctx.save_for_backward(a, b, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of a and b."""
        a, b, distance = ctx.saved_tensors
        weight = torch.where(distance > 0, gradients[0] / distance, 0)
        d_a = torch.baddbmm(weight.sum(-1)[..., None] * a, weight, b, alpha=-1)
        d_b = torch.baddbmm(weight.sum(-2)[..., None] * b, weight.mT, a, alpha=-1)
        return d_a, d_b, None


def _squared_norms(a: Tensor, b: Tensor) -> Tensor:
    """Return |a|^2 + |b|^2, (..., m, n)."""
    return a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]


def squared_with_repairs(a: Tensor, b: Tensor, wanted: Tensor) -> Tensor:
    """Return squared distances by a product; where it loses digits and they are wanted, by differences."""
    scale = _squared_norms(a, b)
    squared = torch.baddbmm(scale, a, b.mT, alpha=-2)
    group, row, column = ((squared < DIRECT_BELOW * scale) & wanted).nonzero(as_tuple=True)
    for at in zip(*(where.split(DIRECT_PAIRS) for where in (group, row, column)), strict=True):
        squared[at] = (a[at[:2]] - b[at[0], at[2]]).square().sum(1)
    return squared


def squared_in_double(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances by a product in float64, which needs no repairs and so no wait for the GPU."""
    squared = torch.baddbmm(_squared_norms(a.double(), b.double()), a.double(), b.double().mT, alpha=-2)
    return squared.clamp_min_(0).to(a.dtype)


def pairwise_distance(a: Tensor, b: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Return Euclidean distances, (groups, m, n), of rows a, (groups, m, d), to rows b, (groups, n, d).

    Distances for which the mask `wanted`, (groups, m, n), is False may lose digits.
    """
    everything = a.new_ones((1, 1, 1), dtype=torch.bool)
    distance: Tensor = Distance.apply(a, b, everything if wanted is None else wanted)
    return distance


@dataclass(frozen=True)
class GroupCells:
    """Some groups of the mini-batch, padded to a common size, and the relations between their cells.

    Attributes
    ----------
    rows
        The anchors and the members.
    others
        (groups, anchors, members), pairs of two different cells without padding.
    same_low, same_high, crosses
        (groups, anchors, members): whether the labels are equal, and whether the pair crosses clusters.
    """

    rows: GroupRows
    others: Tensor
    same_low: Tensor
    same_high: Tensor
    crosses: Tensor

    @classmethod
    def of(cls, rows: GroupRows, cross_cluster: str) -> GroupCells:
        """Compare the cells of some groups; `cross_cluster` is the setting (METHOD sections 3, 8)."""
        low, high = rows.anchor_low[..., None], rows.anchor_high[..., None]
        same_low, same_high = low == rows.low[:, None], high == rows.high[:, None]
        across_high = low != rows.high[:, None] if cross_cluster == "published" else ~same_high
        others = rows.is_anchor[..., None] & rows.is_member[:, None] & (rows.at[..., None] != rows.members[:, None])
        return cls(rows, others, same_low, same_high, ~same_low | across_high)


def pair_losses(
    mean: Tensor,
    all_means: Tensor,
    x: Tensor,
    all_x: Tensor,
    labels: Labels,
    keys: Tensor,
    loss: LossSettings,
    *,
    at_once: int | None = None,
) -> Tensor:
    """Return the triplet sum, its number of pairs, and the neighbourhood term, over the worker's anchors, (3,).

    Parameters
    ----------
    mean, all_means, x, all_x
        Embedding and expression of own cells and of all cells, (own or global cells, z or genes).
    keys
        `StepNoise.keys`.
    at_once
        Largest number of pairs to compare together, padding included; by default as `labels.rows` are cut.
    """
    # The empty slice makes the result depend on `all_means` on every worker, so that all join its backward sum.
    total = torch.stack([all_means[:0].sum()] * 3)
    everyone = labels.group, labels.low, labels.high
    cut = labels.rows if at_once is None else rows_of_groups(everyone, labels.mine, "cpu", at_once=at_once)
    for rows in cut:
        group = GroupCells.of(rows, loss.cross_cluster)
        apart = _apart(group, mean, all_means)
        pairs = triplet(
            apart.square(), group.others & group.same_low & group.same_high,
            group.others & ~group.same_low & ~group.same_high,
            keys[rows.anchors[..., None], rows.members[:, None]], pairs=loss.triplet_pairs, margin=loss.margin,
        )  # fmt: skip
        near = neighbourhood(
            _apart(group, x, all_x), apart, group.others, group.crosses,
            neighbours=loss.neighbours, sigma=loss.sigma, across=loss.across,
        )  # fmt: skip
        means = near.sum(-1) / rows.sizes
        total = total + torch.cat(
            [pairs, _unpadded_mean(labels.padding_ratio, means.sum()[None] / len(labels.group_cells))]
        )
    return total


def _apart(group: GroupCells, own: Tensor, everyone: Tensor) -> Tensor:
    """Return the distances of anchors to members, (groups, anchors, members)."""
    rows = group.rows
    members = functional.embedding(rows.members, everyone)
    anchors = members if rows.anchors is rows.members else functional.embedding(rows.anchors, own)
    return pairwise_distance(anchors, members, group.others)


def total_loss(
    outputs: Outputs, batch: MiniBatch, noise: StepNoise, loss: LossSettings, *, conditions: int, collective: Collective
) -> LossTerms:
    """Return the loss of the global mini-batch (METHOD section 3), equal on all workers.

    Parameters
    ----------
    conditions
        C, the number of conditions of the cohort, not of the mini-batch.
    """
    quantised, labels, cells = outputs.quantised, outputs.labels, batch.cells
    all_means = collective.for_anchors(collective.all_gather_rows(outputs.mean))
    pairs = pair_losses(
        outputs.mean if collective.world > 1 else all_means, all_means,
        batch.x, collective.all_gather_rows(batch.x), labels, noise.keys, loss,
    )  # fmt: skip
    sums = [
        squared_error(batch.x, outputs.reconstruction).sum(),
        one_minus_cosine(batch.x, outputs.reconstruction).sum(),
        kl_to_standard_normal(outputs.mean, outputs.variance).sum(),
        commitment(quantised) / quantised.vectors.shape[2],
    ]
    summed = collective.loss_sum(torch.cat([torch.stack(sums), pairs]))
    error, cosine, kl, committed, *pair_sums = summed.unbind()
    correlation = correlation_penalty(outputs.mean, cells, collective)
    correlation = correlation + correlation_penalty(outputs.variance, cells, collective)
    of_books = [
        independence_condition(_learning(quantised, loss.condition_weight), labels),
        independence_batch(_learning(quantised, loss.batch_weight), labels),
        independence_batch_within(_learning(quantised, loss.independence_batch_within), labels),
        dependence(quantised, labels),
        committed / (cells * len(quantised.vectors)),
    ]
    of_books, (triplets, triplet_pairs, near) = _of_all(of_books, pair_sums, quantised, collective)
    of_condition, of_batch, of_batch_within, of_clusters, committed = of_books
    unweighted = Terms(
        reconstruction=error / cells, cosine=cosine / cells, kl=kl / cells + correlation,
        independence_condition=of_condition, independence_batch=of_batch, independence_batch_within=of_batch_within,
        dependence=of_clusters, triplet=triplets / triplet_pairs.clamp_min(1), neighbourhood=near,
        commitment=committed,
    )  # fmt: skip
    return weigh(unweighted, loss, conditions)


def _of_all(
    of_books: list[Tensor], pair_sums: list[Tensor], quantised: Quantised, collective: Collective
) -> tuple[list[Tensor], list[Tensor]]:
    """Combine means over codebooks and sums over anchors of all workers if each computed those of its own share."""
    share = len(quantised.vectors) / len(quantised.projections)
    if share == 1:
        return of_books, pair_sums
    parts = torch.cat([torch.stack(of_books) * share, torch.stack(pair_sums)])
    summed = collective.parts_sum(parts).unbind()
    return list(summed[: len(of_books)]), list(summed[len(of_books) :])


def _learning(quantised: Quantised, weight: float) -> Quantised:
    """Return the input of an information loss: a loss of weight 0 is only measured, so its input is detached."""
    return quantised if weight else replace(quantised, group_probs=quantised.group_probs.detach())


def weigh(terms: Terms, loss: LossSettings, conditions: int) -> LossTerms:
    """Weight the terms, clamp those that METHOD section 3 clamps, and add them up; dependence enters negatively."""
    weighted = Terms(
        reconstruction=loss.reconstruction * terms.reconstruction,
        cosine=loss.cosine * terms.cosine,
        kl=(loss.kl * terms.kl).clamp_max(loss.ceiling),
        independence_condition=(loss.condition_weight * terms.independence_condition).clamp_max(loss.ceiling),
        independence_batch=(loss.batch_weight * terms.independence_batch).clamp_max(loss.ceiling),
        independence_batch_within=(loss.independence_batch_within * terms.independence_batch_within).clamp_max(
            loss.ceiling
        ),
        dependence=-loss.dependence / conditions * terms.dependence,
        triplet=loss.triplet * terms.triplet,
        neighbourhood=loss.neighbourhood * terms.neighbourhood,
        commitment=loss.commitment * terms.commitment,
    )
    rebuilt = (weighted.reconstruction + weighted.cosine).clamp_max(loss.ceiling)
    rest = [getattr(weighted, field.name) for field in fields(weighted)[2:]]
    total = torch.stack([rebuilt, *rest]).sum().clamp_max(loss.ceiling)
    return LossTerms(total=total, unweighted=terms, weighted=weighted)
