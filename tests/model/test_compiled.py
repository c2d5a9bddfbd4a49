"""Compiled layers compute the same, and where they cannot be compiled the plain ones go on."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from torch import Tensor

from ndreamer_dist.model import noise as noises
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.model.compiled import compile_layers, or_plain
from ndreamer_dist.model.losses import total_loss
from ndreamer_dist.model.network import NDreamerNetwork
from ndreamer_dist.settings import LossSettings
from tests.model.helpers import CONDITIONS, TINY, close, random_batch, tiny_network

LOG = "ndreamer_dist.model.compiled"


@pytest.fixture(autouse=True)
def forget_compilations() -> None:
    torch._dynamo.reset()


def loss_and_gradients(network: NDreamerNetwork, batch: MiniBatch) -> list[Tensor]:
    noise = noises.draw(batch, TINY, 0)
    terms = total_loss(
        network(batch, noise, Single()), batch, noise, LossSettings(), conditions=CONDITIONS, collective=Single()
    )  # fmt: skip
    return [terms.total, *torch.autograd.grad(terms.total, list(network.parameters()))]


class TwoWorkers(Single):
    world = 2


def test_without_a_compiler_training_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/compiler/here",))
    monkeypatch.setattr(torch._inductor.config, "fx_graph_cache", False)
    batch, plain, network = random_batch(150), tiny_network(), tiny_network()
    compile_layers(network, Single())
    with caplog.at_level(logging.WARNING, LOG):
        found = loss_and_gradients(network, batch)
        again = loss_and_gradients(network, batch)
    expected = loss_and_gradients(plain, batch)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert all(torch.equal(left, right) for left, right in zip(again, expected, strict=True))
    told = [record.getMessage() for record in caplog.records if record.name == LOG]
    assert [line.split(" ")[0] for line in told] == ["encoder", "head", "decoder"]
    assert all("goes on without" in line for line in told)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_layer_computes_what_the_plain_one_does() -> None:
    head = tiny_network().head
    q = torch.randn(20, head.merge.in_features, dtype=torch.float64)
    fast = or_plain(torch.compile(head.forward), head.forward, "head")
    for left, right in zip(fast(q, Single()), head(q, Single()), strict=True):
        close(left, right.detach(), rtol=1e-9)


def test_an_error_of_the_layer_itself_is_not_hidden() -> None:
    def wrong() -> None:
        msg = "shapes do not fit"
        raise ValueError(msg)

    with pytest.raises(ValueError, match="do not fit"):
        or_plain(wrong, lambda: None, "layer")()


def test_several_workers_train_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    network = tiny_network()
    with caplog.at_level(logging.WARNING, LOG):
        compile_layers(network, TwoWorkers())
    assert "2 workers train without it" in caplog.text
    assert "forward" not in vars(network.encoder)
