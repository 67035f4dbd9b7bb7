"""More than one machine: replicas of the service of chapter 23 behind one port, by Ray Serve."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from fastapi import FastAPI

from sigma_book.bulk import claims, processors, ray_running
from sigma_book.generation import whole_number
from sigma_book.paligemma import PaliGemma
from sigma_book.server import ServerConfig
from sigma_book.serving import app_for, log_to_stderr

NAME = "sigma-book"

__all__ = ["ReplicaConfig", "replicas_running", "serve_replicas", "share"]


@dataclass(frozen=True)
class ReplicaConfig:
    """How many replicas there are, and what each claims of its machine.

    Parameters
    ----------
    replicas : int
        That are there at the beginning, and at least.
    most : int, optional
        Let Ray Serve start more, up to this number, while each has more than `busy` requests on average, and stop them
        again. Without it their number is fixed.
    busy : float
        Requests that a replica should have at a time; the rows of its engine are a good choice.
    cpus, gpus : float
        Claimed by each replica; fractions are allowed.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    replicas: int = 2
    most: int | None = None
    busy: float = 8.0
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self):
        whole_number("replicas", self.replicas, least=1)
        if self.most is not None:
            whole_number("most", self.most, least=self.replicas)
        for name, least in (("busy", 1), ("cpus", 0), ("gpus", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a number, {least} or more")

    def options(self, room: int, deadline: float) -> dict:
        """The same as Ray Serve calls it; a replica takes `room` requests, each for at most `deadline` seconds."""
        given = room + 16  # more than a replica takes, so that it is asked and refuses with a 429
        number = {"num_replicas": self.replicas}
        if self.most is not None:
            scale = {"min_replicas": self.replicas, "initial_replicas": self.replicas, "max_replicas": self.most}
            number = {"autoscaling_config": scale | {"target_ongoing_requests": self.busy}}
        claims = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        bounds = {"max_ongoing_requests": given, "max_queued_requests": given}  # beyond both, Ray answers with a 503
        return number | bounds | {"graceful_shutdown_timeout_s": deadline + 5, "ray_actor_options": claims}


class Replica:
    """What runs in each replica: an engine of its own, and the application over it."""

    def __init__(self, make_app: Callable[[], FastAPI]):
        self._app = make_app()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Ray Serve asks now and then; what is raised here has the replica started anew."""
        await self._app.state.service.live()


def _make_app(threads: int, make_model: Callable[[], PaliGemma], config: ServerConfig, sizes: dict) -> FastAPI:
    torch.set_num_threads(threads)
    log_to_stderr()
    return app_for(make_model(), config, sizes)


@contextmanager
def replicas_running(
    make_model: Callable[[], PaliGemma],
    config: ServerConfig,
    shared: ReplicaConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 8,
    max_length: int | None = None,
    queue_size: int = 64,
) -> Iterator[str]:
    """Replicas behind a port, until the block ends; gives the address.

    Joins the Ray cluster that `RAY_ADDRESS` names, or starts one on this machine, without dashboard and statistics. All
    that `serve` answers is answered, by one replica or another; `/metrics` are those of the replica that was asked.
    The log of each is kept by Ray on the machine of the replica, each line behind a few words of Ray's own: unless told
    otherwise in `/tmp/ray/session_latest/logs/serve/replica_*.log`.

    Parameters
    ----------
    make_model : callable
        Called in each replica, such as `partial(load, folder)`; the folder must be the same on each machine.
    config : ServerConfig
    shared : ReplicaConfig
    host, port
        Of the proxy on each machine.
    max_rows, max_length, queue_size
        Of the engine in each replica.

    Raises
    ------
    RuntimeError
        If Ray is not installed, or the replicas do not start.
    """
    sizes = {"max_rows": max_rows, "max_length": max_length, "queue_size": queue_size}
    make_app = partial(_make_app, max(1, processors() // shared.replicas), make_model, config, sizes)
    with ray_running():
        try:
            from ray import serve
        except ImportError as error:
            raise RuntimeError("replicas need Ray Serve: pip install 'sigma-book[scale]'") from error
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(http_options={"host": host, "port": port})
            deployment = serve.deployment(serve.ingress()(Replica)).options(
                name=NAME, **shared.options(max_rows + queue_size, config.deadline)
            )
            try:
                serve.run(deployment.bind(make_app), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise RuntimeError(f"the replicas do not start: {_why(serve.status())}") from error
            yield f"http://{host}:{port}"
            # replicas finish what they are at, while the proxies still hold the connections of their clients
            serve.delete(NAME, _blocking=False)
            while NAME in serve.status().applications:  # as long as the deadline allows; Ray itself waits for 60 s
                time.sleep(0.2)
        finally:
            serve.shutdown()


def _why(status) -> str:
    """The last line of what Ray Serve has noted: there it keeps what a replica raised when it was made."""
    notes = [part.message for one in status.applications.values() for part in (one, *one.deployments.values())]
    lines = [line.strip() for note in notes for line in note.splitlines() if line.strip()]
    return lines[-1] if lines else "see the logs of Ray Serve"


def share(replicas: int, most: int | None, busy: float, device: str) -> ReplicaConfig:
    """Claims with which so many replicas fit on this machine; on a cluster, a processor or a GPU for each."""
    return ReplicaConfig(replicas, most, busy, *claims(max(1, most or replicas), device))


def serve_replicas(
    make_model: Callable[[], PaliGemma],
    config: ServerConfig,
    shared: ReplicaConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_rows: int = 8,
    max_length: int | None = None,
    queue_size: int = 64,
) -> None:
    """`replicas_running` until SIGTERM or SIGINT comes; running requests are finished first."""
    stop = threading.Event()
    sizes = {"max_rows": max_rows, "max_length": max_length, "queue_size": queue_size}
    with replicas_running(make_model, config, shared, host=host, port=port, **sizes) as url:
        for number in (signal.SIGTERM, signal.SIGINT):  # now, for Ray has put in its own, which abort
            signal.signal(number, lambda *_: stop.set())
        print(f"listening on {url}, {shared.replicas} replicas", file=sys.stderr, flush=True)
        stop.wait()
