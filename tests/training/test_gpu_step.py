"""A step on a double of a GPU: one copy to the device, no wait of the host, and the same numbers as on the CPU."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import sparse
from torch import Tensor

from ndreamer_dist.model import noise
from ndreamer_dist.model.batch import MiniBatch, gather_labels, tensors_of
from ndreamer_dist.model.collectives import ByBooks, Collective, Distributed, Single
from ndreamer_dist.model.transfer import of_csr, room
from ndreamer_dist.settings import ModelSettings, Settings
from ndreamer_dist.training import loop
from ndreamer_dist.training.densify import Resident, densify, resident_batches, sizes_ahead
from ndreamer_dist.training.loop import Measured, TrainingError, TrainState, training_step
from ndreamer_dist.training.model_file import TrainedModel
from ndreamer_dist.training.trainer import collectives_of, resident_matrix
from ndreamer_dist.training.windows import Share, read_window, windows
from tests.double import CUDA, Device, OnDevice, moved, pretended
from tests.training.helpers import OVERRIDES, SETTINGS, Cohort, fresh, weights

MOST_OPERATIONS = 1001
"""Largest number of device operations of a step, for any sizes; lower it with every fusion."""
MOST_OF_A_TILE = 60
"""Largest number of device operations to embed a tile of cells."""
MOST_MORE_RESIDENT = 20
"""Largest number of additional operations that gather rows of a resident matrix."""
MOST_COLLECTIVES = 6
"""Largest number of collectives in a step of several workers."""
MOST_EXCHANGED = 10e6
"""Largest number of bytes that they exchange in a step of the `paper` preset."""


ALONE = Single()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with pretended(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def shares(cohort: Cohort, place: tuple[int, int] = (0, 1)) -> Iterator[Share]:
    for steps in windows(cohort.plan, 0):
        yield from read_window(cohort.packed, cohort.plan, steps, *place)


def stepped(
    cohort: Cohort,
    steps: int,
    collective: Collective = ALONE,
    place: tuple[int, int] = (0, 1),
    mini_batches: Iterator[Share] | None = None,
) -> tuple[list[Device], TrainState]:
    """Train on the double, by default on streamed mini-batches; return the counts of each step, and the state."""
    state, seen = fresh(), list[Device]()
    state.network, state.optimiser = on_double(state)
    state.network.train()
    for share, _ in zip(mini_batches or shares(cohort), range(steps), strict=False):
        with Device() as device:
            batch = densify(share, cohort.labels, cohort.plan, place, CUDA)
            device.began, device.sizes = len(device.order), sizes_of(batch)
            terms, quantised = training_step(state, batch, SETTINGS, collective)
            state.unread.append(
                Measured.of(batch, terms, quantised, collective, started=time.perf_counter(), waited=0.0)
            )
            state.catch_up(but=1)
        seen.append(device)
    state.catch_up()
    return seen, state


def sizes_of(batch: MiniBatch) -> tuple[int, ...]:
    labels = batch.labels
    assert labels is not None
    sums = [merge.sums for merge in (labels.condition, *labels.batches, *(nested.pairs for nested in labels.within))]
    members = [size for rows in labels.rows for size in rows.members.shape]
    return (batch.cells, len(labels.group_cells), *members, *sums, batch.step % 5 == 0)


def on_double(state: TrainState) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    network = moved(state.network)
    return network, torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01, fused=True)


def test_a_step_on_a_gpu_waits_for_nothing_and_what_it_needs_comes_in_one_copy(cohort: Cohort) -> None:
    seen, _ = stepped(cohort, 6)  # the fifth resets codes, and sends the row numbers of their replacements
    for step, device in enumerate(seen, start=1):
        resets = int(step == 5)
        assert device.waits == []
        assert device.mixed == []
        assert len(device.copied("in")) == 1 + resets
        assert len(device.copied("out")) == 1  # the losses, read one step later
        if step > 1:  # the first step also creates the optimiser's moments
            assert sum(device.operations.values()) <= MOST_OPERATIONS + 20 * resets


def test_two_steps_of_one_size_are_the_same_operations_on_the_same_shapes(cohort: Cohort) -> None:
    """A CUDA graph requires it of mini-batches with the same numbers of cells, groups, conditions and batches."""
    seen, _ = stepped(cohort, 9)
    by_size: dict[tuple[int, ...], list[list[tuple]]] = {}
    for device in seen[1:]:
        by_size.setdefault(device.sizes, []).append(device.order[device.began :])
    assert max(map(len, by_size.values())) > 1
    for orders in by_size.values():
        assert all(order == orders[0] for order in orders)


def test_a_training_on_a_gpu_measures_what_one_on_the_processor_does(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, on_gpu = stepped(cohort, 4)
    monkeypatch.setattr(noise, "draw", noise.draw_on_device)
    state = fresh()
    loop.train(state, cohort.batches(last=4), SETTINGS, Single())
    for ours, theirs in zip(on_gpu.measures, state.measures, strict=True):
        timed = {"seconds", "cells_per_second", "waiting"}
        assert {k: v for k, v in ours.items() if k not in timed} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in timed}, rel=2e-4, abs=1e-5
        )


def test_a_matrix_that_stays_on_the_gpu_gives_the_same_bits_and_row_numbers_are_all_that_travels_of_it(
    cohort: Cohort,
) -> None:
    with Device():
        kept = Resident.of(cohort.packed, CUDA, 10**9)
    assert kept is not None
    asked = (Share(step, cohort.plan.share_rows(step, 0, 1), kept) for step in range(2))
    (seen, state), (streamed, known) = stepped(cohort, 2, mini_batches=asked), stepped(cohort, 2)
    assert [row["total"] for row in state.measures] == [row["total"] for row in known.measures]
    assert all(torch.equal(a.inner, b.inner) for a, b in zip(weights(state), weights(known), strict=True))
    for device, before, share in zip(seen, streamed, shares(cohort), strict=False):
        assert (device.waits, device.mixed) == ([], [])
        (sent,), (whole,) = device.copied("in"), before.copied("in")
        assert whole - sent == sum(map(room, of_csr(share.x))) - sum(map(room, kept.places(share.rows)))
        assert sum(device.operations.values()) <= sum(before.operations.values()) + MOST_MORE_RESIDENT


def test_a_matrix_stays_on_a_gpu_where_half_of_its_free_memory_holds_it(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = sum(cohort.packed.block(block).nnz for block in range(cohort.packed.n_blocks))
    free = [2 * 6 * values]  # a value is a float32 and the int16 of its gene
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], 10**12))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    with Device():
        kept = resident_matrix(SETTINGS, cohort.packed, CUDA)
        assert kept is not None
        assert kept.nbytes == 6 * values
        free[0] -= 2
        assert resident_matrix(SETTINGS, cohort.packed, CUDA) is None
        assert resident_matrix(SETTINGS, cohort.packed, torch.device("cpu")) is None
        free[0] += 2
        never = Settings.build(preset="small", overrides=OVERRIDES | {"train.resident": False})
        assert resident_matrix(never, cohort.packed, CUDA) is None


def travelled(batch: MiniBatch) -> list[Any]:
    assert batch.labels is not None
    return [batch.key, batch.condition, batch.batch, *tensors_of(batch.labels)]


def test_mini_batches_of_a_resident_matrix_are_those_that_are_streamed(cohort: Cohort) -> None:
    with Device():
        kept = Resident.of(cohort.packed, CUDA, 10**9)
        assert kept is not None
        least = sizes_ahead(cohort.labels, cohort.plan)
        for place in ((0, 1), (1, 2)):
            ours = resident_batches(kept, cohort.labels, cohort.plan, place, 3)
            for batch, share in zip(ours, itertools.islice(shares(cohort), 3, None), strict=True):
                known = densify(share, cohort.labels, cohort.plan, place, CUDA, least)
                assert torch.equal(batch.x.inner, known.x.inner)
                assert (batch.step, batch.cells) == (known.step, known.cells)
                for one, other in zip(travelled(batch), travelled(known), strict=True):
                    assert torch.equal(one.inner, other.inner)


class Twins(ByBooks):
    """A worker whose peers have the same tensors; it records the bytes exchanged."""

    def __init__(self, workers: int) -> None:
        self.place, self.exchanged = (0, workers), list[int]()

    def gathered(self, tensor: Tensor) -> Tensor:
        everyone = torch.cat([tensor] * self.place[1])
        self.exchanged.append(everyone.nbytes)
        return everyone

    def summed(self, tensor: Tensor) -> Tensor:
        self.exchanged.append(tensor.nbytes)
        return tensor * self.place[1]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_on_gpus_wait_for_nothing_and_exchange_little(cohort: Cohort, workers: int) -> None:
    twins = Twins(workers)
    seen, _ = stepped(cohort, 2, twins, (0, workers))
    assert [device.waits for device in seen] == [[], []]
    assert [device.mixed for device in seen] == [[], []]
    assert len(twins.exchanged) == 2 * MOST_COLLECTIVES
    cells, (model, paper) = cohort.plan.cells(0), (SETTINGS.model, Settings.build(preset="paper"))
    # Vectors of the cells and their gradient, the gradient of the means, gradient and usage of the codes, a few
    # scalars.
    assert sum(twins.exchanged) / 2 <= exchanged(cells, model) + 1000
    assert exchanged(2 * paper.train.batch_size, paper.model) + 1000 <= MOST_EXCHANGED


class Drifting(Twins):
    """A worker with a peer whose GPU rounds differently, so that its loss differs in the last bits."""

    def joined(self, tensor: Tensor, count: int) -> Tensor:
        everyone = super().joined(tensor, count)
        if everyone.dim() == 2 and everyone.shape[1] == 2:  # the perplexities and the total loss
            everyone[count // 2 :, 1] *= 1 + 2.0**-40
        return everyone


def test_workers_whose_gpus_do_not_compute_alike_end_the_training(cohort: Cohort) -> None:
    with pytest.raises(TrainingError, match=r"GPUs do not compute alike: at step 1 .*--workers 1"):
        stepped(cohort, 2, Drifting(2), (0, 2))


@pytest.mark.parametrize(
    ("workers", "device", "kind"),
    [(1, "cpu", Single), (1, "cuda", Single), (2, "cpu", Distributed), (2, "cuda", ByBooks)],
)
def test_workers_share_codebooks_on_gpus_and_cells_elsewhere(
    tmp_path: Path, workers: int, device: str, kind: type
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        together, collective = collectives_of(workers, device)
    finally:
        dist.destroy_process_group()
    assert type(collective) is kind
    assert type(together) is (Distributed if workers > 1 else Single)  # agrees on checkpoints


def exchanged(cells: int, model: ModelSettings) -> int:
    """Return the bytes of a step's large collectives."""
    vectors = model.codebooks * model.code_dim
    return 4 * (cells * (2 * vectors + model.latent) + model.codebooks * model.codes * (model.code_dim + 1))


