"""Training workers listen at the address of their Ray node, whatever the host name resolves to."""

from __future__ import annotations

import os

import pytest
import ray.util

from ndreamer_dist.training import process_group


def test_an_address_is_found_at_its_interface() -> None:
    assert process_group.interface_of("127.0.0.1") == "lo"
    assert process_group.interface_of("192.0.2.1") is None  # a documentation address, which no interface has


@pytest.mark.parametrize("variable", process_group.INTERFACE_VARIABLES)
@pytest.mark.parametrize(("before", "after"), [(None, "lo"), ("eth7", "eth7")], ids=["found", "told"])
def test_gloo_and_nccl_listen_at_the_address_of_the_node_unless_told_otherwise(
    variable: str, before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in process_group.INTERFACE_VARIABLES:
        monkeypatch.setenv(each, before or "")
        if before is None:
            monkeypatch.delenv(each)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    process_group.choose_interface()
    assert os.environ[variable].removeprefix("=") == after
