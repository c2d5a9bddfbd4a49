"""How training workers meet: over the network that Ray itself uses, and on one machine without a port for others.

Left alone, gloo listens at the address that the machine's own name stands for. Where that is a loopback address, as on
machines that write `127.0.1.1` beside their name, or none at all, no other machine could reach it. And torch's TCPStore, at
which the workers find each other, listens on every address of the machine, without a password: one worker needs none, and
those of a local Ray meet in a file.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import shutil
import socket
import struct
import tempfile
from contextlib import suppress
from typing import Any

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _setup_torch_process_group, _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"
GET_ADDRESS = 0x8915
"""Linux's SIOCGIFADDR."""


class RaysNetwork(TorchConfig):
    """Workers of several machines meet as Ray Train lets them, at the addresses of their Ray nodes."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """See Ray's `BackendConfig`."""
        return _Backend


class _Backend(_TorchBackend):
    """Makes the workers' process group, and ends it."""

    folder = ""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        if len(worker_group) == 1:
            return
        worker_group.execute(choose_interface)
        addresses = worker_group.execute(ray.util.get_node_ip_address)
        if all(ipaddress.ip_address(address).is_loopback for address in addresses):
            self._meet_in_a_file(worker_group, backend_config)
        else:
            super().on_start(worker_group, backend_config)

    def _meet_in_a_file(self, worker_group: Any, backend_config: TorchConfig) -> None:
        self.folder = worker_group.execute_single(0, tempfile.mkdtemp, prefix="ndreamer-")
        told = {
            "backend": "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo",
            "init_method": f"file://{self.folder}/meet",
            "world_size": len(worker_group),
            "timeout_s": backend_config.timeout_s,
        }
        ranks = range(len(worker_group))
        join = _setup_torch_process_group
        ray.get([worker_group.execute_single_async(rank, join, world_rank=rank, **told) for rank in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            if self.folder:  # only now: workers that still look for the file would make it again
                shutil.rmtree(self.folder, ignore_errors=True)


def choose_interface() -> None:
    """Tell gloo which interface to listen at, where nobody else has and it can be found."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IPv4 address; none where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address, or the system is another
                told = fcntl.ioctl(asked, GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(told[20:24]) == address:
                    return name
    return None
