"""What `eagleray up` does around the start of Ray, without one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import Unavailable
from serve import local_cluster
from serve.local_cluster import free_ports, is_taken, serve_environment


def test_port_is_taken_while_somebody_listens_on_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert is_taken(port)
    assert not is_taken(port)


def test_started_ray_leaves_its_address_where_its_job_server_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an import may go to another Ray of this machine."""
    given: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(address_info={"gcs_address": "127.0.0.1:7"}, dashboard_url="127.0.0.1:8")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    context = local_cluster._start_ray(str(tmp_path), 20_000)
    assert context.dashboard_url == "127.0.0.1:8"
    assert given["_temp_dir"] == str(tmp_path)
    assert (tmp_path / "ray_current_cluster").read_text() == "127.0.0.1:7"


def test_free_ports_are_different_ones() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert not any(is_taken(port) for port in ports)


def test_free_ports_are_none_that_an_outgoing_connection_gets_meanwhile() -> None:
    assert max(free_ports(200)) < 32_768  # as Linux is set up


def test_free_ports_leave_out_those_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, *left = free_ports(3)
    monkeypatch.setattr(local_cluster, "PORTS", [taken, *left])
    with socket.create_server(("127.0.0.1", taken)):
        assert sorted(free_ports(2)) == sorted(left)
        with pytest.raises(Unavailable, match="fewer than 3 of the ports"):
            free_ports(3)


def test_no_two_listeners_of_a_cluster_get_the_same_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve listens on its port last of all: until then it is free, and so are those of HAProxy."""
    given: dict[str, Any] = {}

    def init(**options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(address_info={"gcs_address": ""})

    serves, *others = free_ports(5)
    monkeypatch.setattr(local_cluster, "PORTS", [serves, *others])
    monkeypatch.setattr("ray.init", init)
    for name, value in serve_environment(str(tmp_path), serves).items():
        monkeypatch.setenv(name, value)
    local_cluster._start_ray(str(tmp_path), serves)
    of_haproxy = [int(os.environ[name]) for name in local_cluster.HAPROXY_PORTS]
    assert sorted([*of_haproxy, given["dashboard_port"]]) == sorted(others)
