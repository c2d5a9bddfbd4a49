"""The network's layers under `torch.compile`, with the plain layers as the way back.

In goes a network, whose encoder, head and decoder are compiled at their next call; what they compute stays the same but
for rounding. A laptop may have no C++ compiler, and a compiler may refuse a layer: then the plain layer goes on, and a
line in the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from ndreamer_dist.model.collectives import Collective
from ndreamer_dist.model.network import NDreamerNetwork

logger = logging.getLogger(__name__)


def compile_layers(network: NDreamerNetwork, collective: Collective) -> None:
    """Let encoder, head and decoder be compiled at their first call, which then takes up to a minute.

    With several workers batch norm talks to the others in the middle of a layer, and the layers stay as they are.
    """
    if collective.world > 1:
        logger.warning("train.compile is for one worker; %d workers train without it", collective.world)
        return
    for name in ("encoder", "head", "decoder"):
        layer = getattr(network, name)
        layer.forward = or_plain(torch.compile(layer.forward), layer.forward, name)


def or_plain(fast: Callable[..., Any], plain: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `fast`, which gives way to `plain` for good when it cannot be compiled."""
    chosen = fast

    @wraps(plain)
    def call(*inputs: Any) -> Any:
        nonlocal chosen
        if chosen is not plain:
            try:
                return chosen(*inputs)
            except (TorchDynamoException, InductorError) as error:
                chosen = plain
                logger.warning("%s is not compiled, training goes on without: %s", name, _reason(error))
        return plain(*inputs)

    return call


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
