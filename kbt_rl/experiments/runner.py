"""Many trials: in parallel processes, one result file each, resumable, and nothing lost when a process dies.

The unit of work is ``perform(batch, out)`` for one of ``config.batches``, which writes ``out/trials/<id>.json`` for
each trial and does nothing if they are there. Any other executor (a cluster's job array, say) can call it for the same
batches on a shared folder.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kbt_rl.experiments.config import Method, Trial, batches
from kbt_rl.experiments.learners import clone, head_config, prepare_heads
from kbt_rl.experiments.trials import model_path, run_trials
from kbt_rl.files import write_text

Result = dict[str, Any]


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("kbt_rl", "torch", "numpy", "gymnasium", "stable-baselines3", "control")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def result_path(trial: Trial, out: Path) -> Path:
    """Where a trial's result is kept."""
    return out / "trials" / f"{trial.id}.json"


def perform(batch: Sequence[Trial], out: Path) -> None:
    """Run the trials of a batch, all of them unless all results are there already, so that each is always the same."""
    if not _missing(batch, out):
        return
    for trial, record in zip(batch, run_trials(batch, out / "models"), strict=True):
        write_json({"trial": asdict(trial), "record": record, "versions": versions()}, result_path(trial, out))


def _missing(trials: Iterable[Trial], out: Path) -> list[Trial]:
    return [trial for trial in trials if not result_path(trial, out).exists()]


def write_json(value: Any, path: Path) -> None:
    """Write a value as JSON; the file is replaced as a whole."""
    write_text(path, json.dumps(value, indent=1))


def read_results(trials: Iterable[Trial], out: Path) -> list[Result]:
    """Results of the trials that have been run, in the order of the trials."""
    paths = [result_path(trial, out) for trial in trials]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def run_all(trials: Sequence[Trial], out: Path, jobs: int, console: Console, alone: Sequence[Trial] = ()) -> None:
    """Run what is not there yet, ``jobs`` at a time, with a progress bar.

    An interrupt stops after the running trials are cancelled; the next call continues with the rest.

    Args:
        trials: What to run.
        out: Folder of the results.
        jobs: Processes.
        console: Where the progress bar is drawn.
        alone: Run afterwards one by one, with nothing beside them, since they measure time.

    Raises:
        RuntimeError: A trial failed; the others have been run, and the message names it.
    """
    missing, missing_alone = ([batch for batch in batches(some) if _missing(batch, out)] for some in (trials, alone))
    total, left = len(trials) + len(alone), len(_missing((*trials, *alone), out))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("trials", total=total, completed=total - left, last="")

        def done(batch: Sequence[Trial]) -> None:
            last = batch[0]
            left = len(_missing((*trials, *alone), out))
            progress.update(bar, completed=total - left, last=last.method.name if last.kind != "timing" else last.kind)

        if not left:
            return
        if jobs == 1:
            threads = torch.get_num_threads()
            for batch in (*missing, *missing_alone):
                perform(batch, out)
                done(batch)
            torch.set_num_threads(threads)
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            _drain(pool, missing, out, done)
            for batch in missing_alone:
                pool.submit(perform, batch, out).result()
                done(batch)


def _drain(
    pool: ProcessPoolExecutor,
    missing: Sequence[tuple[Trial, ...]],
    out: Path,
    done: Callable[[Sequence[Trial]], None],
) -> None:
    """First what trials share: pre-trained policies, and machine code, each piece compiled once; then the trials.

    Those that need no machine code do not wait for it.
    """
    models = {model_path(trial, out / "models"): trial for batch in missing for trial in batch}
    running: dict[Future[None], tuple[Trial, ...]] = {}
    try:
        policies = [pool.submit(_clone, trial, out) for trial in models.values()]
        codes = [pool.submit(prepare_heads, methods) for methods in _by_depth(batch[0].method for batch in missing)]
        for shared, with_head in ((policies, False), (codes, True)):
            for ready in shared:
                ready.result()
            waiting = [batch for batch in missing if (head_config(batch[0].method) is not None) == with_head]
            running |= {pool.submit(perform, batch, out): batch for batch in waiting}
        failures: list[tuple[tuple[Trial, ...], BaseException]] = []
        while running:
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                batch = running.pop(future)
                error = future.exception()
                if error is not None:
                    failures.append((batch, error))
                done(batch)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    if failures:
        (first, *_), error = failures[0]
        count = sum(len(batch) for batch, _ in failures)
        raise RuntimeError(f"{count} of the trials failed, first {first.id}: {error!r}") from error


def _clone(trial: Trial, out: Path) -> None:
    clone(trial.pretrain_seed, trial.pretraining, model_path(trial, out / "models"))


def _by_depth(methods: Iterable[Method]) -> list[list[Method]]:
    """The methods with a head, those together whose machine code has parts in common; the longest to compile first."""
    found: dict[int, list[Method]] = {}
    for method in methods:
        config = head_config(method)
        if config is not None:
            found.setdefault(config.layers, []).append(method)
    return [found[layers] for layers in sorted(found, reverse=True)]


def _one_thread() -> None:
    """One thread a process: the networks are small, and the processes are as many as the cores."""
    torch.set_num_threads(1)