@pytest.mark.parametrize("place", [(0, 1), (0, 2), (1, 2)], ids=str)
def test_labels_that_are_found_ahead_are_those_that_workers_would_gather(
    cohort: Cohort, place: tuple[int, int]
) -> None:
    share = next(shares(cohort))
    with Device():
        ahead = densify(share, cohort.labels, cohort.plan, place, CUDA)
    whole = densify(share, cohort.labels, cohort.plan, (0, 1), "cpu")
    gathered = gather_labels(whole, Single())
    assert ahead.labels is not None
    assert torch.equal(ahead.labels.group, gathered.group)
    assert torch.equal(ahead.x.inner, whole.x)
    assert ahead.labels.mine == slice(0, len(whole.x))
    cells = ahead.labels.segments.row_cells.inner
    assert torch.equal(cells[cells > 0], gathered.segments.row_cells)
    anchors = torch.cat([rows.anchors.inner[rows.is_anchor.inner] for rows in ahead.labels.rows])
    half = len(whole.x) // place[1]
    assert torch.equal(anchors.sort().values, torch.arange(place[0] * half, (place[0] + 1) * half))


def test_padding_changes_no_loss(cohort: Cohort) -> None:
    """Labels padded as for a GPU give the same losses on the CPU, up to rounding."""
    batch = next(cohort.batches())
    with Device():
        there = densify(next(shares(cohort)), cohort.labels, cohort.plan, (0, 1), CUDA)
    assert there.labels is not None
    padded = there.labels.moved(lambda part: part.inner if isinstance(part, OnDevice) else part)
    assert len(padded.segments.row_cells) % 256 == 0
    found = [losses_of(each) for each in (batch, replace(batch, labels=padded))]
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


