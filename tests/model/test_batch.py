"""Labels of the global mini-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ndreamer_dist.model.batch import gather_labels
from ndreamer_dist.model.collectives import Single
from tests.model.helpers import random_batch


def test_groups_know_their_condition_batch_and_cells() -> None:
    batch = random_batch(200)
    labels = gather_labels(batch, Single())
    assert torch.equal(labels.condition.row[labels.group], batch.condition)
    for merge, batch_codes in zip(labels.batches, batch.batch.unbind(1), strict=True):
        assert torch.equal(merge.row[labels.group], batch_codes)
    assert labels.group_cells.tolist() == [int((batch.group == group).sum()) for group in batch.group.unique()]


def test_every_cell_is_in_the_rows_of_its_group_and_clusters() -> None:
    batch = random_batch(200)
    segments = gather_labels(batch, Single()).segments
    assert segments.row_cells.sum() == 400
    for half, label in enumerate((batch.low, batch.high)):
        row = segments.rows_of_cell[:, half]
        same_row = row[:, None] == row
        same_pair = (batch.group[:, None] == batch.group) & (label[:, None] == label)
        assert torch.equal(same_row, same_pair)
        assert torch.equal(segments.row_group[row], segments.rows_of_cell[:, 2] - segments.rows)


@pytest.mark.parametrize("change", [{"cells": 201}, {"first_block": 1}], ids=str)
def test_shares_that_do_not_make_up_the_mini_batch_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="whole blocks of 64"):
        gather_labels(replace(random_batch(200), **change), Single())
