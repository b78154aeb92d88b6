"""`eagleray up` and `down`: start Ray and Serve on this machine, or join a cluster, and serve until told to stop."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from actors.faiss_library import check_faiss_installation
from actors.scratch import private_folder
from cluster.config import Settings
from cluster.errors import Conflict, Invalid, Unavailable
from cluster.object_store import open_store

APPLICATION = "eagleray"
READY_TIMEOUT_S = 300.0
DOWN_TIMEOUT_S = 60.0
AGENT_PORT = 52_365  # of every Ray's agent, by which its job server runs jobs; `ray.init` takes no other
# Below those that Linux gives to outgoing connections (from 32768 on): one of these, taken while Ray starts, would be
# missing to whoever was told that it is free. Beside those of Ray's workers (10002 to 19999) and Serve's (from 30000).
PORTS = range(20_000, 30_000)
HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
OBJECT_STORE_BYTES = 512 * 1024 * 1024  # requests pass through it, nothing stays: Ray's default is 30% of memory
# Serve reads these when it is imported, in every process: HAProxy straight to the endpoint process instead of
# Serve's Python proxy, no thread hops inside it, and searches that watch for their client themselves
# (docs/decisions/0003-ingress.md has the figures).
SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ingress.middlewares",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class UpOptions:
    """Where to listen, and the Ray cluster to join (None: start one on this machine)."""

    settings: Settings
    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def check_host(host: str) -> None:
    """There are no API keys in this version: only loopback may be listened on."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise Invalid.at("host", f"{host!r} is not a loopback address; without API keys nothing else is listened on")


