"""The losses (METHOD section 3), each over the global mini-batch, whatever part of it this worker holds.

The first half are pure functions of tensors. `total_loss` puts them together: sums over cells run over own cells and
are added over workers; the losses inside groups take own cells as anchors and everyone's cells as neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ndreamer_dist.model.batch import Labels, MiniBatch
from ndreamer_dist.model.codebooks import LOG_FLOOR, Quantised
from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.network import Outputs
from ndreamer_dist.model.noise import StepNoise
from ndreamer_dist.settings import LossSettings

NORM_FLOOR = 1e-12
VARIANCE_FLOOR = 1e-8
NO_ENTROPY = 1e-8
"""Entropies whose sum is below this are those of one label and one code, which the 1e-10 leaves not quite 0."""
DIRECT_BELOW = 1e-3
"""Squared distances below this share of the squared norms lose digits in the product form; they are taken directly."""
SAME_WITHIN = 1e-5
"""Distances below this share of the norms count as 0."""
DIRECT_PAIRS = 16_384
"""Pairs of cells whose difference is held at a time."""


@dataclass(frozen=True)
class Terms:
    """One value per loss; 0-dimensional tensors, the same on every worker."""

    reconstruction: Tensor
    cosine: Tensor
    kl: Tensor
    independence: Tensor
    dependence: Tensor
    triplet: Tensor
    neighbourhood: Tensor
    commitment: Tensor

    def as_floats(self) -> dict[str, float]:
        """Return name and value of each term, for logs."""
        return {field.name: float(getattr(self, field.name).detach()) for field in fields(self)}


@dataclass(frozen=True)
class LossTerms:
    """The total, which is what to differentiate, and its terms as METHOD defines them and as they were weighted."""

    total: Tensor
    unweighted: Terms
    weighted: Terms


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return each cell's mean squared error over genes, (cells,)."""
    return (x - reconstruction).square().mean(1)


