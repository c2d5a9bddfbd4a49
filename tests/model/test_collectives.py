"""W workers compute the same loss, gradients, statistics and codebooks as one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import MiniBatch, labels_of
from ndreamer_dist.model.collectives import ByBooks, Collective, Distributed, Single, average_gradients
from ndreamer_dist.model.losses import total_loss
from ndreamer_dist.settings import NOISE_ROWS, LossSettings, ModelSettings
from tests.model.helpers import CONDITIONS, TINY, random_batch, share_of, tiny_network

CELLS, STEPS, RESET_AT = 300, 2, 1
SHARES = {
    2: {"uneven": (3, 2), "all_on_the_last": (0, 5)},
    4: {"uneven": (2, 1, 1, 1), "two_without_cells": (3, 0, 2, 0)},
}
Record = dict[str, torch.Tensor]
ONE_AT_A_TIME = threading.Lock()
"""Guards torch's global generator, which threads share."""


def train(blocks: tuple[int, ...], collective: Collective, model: ModelSettings = TINY) -> Record:
    """Take some steps with a code reset; return everything that must not depend on the number of workers."""
    with ONE_AT_A_TIME:
        network = tiny_network(model)
    record: Record = {}
    # Not AdamW, which would scale rounding errors of zero gradients up to whole steps.
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        batch = random_batch(CELLS, seed=step)
        if isinstance(collective, ByBooks):
            batch = replace(with_anchors(batch, blocks, collective.place[0]), step=step)
        else:
            batch = share_of(batch, blocks, collective.rank, step)
        noise = noises.draw(batch, model, 0)
        outputs = network(batch, noise, collective)
        terms = total_loss(outputs, batch, noise, LossSettings(), conditions=CONDITIONS, collective=collective)
        optimiser.zero_grad()
        terms.total.backward()
        quantised = outputs.quantised
        if isinstance(collective, ByBooks):
            quantised = network.quantiser.join(quantised, collective)
        else:
            average_gradients(network.parameters(), collective)
        record[f"{step} loss"] = terms.total.detach()
        record |= {f"{step} grad {name}": value.grad.clone() for name, value in network.named_parameters()}
        optimiser.step()
        network.quantiser.count_usage(quantised.usage, collective)
        if step == RESET_AT:
            reset = network.quantiser.reset(quantised.projections, collective, seed=0, step=step, below=0.5)
            record["reset"] = reset
    return record | {f"state {name}": value.clone() for name, value in network.state_dict().items()}


def with_anchors(batch: MiniBatch, blocks: tuple[int, ...], rank: int) -> MiniBatch:
    """Return the whole mini-batch for a worker that owns `blocks[rank]` of its blocks as anchors."""
    first = sum(blocks[:rank]) * NOISE_ROWS
    anchors = slice(first, min(first + blocks[rank] * NOISE_ROWS, batch.cells))
    codes = torch.cat([torch.stack([batch.condition, batch.group, batch.low, batch.high], 1), batch.batch], 1)
    return replace(batch, labels=labels_of(codes, slice(0, batch.cells), "cpu", anchors=anchors))


