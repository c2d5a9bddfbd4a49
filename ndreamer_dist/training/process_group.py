"""The process group of training workers, on the network interface that Ray uses.

By default, gloo listens at the address of the machine's own name, and NCCL at the first interface that is not loopback.
On machines that write `127.0.1.1` beside their name this is a loopback address, and some machines have no address for it;
other machines could not reach it. A single worker needs no process group.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Any

import ray.util
from ray.train.torch import TorchConfig

INTERFACE_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variables that name the interface, and what stands before it: NCCL would take all that begin with the name."""
GET_ADDRESS = 0x8915
"""Linux's SIOCGIFADDR."""


class NodeNetwork(TorchConfig):
    """Ray Train's process group, at the addresses of the Ray nodes."""

    @property
    def backend_cls(self) -> type:
        """See Ray's `BackendConfig`."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Sets the interface of gloo and NCCL before Ray Train makes the workers' process group."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(worker_group) > 1:
            worker_group.execute(choose_interface)
            super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Set the interface of gloo and NCCL to that of the Ray node, unless the environment names one."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable, exactly in INTERFACE_VARIABLES.items():
            os.environ.setdefault(variable, exactly + name)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IPv4 address; none where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address, or the system is another
                told = fcntl.ioctl(asked, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(told[20:24]) == address:
                    return name
    return None