def one_minus_cosine(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return 1 - cosine(x, reconstruction) of each cell, (cells,); norms are at least 1e-12."""
    norms = [torch.linalg.vector_norm(side, dim=1).clamp_min(NORM_FLOOR) for side in (x, reconstruction)]
    return 1 - (x * reconstruction).sum(1) / (norms[0] * norms[1])


def kl_to_standard_normal(mean: Tensor, variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, I)) of each cell, (cells,)."""
    return 0.5 * (variance + mean.square() - 1 - variance.log()).sum(1)


def correlation_penalty(values: Tensor, cells: int, collective: Collective) -> Tensor:
    """Return the mean squared entry of (correlation matrix - I) of own rows of values, (own cells, z).

    Normalised by n - 1; 1e-8 is added to each variance. Of one cell all covariances are 0.
    """
    # The covariance does not change with the centre to first order, so the centre needs no gradient.
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
    """Return `2 (H_A + H_B - H_AB) / (H_A + H_B)`, and 0 where there is one label and one code."""
    apart = of_label + of_code
    defined = apart > NO_ENTROPY
    return torch.where(defined, 2 * (apart - of_both) / torch.where(defined, apart, 1), 0)


def nmi(joint: Tensor) -> Tensor:
    """Return the normalised mutual information of joint tables, (..., labels, codes), of any positive sum."""
    probs = joint / joint.sum((-1, -2), keepdim=True)
    return nmi_from_entropies(entropy(probs.sum(-1)), entropy(probs.sum(-2)), entropy(probs.flatten(-2)))


def independence(quantised: Quantised, labels: Labels) -> Tensor:
    """Return the information of the codes about the condition and about each batch covariate, added."""
    kinds = [labels.group_condition, *labels.group_batch.unbind(1)]
    return torch.stack([nmi(_merge_groups(quantised.group_probs, kind)).mean() for kind in kinds]).sum()


def dependence(quantised: Quantised, labels: Labels) -> Tensor:
    """Return the information of the codes about the low, and the high, cluster inside groups, mean over groups, added.

    A group with one label, or of one cell, counts as 0.
    """
    segments, dtype = labels.segments, quantised.group_probs.dtype
    groups = len(labels.group_cells)
    of_code = entropy(quantised.group_probs / labels.group_cells.to(dtype)[:, None])
    shares = segments.row_cells / labels.group_cells[segments.row_group]
    row_terms = torch.cat([(shares * (shares + LOG_FLOOR).log()).to(dtype)[None], quantised.negentropy])
    total = of_code.new_zeros(())
    for half in (slice(segments.low_rows), slice(segments.low_rows, None)):
        sums = row_terms.new_zeros((len(row_terms), groups))
        entropies = -sums.index_add(1, segments.row_group[half], row_terms[:, half])
        total = total + nmi_from_entropies(entropies[0], of_code, entropies[1:]).mean()
    return total


def _merge_groups(group_probs: Tensor, label: Tensor) -> Tensor:
    """Sum (codebooks, groups, codes) over the groups of equal label: (codebooks, labels, codes)."""
    names, row = torch.unique(label, return_inverse=True)
    shape = (len(group_probs), len(names), group_probs.shape[2])
    return group_probs.new_zeros(shape).index_add(1, row, group_probs)


def commitment(quantised: Quantised) -> Tensor:
    """Return `sum((sg(q) - e*)^2) + 0.25 sum((q - sg(e*))^2)` over codebooks, own cells and dimensions."""
    q, nearest = quantised.vectors, quantised.nearest
    return (q.detach() - nearest).square().sum() + 0.25 * (q - nearest.detach()).square().sum()


def triplet(squared: Tensor, positive: Tensor, negative: Tensor, keys: Tensor, *, pairs: int, margin: float) -> Tensor:
    """Return the sum of `ReLU(||a-p||^2 - ||a-n||^2 + margin)` and the number of its terms, (2,).

    Each anchor takes `m = min(pairs, positives, negatives)` of each, those of smallest key, paired in that order.

    Parameters
    ----------
    squared, positive, negative, keys
        (anchors, candidates): squared distances, who is a positive and who a negative, random numbers in [0, 1).
    """
    m = torch.minimum(positive.sum(1), negative.sum(1)).clamp_max(pairs)
    taken = torch.arange(min(pairs, squared.shape[1]), device=squared.device) < m[:, None]
    picked = [
        squared.gather(1, torch.where(among, keys, 2).topk(taken.shape[1], largest=False).indices)
        for among in (positive, negative)
    ]
    terms = functional.relu(picked[0] - picked[1] + margin) * taken
    return torch.stack([terms.sum(), m.sum().to(terms.dtype)])


def neighbourhood(
    expression: Tensor,
    embedding: Tensor,
    itself: Tensor,
    crosses: Tensor,
    *,
    neighbours: int,
    sigma: float,
    across: float,
) -> Tensor:
    """Return, per anchor, the sum over its neighbours of `((P - Q) * weight)^2`, (anchors,).

    Parameters
    ----------
    expression, embedding
        Distances of anchors to the cells of their group, (anchors, cells).
    itself, crosses
        (anchors, cells): where a cell meets itself, and which pairs cross clusters.
    neighbours
        k; the k + 1 nearest by either distance are compared.
    """
    others = expression.shape[1] - 1
    if others < 1:
        return embedding.sum(1) * 0
    count = min(min(others, neighbours) + 1, others)
    near = nearest_mask(expression, itself, count) | nearest_mask(embedding.detach(), itself, count)
    p = (-expression / sigma).masked_fill(~near, -torch.inf).softmax(1)
    q = (-embedding).masked_fill(~near, -torch.inf).softmax(1)
    return ((p - q) * (1 + across * crosses)).square().sum(1)


def nearest_mask(distance: Tensor, itself: Tensor, count: int) -> Tensor:
    """Mark the `count` nearest of each row, itself left out; of equals, and of nearly equals, the first.

    Copies of a cell are ordinary, and rounding must not choose among them: distances are cut to 32 significant bits
    (16 in single precision) and the column number is put in the bits below.
    """
    bits = 20 if distance.dtype == torch.float64 else 8
    scaled = distance * (2**bits + 1)
    coarse = (scaled - (scaled - distance)).double()
    column = torch.arange(distance.shape[1], dtype=torch.float64, device=distance.device)
    ranked = ((coarse + 1e-300) * (1 + column * 2.0**-48)).masked_fill(itself, torch.inf)
    return torch.zeros_like(itself).scatter_(1, ranked.topk(count, largest=False).indices, True)


class Distance(torch.autograd.Function):
    """Euclidean distances of rows a, (m, d), to rows b, (n, d); the gradient of a distance of 0 is 0.

    Cells with the same codes have the same embedding but for rounding and traces of other codes. The direction
    between them is noise, of full weight in the gradient and different on other hardware, so they count as equal.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances, by a product of the centred rows, and directly where that loses digits."""
        same = SAME_WITHIN**2 * (a.square().sum(1)[:, None] + b.square().sum(1))
        centre = b.mean(0)
        a, b = a - centre, b - centre
        scale = a.square().sum(1)[:, None] + b.square().sum(1)
        squared = torch.addmm(scale, a, b.T, alpha=-2)
        rows, columns = (squared < DIRECT_BELOW * scale).nonzero(as_tuple=True)
        for pair in zip(rows.split(DIRECT_PAIRS), columns.split(DIRECT_PAIRS), strict=True):
            squared[pair] = (a[pair[0]] - b[pair[1]]).square().sum(1)
        distance = squared.masked_fill_(squared <= same, 0).sqrt_()
        ctx.save_for_backward(a, b, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of a and b."""
        a, b, distance = ctx.saved_tensors
        weight = torch.where(distance > 0, gradients[0] / distance, 0)
        d_a = torch.addmm(weight.sum(1)[:, None] * a, weight, b, alpha=-1)
        d_b = torch.addmm(weight.sum(0)[:, None] * b, weight.T, a, alpha=-1)
        return d_a, d_b


def pairwise_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return Euclidean distances, (m, n), of rows a, (m, d), to rows b, (n, d)."""
    distance: Tensor = Distance.apply(a, b)
    return distance


@dataclass(frozen=True)
class GroupCells:
    """One group of the mini-batch: its own cells that are anchors here, and all its cells.

    Attributes
    ----------
    anchors, members
        Rows of the anchors among own cells, (anchors,), and of the members among all cells, (members,).
    itself, same_low, same_high, crosses
        (anchors, members): where a cell meets itself, label equality, and the published test of crossing clusters.
    """

    anchors: Tensor
    members: Tensor
    itself: Tensor
    same_low: Tensor
    same_high: Tensor
    crosses: Tensor


def groups_of(labels: Labels, cross_cluster: str) -> Iterator[GroupCells]:
    """Yield the groups of the mini-batch in which this worker has a cell (METHOD sections 3 and 8 on crossing)."""
    mine = labels.group[labels.mine]
    for group in torch.unique(mine).tolist():
        anchors = (mine == group).nonzero().squeeze(1)
        members = (labels.group == group).nonzero().squeeze(1)
        at = anchors + labels.first
        low, high = labels.low[at, None], labels.high[at, None]
        same_low, same_high = low == labels.low[members], high == labels.high[members]
        across_high = low != labels.high[members] if cross_cluster == "published" else ~same_high
        yield GroupCells(anchors, members, at[:, None] == members, same_low, same_high, ~same_low | across_high)


def pair_losses(
    mean: Tensor, all_means: Tensor, x: Tensor, all_x: Tensor, labels: Labels, keys: Tensor, loss: LossSettings
) -> Tensor:
    """Return, over own anchors, the triplet sum, its number of pairs, and the neighbourhood term, (3,)."""
    # An empty slice ties the result to everyone's means on every worker, so that all take part in its backward sum.
    total = torch.stack([all_means[:0].sum()] * 3)
    groups = len(labels.group_cells)
    for group in groups_of(labels, loss.cross_cluster):
        apart = pairwise_distance(mean[group.anchors], all_means[group.members])
        apart_x = pairwise_distance(x[group.anchors], all_x[group.members])
        pairs = triplet(
            apart.square(), group.same_low & group.same_high & ~group.itself, ~group.same_low & ~group.same_high,
            keys[group.anchors[:, None], group.members], pairs=loss.triplet_pairs, margin=loss.margin,
        )  # fmt: skip
        near = neighbourhood(
            apart_x, apart, group.itself, group.crosses,
            neighbours=loss.neighbours, sigma=loss.sigma, across=loss.across,
        )  # fmt: skip
        total = total + torch.cat([pairs, near.sum()[None] / (len(group.members) * groups)])
    return total


def total_loss(
    outputs: Outputs, batch: MiniBatch, noise: StepNoise, loss: LossSettings, *, conditions: int, collective: Collective
) -> LossTerms:
    """Return the loss of the global mini-batch (METHOD section 3), the same on every worker.

    Parameters
    ----------
    conditions
        C, conditions of the cohort, whichever of them are in the mini-batch.
    """
    quantised, cells = outputs.quantised, batch.cells
    pairs = pair_losses(
        outputs.mean, collective.all_gather_rows(outputs.mean),
        batch.x, collective.all_gather_rows(batch.x), outputs.labels, noise.keys, loss,
    )  # fmt: skip
    sums = [
        squared_error(batch.x, outputs.reconstruction).sum(),
        one_minus_cosine(batch.x, outputs.reconstruction).sum(),
        kl_to_standard_normal(outputs.mean, outputs.variance).sum(),
        commitment(quantised) / quantised.vectors.shape[2],
    ]
    summed = collective.loss_sum(torch.cat([torch.stack(sums), pairs]))
    error, cosine, kl, committed, triplets, triplet_pairs, near = summed.unbind()
    correlation = correlation_penalty(outputs.mean, cells, collective)
    correlation = correlation + correlation_penalty(outputs.variance, cells, collective)
    unweighted = Terms(
        reconstruction=error / cells,
        cosine=cosine / cells,
        kl=kl / cells + correlation,
        independence=independence(quantised, outputs.labels),
        dependence=dependence(quantised, outputs.labels),
        triplet=triplets / triplet_pairs.clamp_min(1),
        neighbourhood=near,
        commitment=committed / (cells * len(quantised.vectors)),
    )
    return weigh(unweighted, loss, conditions)


def weigh(terms: Terms, loss: LossSettings, conditions: int) -> LossTerms:
    """Weigh the terms, clamp those that METHOD clamps, and add them up; what is maximised enters negatively."""
    weighted = Terms(
        reconstruction=loss.reconstruction * terms.reconstruction,
        cosine=loss.cosine * terms.cosine,
        kl=(loss.kl * terms.kl).clamp_max(loss.ceiling),
        independence=(loss.independence * terms.independence).clamp_max(loss.ceiling),
        dependence=-loss.dependence / conditions * terms.dependence,
        triplet=loss.triplet * terms.triplet,
        neighbourhood=loss.neighbourhood * terms.neighbourhood,
        commitment=loss.commitment * terms.commitment,
    )
    rebuilt = (weighted.reconstruction + weighted.cosine).clamp_max(loss.ceiling)
    rest = [getattr(weighted, field.name) for field in fields(weighted)[2:]]
    total = torch.stack([rebuilt, *rest]).sum().clamp_max(loss.ceiling)
    return LossTerms(total=total, unweighted=terms, weighted=weighted)