def up(options: UpOptions, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; then leave nothing running that was started here."""
    check_host(options.host)
    check_faiss_installation()
    options.settings.check_shared()
    open_store(options.settings.data)  # says now what every process would say later
    stop = threading.Event()
    _stop_on_signals(stop)
    with _run_file(options.port), contextlib.ExitStack() as undo:
        _check_port_free(options)
        if options.address is None and is_taken(AGENT_PORT):
            announce(
                f"another Ray on this machine has port {AGENT_PORT}, which Ray's job server needs: imports and "
                "`eagleray compact` will fail here; stop the other one, then start this again"
            )
        announce("starting Ray and Serve")
        dashboard = undo.enter_context(_ray_cluster(options))
        _stop_on_signals(stop)  # again: starting Ray puts its own handlers in place
        undo.enter_context(_application(options))
        _wait_until_ready(options, stop, announce)
        if not stop.is_set():
            announce(f"Ray's dashboard and job server: http://{dashboard}")
            announce(f"Eagleray serves {options.url} with data in {options.settings.data}; Ctrl-C stops it")
        while not stop.wait(timeout=1.0):  # with a timeout, so that signals are handled on every platform
            continue
        announce("stopping")
    announce("stopped")


def _stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def down(port: int) -> bool:
    """Stop the `up` on this machine's port; False when there is none."""
    path = _run_file_path(port)
    if not path.exists():
        return False
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    told = False
    with path.open("r+") as file:
        while not _lock(file):
            if not told:
                os.kill(int(json.load(file)["pid"]), signal.SIGTERM)
                told = True
            if time.monotonic() > deadline:
                raise Unavailable(f"the server on port {port} did not stop within {DOWN_TIMEOUT_S:g} s")
            time.sleep(0.05)
    return told


def _run_file_path(port: int) -> Path:
    return private_folder(f"{port}.json")


@contextlib.contextmanager
def _run_file(port: int) -> Iterator[None]:
    """Hold the lock that says "an `up` runs on this port"; `down` reads the pid in it."""
    path = _run_file_path(port)
    with path.open("a+") as file:
        if not _lock(file):
            raise Conflict(f"another eagleray up runs on port {port}; stop it with: eagleray down --port {port}")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_port_free(options: UpOptions) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise Conflict(f"port {options.port} of {options.host} is taken: {error}; choose another --port") from None


def is_taken(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int, spoken_for: Collection[int] = ()) -> list[int]:
    """Different ports of loopback that are free now, and that no outgoing connection is given meanwhile.

    None of those that are spoken for: nobody listens there yet. Unavailable where there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if port in spoken_for:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise Unavailable(f"fewer than {count} of the ports {min(PORTS)} to {max(PORTS)} are free")


@contextlib.contextmanager
def _ray_cluster(options: UpOptions) -> Iterator[str]:
    """A Ray of our own in a temporary folder, ended with this; or the cluster of `--address`, left as it is.

    Gives host and port of its dashboard.
    """
    folder = tempfile.mkdtemp(prefix="er-", dir="/tmp")  # short: unix socket paths under it have a limit
    if options.address is None:
        os.environ.update(serve_environment(folder, options.port))
    import ray

    try:
        if options.address is None:
            context = _start_ray(folder, options.port)
        else:
            context = ray.init(address=options.address, logging_level=logging.ERROR, log_to_driver=False)
        yield str(context.dashboard_url)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def serve_environment(folder: str, port: int) -> dict[str, str]:
    """`SERVE_ENVIRONMENT` with HAProxy's files in `folder` and its ports free, so that two can run side by side.

    `port` is the one that Serve listens on later.
    """
    return SERVE_ENVIRONMENT | {
        **dict(zip(HAPROXY_PORTS, map(str, free_ports(len(HAPROXY_PORTS), {port})), strict=True)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/haproxy.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/haproxy-state",
    }


def _start_ray(folder: str, port: int) -> Any:
    """Serve will listen on `port`, and HAProxy where the environment says by now."""
    import ray

    of_haproxy = {int(number) for name, number in os.environ.items() if name in HAPROXY_PORTS}
    context = ray.init(
        address="local",
        include_dashboard=True,  # the job server lives in it
        dashboard_host="127.0.0.1",
        dashboard_port=free_ports(1, {port, *of_haproxy})[0],
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=folder,
    )
    # As `ray start` does. Without it Ray's job server, where more than one Ray runs on a machine, gives a job the
    # address of any of them: an import would go to another Eagleray.
    Path(folder, "ray_current_cluster").write_text(context.address_info["gcs_address"])
    return context


@contextlib.contextmanager
def _application(options: UpOptions) -> Iterator[None]:
    """The Serve application and, with it, supervisor and shards."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from actors import ray_runtime
    from serve.app import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if options.address is not None:
        _refuse_existing(options)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    ray_serve.start(http_options=HTTPOptions(host=options.host, port=options.port), logging_config=quiet)
    num_cpus = 0.0 if options.address is None else 1.0
    try:
        app = application(options.settings, num_cpus)
        ray_serve.run(app, name=APPLICATION, route_prefix="/", logging_config=quiet)
        yield
    finally:
        if options.address is not None:
            ray_serve.shutdown()  # all of it: there was none before
            ray_runtime.stop_actors(options.settings.namespace)


def _refuse_existing(options: UpOptions) -> None:
    """A cluster that serves already keeps what it has: `up` ends, when it ends, only what it started."""
    from ray import serve as ray_serve

    from actors import ray_runtime

    status = ray_serve.status()
    if status.proxies or status.applications:
        raise Conflict(
            f"Ray Serve runs on {options.address} already; deploy there with: serve deploy serve-config.yaml"
        )
    namespace = options.settings.namespace
    if ray_runtime.find_supervisor(namespace) is not None:
        running = ray_runtime.settings_of_supervisor(namespace)
        if running.data != options.settings.data:
            raise Conflict(
                f"an Eagleray with data in {running.data} runs on {options.address} under the namespace {namespace!r}; "
                "give this one another --namespace"
            )


def _wait_until_ready(options: UpOptions, stop: threading.Event, announce: Callable[[str], None]) -> None:
    """Until every collection is served; a collection that cannot be is told, and does not hold up the others."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    told = ""
    while not stop.is_set():
        reason = _not_ready(options.url)
        if reason is None:
            return
        if reason != told:
            announce(f"waiting: {reason}")
            told = reason
        if time.monotonic() > deadline:
            announce(f"not everything is ready after {READY_TIMEOUT_S:g} s: {reason}")
            return
        stop.wait(0.1)


def _not_ready(url: str) -> str | None:
    try:
        response = httpx.get(f"{url}/readyz", timeout=5.0)
    except httpx.HTTPError:
        return "the endpoint starts"
    if response.status_code == 200:
        return None
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError):
        return "the endpoint starts"
