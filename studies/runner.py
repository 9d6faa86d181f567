"""Many trials on any executor: one result file each, finished ones skipped, nothing lost when a worker dies."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import asdict
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kbt_rl.files import replacing, write_text
from studies.executors import MakeExecutor
from studies.table import Row, Table, as_row
from studies.trial import Source, Trial

# A pool that breaks so often without a trial done in between will not get any further.
_BROKEN_POOLS = 3


def perform(trial: Trial, content: bytes | None) -> list[Row]:
    """Run one trial: a pure function of its arguments, for any process on any machine.

    Args:
        trial: What to do.
        content: Of its source.
    """
    torch.set_num_threads(1)  # the networks are small, and the trials are as many as the cores
    torch.manual_seed(trial.stream_seed)
    try:
        setting = trial.setting(content)
    except Exception as error:  # whatever reading something else ends in
        if trial.source is None:
            raise
        raise ValueError(
            f"{trial.source.name} in the folder of the models is broken ({type(error).__name__}: {error}); delete it, "
            "and the same command makes it again"
        ) from error
    rows: list[Row] = list(import_module(f"studies.{trial.study}").run(trial, setting))
    return rows


def make(source: Source) -> bytes:
    """Make what trials start from."""
    torch.set_num_threads(1)
    return source.make()


class Store:
    """Results and the sources of trials on the disk.

    Args:
        out: Folder of the results, a file a trial under ``trials``.
        models: Folder of the sources, which studies may share.

    Raises:
        OSError: A folder cannot be written to.
    """

    def __init__(self, out: Path, models: Path) -> None:
        self._trials, self._models = out / "trials", models
        for folder in (self._trials, models):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        for name in ("results.csv", "tables.md"):  # what the study writes at its end
            if (out / name).exists() and not (out / name).is_file():
                raise OSError(
                    f"{out / name} is no file, so that no results could be written there; choose another --out"
                )

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Those without a result."""
        return [trial for trial in trials if not self._path(trial).exists()]

    def write(self, trial: Trial, rows: Sequence[Row]) -> None:
        """Keep a result."""
        write_text(self._path(trial), json.dumps({"trial": asdict(trial), "rows": rows, "versions": versions()}))

    def read(self, trials: Iterable[Trial]) -> Table:
        """The rows of all trials that have been run, in the order of the trials.

        Raises:
            ValueError: A file is no result; the message names it and says what to do.
        """
        return Table(row for trial in trials if self._path(trial).exists() for row in _read(self._path(trial)))

    def content(self, source: Source | None) -> bytes | None:
        """Of a source, None if it was not made."""
        if source is None or not (path := self._models / source.name).exists():
            return None
        return path.read_bytes()

    def keep(self, source: Source, content: bytes) -> None:
        """Keep the content of a source."""
        with replacing(self._models / source.name) as file:
            file.write(content)

    def _path(self, trial: Trial) -> Path:
        return self._trials / f"{trial.id}.json"


def _read(path: Path) -> list[Row]:
    try:
        return [as_row(values) for values in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the result of a trial ({type(error).__name__}: {error}); delete it, and the same command "
            "runs that trial again"
        ) from error


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("kbt_rl", "torch", "numpy", "gymnasium", "stable-baselines3", "control")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


class Job(NamedTuple):
    """A call whose result is kept as soon as it is there: a source to make, or a trial."""

    name: str
    call: Callable[[], Any]
    keep: Callable[[Any], None]


def run_all(trials: Sequence[Trial], store: Store, make_executor: MakeExecutor, console: Console) -> Table:
    """Run what has not been run yet, with a progress bar, and return the rows of all.

    First the sources that are missing, then the trials, then those that run alone. When a worker dies, a
    new executor goes on with what is left. An interrupt cancels what is running; the next call continues with the rest.

    Args:
        trials: What to run.
        store: Where results are kept.
        make_executor: Makes an executor; any of ``concurrent.futures``'s kind.
        console: Where the progress bar is drawn.

    Raises:
        ValueError: A result file is broken.
        RuntimeError: A trial failed; the others have been run, and the message names it. Or workers die again and
            again.
    """
    store.read(trials)  # a broken file is found before a long run, not after it
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        missing = store.missing(trials)
        bar = progress.add_task("trials", total=len(trials), completed=len(trials) - len(missing), last="")

        def done(trial: Trial, rows: list[Row]) -> None:
            store.write(trial, rows)
            progress.update(bar, advance=1, last=trial.method.name)

        def preparing() -> list[Job]:
            sources = dict.fromkeys(trial.source for trial in store.missing(trials))
            return [
                Job(source.name, partial(make, source), partial(store.keep, source))
                for source in sources if source is not None and store.content(source) is None
            ]  # fmt: skip

        def learning(group: Sequence[Trial]) -> list[Job]:
            return [
                Job(trial.id, partial(perform, trial, store.content(trial.source)), partial(done, trial))
                for trial in store.missing(group)
            ]

        progress.update(bar, last="pre-training")
        _run(preparing, make_executor, console)
        parallel = [trial for trial in trials if not trial.alone]
        for group in (parallel, *([trial] for trial in trials if trial.alone)):
            _run(partial(learning, group), make_executor, console)
    return store.read(trials)


def _run(left: Callable[[], list[Job]], make_executor: MakeExecutor, console: Console) -> None:
    """Run the jobs that are left side by side; with a new executor if one breaks."""
    broken = 0
    while jobs := left():
        pool = make_executor()
        try:
            _drain(pool, jobs)
            pool.shutdown()
            return
        except BrokenExecutor as error:
            pool.shutdown(wait=False, cancel_futures=True)
            broken = 0 if len(left()) < len(jobs) else broken + 1
            if broken == _BROKEN_POOLS:
                raise RuntimeError(
                    f"worker processes died {broken} times (killed, or out of memory?) with {len(jobs)} jobs left, "
                    f"among them {', '.join(job.name for job in jobs[:3])}; try fewer --jobs"
                ) from error
            console.print("a worker process died (killed, or out of memory?); a new pool goes on with what is left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _drain(pool: Executor, jobs: Sequence[Job]) -> None:
    """Keep each result when it is there, at once where the executor runs what is submitted at once."""
    running: dict[Future[Any], Job] = {}
    failures: list[tuple[str, BaseException]] = []

    def finish(job: Job, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, BrokenExecutor):
            raise error
        if error is None:
            job.keep(future.result())
        else:
            failures.append((job.name, error))

    for job in jobs:
        future = pool.submit(job.call)
        if future.done():
            finish(job, future)
        else:
            running[future] = job
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            finish(running.pop(future), future)
    if failures:
        name, error = failures[0]
        raise RuntimeError(f"{len(failures)} trials failed, first {name}: {error!r}") from error
