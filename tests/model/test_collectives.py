"""W workers compute the loss, gradients, statistics and codebooks of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.collectives import Collective, Distributed, Single, average_gradients
from ndreamer_dist.model.losses import total_loss
from ndreamer_dist.settings import LossSettings
from tests.model.helpers import CONDITIONS, TINY, random_batch, share_of, tiny_network

CELLS, STEPS, RESET_AT = 300, 2, 1
SHARES = {
    2: {"uneven": (3, 2), "all_on_the_last": (0, 5)},
    4: {"uneven": (2, 1, 1, 1), "two_without_cells": (3, 0, 2, 0)},
}
Record = dict[str, torch.Tensor]


def train(blocks: tuple[int, ...], collective: Collective) -> Record:
    """Take some steps, a code reset among them, and return all that must not depend on the number of workers."""
    network, record = tiny_network(), {}
    # Not AdamW: it would scale the rounding of gradients that are 0 up to whole steps.
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        batch = share_of(random_batch(CELLS, seed=step), blocks, collective.rank, step)
        noise = noises.draw(batch, TINY, 0)
        outputs = network(batch, noise, collective)
        terms = total_loss(outputs, batch, noise, LossSettings(), conditions=CONDITIONS, collective=collective)
        optimiser.zero_grad()
        terms.total.backward()
        average_gradients(network.parameters(), collective)
        record[f"{step} loss"] = terms.total.detach()
        record |= {f"{step} grad {name}": value.grad.clone() for name, value in network.named_parameters()}
        optimiser.step()
        network.quantiser.count_usage(outputs.quantised.usage, collective)
        if step == RESET_AT:
            reset = network.quantiser.reset(outputs.quantised.projections, collective, seed=0, step=step, below=0.5)
            record["reset"] = reset
    return record | {f"state {name}": value.clone() for name, value in network.state_dict().items()}


def gather_uneven(collective: Collective, rows: list[int]) -> Record:
    """Gather unequal shares, and the gradient of a loss that every worker computes from all rows."""
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
            group = dist.new_group(list(range(world)))
            if rank < world:
                collective = Distributed(group)
                records: dict[str, Any] = {name: train(blocks, collective) for name, blocks in cases.items()}
                records["gather"] = gather_uneven(collective, [3, 0, 1, 2][:world])
                torch.save(records, f"{folder}/{world}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers, started once for all tests, wrote their records."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, (str(folder),), nprocs=max(SHARES))
    return folder


@pytest.fixture(params=SHARES, ids="workers_{}".format)
def records(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Record]]:
    """What each of the workers recorded."""
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> Record:
    return train((5,), Single())


@pytest.mark.slow
@pytest.mark.parametrize("case", range(2), ids=["share_0", "share_1"])
def test_any_number_of_workers_trains_as_one(records: list[dict[str, Record]], alone: Record, case: int) -> None:
    name = list(SHARES[len(records)])[case]
    assert 0 < alone["reset"] < alone["state quantiser.usage"].numel()
    scale = {step: max(v.abs().max() for k, v in alone.items() if k.startswith(f"{step} grad")) for step in "12"}
    for record in records:
        assert record[name].keys() == alone.keys()
        for key, expected in alone.items():
            # Gradients that are 0 but for rounding are compared with the step's largest.
            atol = 1e-10 * float(scale[key[0]]) if "grad" in key else 1e-12
            torch.testing.assert_close(record[name][key], expected, rtol=1e-10, atol=atol, msg=lambda m: f"{key}: {m}")  # noqa: B023


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
