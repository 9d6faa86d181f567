"""Where trials run: one after another, in processes of this machine, or on a Ray cluster.

The runner takes any ``concurrent.futures.Executor``; these are the ones that the command line offers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

ExecutorName = Literal["processes", "serial", "ray"]
MakeExecutor = Callable[[], Executor]
_ROOT = Path(__file__).resolve().parent.parent


class Serial(Executor):
    """Runs each call when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See ``concurrent.futures.Executor``."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def processes(jobs: int) -> Executor:
    """A pool of processes that end when this one does, however it does."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class RayExecutor(Executor):
    """Calls as tasks of a Ray cluster: of one that runs (``ray start``), else of one on this machine.

    A task whose worker or node dies is run again by Ray. The code of this checkout is sent along, so that a node needs
    the package's dependencies only. Results come back to this process, so that no folder has to be shared.

    Args:
        jobs: CPUs of a cluster on this machine; one that runs already has its own.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, jobs: int) -> None:
        self._ray = ray = require_ray()
        environment = {
            "py_modules": [str(_ROOT / "kbt_rl"), str(_ROOT / "studies")],
            "env_vars": {"OMP_NUM_THREADS": "1"},
        }
        options: dict[str, Any] = {"runtime_env": environment, "log_to_driver": False, "logging_level": "ERROR"}
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(address="auto", **options)
            except ConnectionError:
                ray.init(num_cpus=jobs, include_dashboard=False, **options)
        self._remote = ray.remote(_call).options(num_cpus=1, max_retries=3)
        self._tasks: list[Any] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See ``concurrent.futures.Executor``."""
        task = self._remote.remote(fn, *args, **kwargs)
        self._tasks.append(task)
        future: Future[Any] = task.future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See ``concurrent.futures.Executor``; a cluster that this executor has started is stopped."""
        if cancel_futures:
            for task in self._tasks:
                self._ray.cancel(task, force=True)
        elif wait:
            self._ray.wait(self._tasks, num_returns=len(self._tasks))
        self._tasks = []
        if self._started:
            self._ray.shutdown()


def _call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def require_ray() -> Any:
    """The module, or an error that says how to install it."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('--executor ray needs an extra: pip install "kbt_rl[ray]"') from error
    return ray


def maker(name: ExecutorName, jobs: int) -> MakeExecutor:
    """What makes the executor of this name, a new one each time."""
    if name == "ray":
        require_ray()  # before anything is run
        return partial(RayExecutor, jobs)
    return Serial if name == "serial" or jobs == 1 else partial(processes, jobs)