class InThreads(ByBooks):
    """Workers that share the codebooks, in threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, shown: dict[int, torch.Tensor]) -> None:
        self.place = (rank, barrier.parties)
        self._barrier, self._shown = barrier, shown

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._everyones(tensor))

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._everyones(tensor)).sum(0)

    def _everyones(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._barrier.wait(60)
        self._shown[self.place[0]] = tensor.detach().clone()
        self._barrier.wait(60)
        return [self._shown[rank] for rank in range(self.place[1])]


def train_in_threads(blocks: tuple[int, ...], model: ModelSettings) -> list[Record]:
    """Train with workers that share the codebooks, each in a thread; return the record of each."""
    barrier, shown = threading.Barrier(len(blocks)), dict[int, torch.Tensor]()
    with ThreadPoolExecutor(len(blocks)) as threads:
        return list(threads.map(lambda rank: train(blocks, InThreads(rank, barrier, shown), model), range(len(blocks))))


def gather_uneven(collective: Collective, rows: list[int]) -> Record:
    """Gather shares of unequal size, and compute the gradient of a loss that every worker computes from all rows."""
    own = torch.arange(rows[collective.rank], dtype=torch.float64) + 10 * collective.rank
    own.requires_grad_()
    everyone = collective.all_gather_rows(own[:, None])
    everyone.pow(2).sum().backward()
    integers = collective.all_gather_rows(torch.full((rows[collective.rank],), collective.rank))
    return {
        "rows": everyone.detach(),
        "integers": integers,
        "gradient": own.grad / collective.world,
        "own": own.detach(),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=max(SHARES))
    try:
        for world, cases in SHARES.items():
            books = {name: blocks for name, blocks in cases.items() if world <= TINY.codebooks}
            group = dist.new_group(list(range(world)))
            if rank < world:
                collective = Distributed(group)
                records: dict[str, Any] = {name: train(blocks, collective) for name, blocks in cases.items()}
                records |= {f"{name}_by_books": train(blocks, ByBooks(group)) for name, blocks in books.items()}
                records["gather"] = gather_uneven(collective, [3, 0, 1, 2][:world])
                torch.save(records, f"{folder}/{world}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the records of the workers, which are started once for all tests."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (str(folder),), nprocs=max(SHARES))
    return folder


@pytest.fixture(params=SHARES, ids="workers_{}".format)
def records(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Record]]:
    """The record of each worker."""
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> Record:
    return train((5,), Single())


@pytest.mark.slow
@pytest.mark.parametrize("case", range(2), ids=["share_0", "share_1"])
def test_any_number_of_workers_trains_as_one(records: list[dict[str, Record]], alone: Record, case: int) -> None:
    name = list(SHARES[len(records)])[case]
    assert 0 < alone["reset"] < alone["state quantiser.usage"].numel()
    for record in records:
        for layout in (name, f"{name}_by_books"):
            if layout in record:
                assert_alike(record[layout], alone)


def assert_alike(record: Record, alone: Record) -> None:
    """Compare the record of a worker with that of a single worker, up to rounding."""
    scale = {step: max(v.abs().max() for k, v in alone.items() if k.startswith(f"{step} grad")) for step in "12"}
    assert record.keys() == alone.keys()
    for key, expected in alone.items():
        # The tolerance is relative to the step's largest gradient: some gradients are 0 up to rounding.
        atol = 1e-10 * float(scale[key[0]]) if "grad" in key else 1e-12
        torch.testing.assert_close(record[key], expected, rtol=1e-10, atol=atol, msg=lambda m: f"{key}: {m}")  # noqa: B023


@pytest.mark.parametrize(("blocks", "codebooks"), [((3, 2), 3), ((1, 0, 2, 2), 5)], ids=str)
def test_workers_that_share_the_codebooks_train_as_one_and_with_the_same_bits(
    blocks: tuple[int, ...], codebooks: int
) -> None:
    model = TINY.model_copy(update={"codebooks": codebooks})
    alone, records = train((5,), Single(), model), train_in_threads(blocks, model)
    for record in records:
        assert_alike(record, alone)
        assert all(torch.equal(value, records[0][key]) for key, value in record.items())


@pytest.mark.slow
def test_workers_end_with_the_same_bits(records: list[dict[str, Record]]) -> None:
    for name in SHARES[len(records)]:
        for record in records[1:]:
            assert all(torch.equal(value, records[0][name][key]) for key, value in record[name].items())


@pytest.mark.slow
def test_uneven_rows_are_gathered_in_rank_order_with_their_gradient(records: list[dict[str, Record]]) -> None:
    gathered = [record["gather"] for record in records]
    expected = torch.cat([part["own"] for part in gathered])
    for part in gathered:
        assert torch.equal(part["rows"][:, 0], expected)
        assert torch.equal(part["integers"], (expected / 10).long())
        assert torch.equal(part["gradient"], 2 * part["own"])


def test_one_worker_needs_no_group() -> None:
    tensor = torch.randn(3)
    single = Single()
    assert single.all_sum(tensor) is single.loss_sum(tensor) is single.all_gather_rows(tensor) is tensor
