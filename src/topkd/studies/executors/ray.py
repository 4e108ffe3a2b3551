"""Executor that runs jobs as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topkd._runtime.imports import optional
from topkd.studies.executors.base import Executor
from topkd.studies.executors.shared import Remote, shared
from topkd.studies.executors.task import CRASHED, Exit, Task

CONNECTION = 10.0  # seconds to wait for the head of a cluster
# Environment of Ray, read when it is imported: no usage reports, and failures are reported once.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
# A cluster started here: with a password, on the loopback interface.
STARTED = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
CONNECTED = {"RAY_NUM_REDIS_GET_RETRIES": "1"}  # waits less than a minute for a cluster
OBJECTS = 100 << 20  # bytes of shared memory for a cluster started here, which holds no data


class Ray(Executor):
    """Runs each job as a Ray task, in a process of its own on any machine of a cluster.

    Args:
        jobs: Number of tasks at a time. Defaults to as many as the cluster has room for.
        threads: CPUs per task.
        gpus: GPUs per task; tasks share a GPU if it is a fraction. Defaults to 1 if the cluster
            has GPUs.
        address: Address of a running cluster, or ``auto`` for one on this machine. Defaults to the
            environment variable ``RAY_ADDRESS``; without it, a cluster is started on this machine
            and stopped at the end.
        until: Value of :func:`time.time` after which no job begins.

    References:
        Ray: A Distributed Framework for Emerging AI Applications (Moritz et al., OSDI 2018)
        https://arxiv.org/abs/1712.05889
    """

    def __init__(
        self,
        jobs: int | None = None,
        *,
        threads: int = 1,
        gpus: float | None = None,
        address: str | None = None,
        until: float | None = None,
    ) -> None:
        super().__init__(jobs, threads, until)
        if gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
            raise ValueError(f"--gpus must be a fraction of 1 or a whole number, got {gpus:g}")
        self.gpus, self.address = gpus, address

    @contextmanager
    def session(self, out: Path) -> Iterator[None]:
        """Connects to the cluster, or starts one."""
        self._ray = _connected(self.address or os.environ.get("RAY_ADDRESS") or "local")
        try:
            with shared(out) as self._shared:
                self._function = self._ray.remote(**self._resources())(_execute)
                yield
        finally:
            self._ray.shutdown()

    def _resources(self) -> dict[str, Any]:
        """Returns the options of a task.

        Raises:
            ValueError: If no machine of the cluster is large enough.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = self.gpus
        if gpus is None:
            gpus = 1 if any(machine.get("GPU", 0) for machine in machines) else 0
        if not any(
            machine.get("CPU", 0) >= self.threads and machine.get("GPU", 0) >= gpus
            for machine in machines
        ):
            raise ValueError(
                "no machine of the Ray cluster is large enough for a job with "
                f"--threads {self.threads} and --gpus {gpus:g}; lower them"
            )
        return {
            "num_cpus": self.threads,
            "num_gpus": gpus,
            "scheduling_strategy": "SPREAD",
            "max_calls": 1,  # a new process for each task
            "max_retries": 0,  # crashes of any kind are counted together, by the base class
        }

    def start(self, tasks: Sequence[Task]) -> list[Any]:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        return [self._function.remote(Remote(task, self._shared, self.until)) for task in tasks]

    def wait(self, handles: Sequence[Any]) -> list[tuple[Any, Exit]]:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        ended, _ = self._ray.wait(list(handles))
        return [(handle, self._exit_of(handle)) for handle in ended]

    def _exit_of(self, handle: Any) -> Exit:
        try:
            end: Exit = self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [""]
            of_python = isinstance(error, self._ray.exceptions.RayTaskError)
            line = lines[-1 if of_python else 0]  # a traceback ends with its message
            return Exit(CRASHED, f"{type(error).__name__}: {line}")
        return end

    def stop(self, handles: Sequence[Any]) -> None:
        """See :class:`~topkd.studies.executors.base.Executor`."""
        for handle in handles:
            self._ray.cancel(handle, force=True)


def _execute(remote: Remote) -> Exit:
    """Body of a Ray task."""
    return remote()


def _connected(address: str) -> Any:
    """Imports Ray and connects it to a cluster, or starts one on the loopback interface.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If there is no cluster at this address.
    """
    starts = address == "local"
    if not starts:
        _refuse_unreachable(address)
    for name, value in (QUIET | (STARTED if starts else CONNECTED)).items():
        os.environ.setdefault(name, value)
    ray = optional("ray", "ray")
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            include_dashboard=False if starts else None,
            object_store_memory=OBJECTS if starts else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "no Ray cluster was started" if starts else f"--address {address}"
        raise ConnectionError(f"{where}: {str(error).splitlines()[0]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray replaces it
    return ray


def _refuse_unreachable(address: str) -> None:
    """Raises ``ConnectionError`` if nothing listens; Ray would try for more than ten minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--address: expected HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECTION).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"--address: no Ray cluster at {address}: {error}") from error
