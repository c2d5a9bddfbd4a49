"""The process group of training workers, on the network interface that Ray uses.

By default gloo listens at the address that the machine's host name resolves to, and NCCL on the first interface that is
not loopback. On some machines the host name resolves to `127.0.1.1`, which other machines cannot reach, or to nothing.
A single worker needs no process group.
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
"""Variables that name the interface, and the prefix of the name: without `=` NCCL matches all names that begin so."""
GET_ADDRESS = 0x8915
"""The ioctl request SIOCGIFADDR of Linux."""


class NodeNetwork(TorchConfig):
    """Configures Ray Train's process group to use the addresses of the Ray nodes."""

    @property
    def backend_cls(self) -> type:
        """The backend class, see Ray's `BackendConfig`."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Sets the interface of gloo and NCCL before Ray Train creates the process group."""

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
    """Return the name of the network interface with an IPv4 address, if any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # the interface has no address, or the system is not Linux
                reply = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    return None