def losses_of(batch: MiniBatch) -> dict[str, float]:
    state = fresh()
    state.network.train()
    return training_step(state, batch, SETTINGS, Single())[0].as_floats()


def test_embedding_a_tile_is_few_operations_and_the_values_of_the_processor(cohort: Cohort) -> None:
    network = fresh().network.eval()
    x = sparse.random(90, 40, density=0.3, format="csr", dtype="float32", random_state=0)
    known = TrainedModel(network, (), (), ()).embed(x, 64)
    with Device() as device:
        found = TrainedModel(moved(network), (), (), ()).embed(x, 64)
    assert found == pytest.approx(known, abs=1e-5)
    assert device.mixed == []
    assert sum(device.operations.values()) <= 2 * MOST_OF_A_TILE


def test_noise_of_a_gpu_is_made_of_whole_numbers_that_every_device_computes_alike() -> None:
    """Compare with the first published numbers of SplitMix64 for seed 1234567."""
    places = torch.arange(1, 4)
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    high, low = noise.uniforms(places, 1234567).view(-1, 2).unbind(-1)
    assert (high * 2**24).tolist() == [each >> 40 for each in known]
    assert (low * 2**24).tolist() == [(each >> 8) & (2**24 - 1) for each in known]


def test_noise_of_a_gpu_has_the_distributions_that_it_is_named_after() -> None:
    cells = 640
    none = torch.zeros(cells, dtype=torch.int64)
    batch = MiniBatch(torch.zeros(cells, 1), none, none[:, None], none, none, none, 0, 1, cells)
    drawn = noise.draw_on_device(batch, SETTINGS.model, 0)
    moments = {"exponentials": (1, 1), "marks": (0.5, 1 / 12**0.5), "latent": (0, 1), "keys": (0.5, 1 / 12**0.5)}
    for name in (field.name for field in fields(drawn)):
        values: Tensor = getattr(drawn, name).double()
        mean, spread = moments[name]
        assert float(values.mean()) == pytest.approx(mean, abs=5 * spread / values.numel() ** 0.5)
        assert float(values.std()) == pytest.approx(spread, rel=0.03)
