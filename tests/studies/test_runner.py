"""Many trials: resumed, repeatable, the same on every executor, and not lost with a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from studies import runner
from studies.executors import RayExecutor, Serial, maker, processes
from studies.methods import warm_start
from studies.runner import Store, perform
from studies.table import Table
from studies.trial import FIRST_REPORTED_SEED, Method, Size, Trial

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------- trials


def test_equal_trials_have_one_id_and_others_have_others() -> None:
    first = tiny.trial()
    others = [
        tiny.trial(stream_seed=1), tiny.trial(starts=3), tiny.trial(method=warm_start(10)), tiny.trial(study="visited"),
        tiny.trial(method=replace(first.method, settings={"head": {"layers": 2}})), tiny.trial(states="visited"),
        tiny.trial(pretraining=replace(tiny.PRETRAINING, steps=61)),
    ]  # fmt: skip
    assert tiny.trial().id == first.id
    assert len({trial.id for trial in [first, *others]}) == 1 + len(others)
    assert all(trial.id == Path(trial.id).name for trial in others)


def test_quick_sizes_are_one_pair_unless_more_are_asked_for() -> None:
    assert Size(quick=True).pairs() == [(FIRST_REPORTED_SEED, FIRST_REPORTED_SEED)]
    assert len(Size().pairs()) == 10
    assert len(Size(quick=True, streams=3, policies=2).pairs()) == 6
    assert Size(seed=5, streams=1).pairs() == [(5, 5), (6, 5)]


def test_a_trial_is_a_pure_function(tmp_path: Path) -> None:
    trial = tiny.trial()
    content = trial.source.make()
    first = perform(trial, content)
    torch.manual_seed(99)
    assert perform(trial, content) == first
    assert {row.metric for row in first} == {"success", "regret", "no fall", "failed"}


# ---------------------------------------------------------------------- results on the disk


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny.run(tiny.plan(2), tmp_path)
    changed = {path: path.stat().st_mtime_ns for path in tiny.files(tmp_path)}
    monkeypatch.setattr(runner, "perform", lambda trial, policy: pytest.fail("it ran again"))
    assert tiny.run(tiny.plan(2), tmp_path).rows == table.rows
    assert {path: path.stat().st_mtime_ns for path in tiny.files(tmp_path)} == changed


def test_only_the_missing_trial_is_run(tmp_path: Path) -> None:
    table = tiny.run(tiny.plan(3), tmp_path)
    lost = sorted(tiny.files(tmp_path))[1]
    content = lost.read_text()
    lost.unlink()
    assert tiny.run(tiny.plan(3), tmp_path).rows == table.rows
    assert lost.read_text() == content


BROKEN = ["", "{}", "{", "[]", '{"rows": 1}', '{"rows": [[1]]}', "\0\0", '{"rows": [null]}', "[" * 100_000, "3"]
BROKEN += ['{"rows": [["s", "t", "m", Infinity, 0, 0, "x", 1]]}', '{"rows": [["s", "t", "m", NaN, 0, 0, "x", 1]]}']


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_named_before_anything_is_run(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.run(tiny.plan(1), tmp_path)
    (path,) = tiny.files(tmp_path)
    path.write_text(content)
    monkeypatch.setattr(runner, "perform", lambda trial, policy: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=f"{path.name}.* is not the result of a trial .*delete it"):
        tiny.run(tiny.plan(2), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="folders are protected in other ways there")
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file", tmp_path / "models")
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "out", tmp_path / "file" / "models")


@pytest.mark.parametrize("name", ["results.csv", "tables.md"])
def test_a_table_that_cannot_be_written_is_found_before_anything_is_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"{name} is no file"):
        Store(tmp_path, tmp_path / "models")


@pytest.mark.parametrize(
    "content", [b"", b"not a zip", b"PK\x05\x06" + 18 * b"\0", None], ids=["empty", "text", "zip", "cut"]
)
def test_a_broken_policy_is_named(content: bytes | None, tmp_path: Path) -> None:
    """And made again when it is deleted, as the message says."""
    whole = tiny.run(tiny.plan(1), tmp_path).rows
    (policy,) = (tmp_path / "models").glob("*.zip")
    policy.write_bytes(policy.read_bytes()[:-50] if content is None else content)
    with pytest.raises(RuntimeError, match=f"{policy.name} in the folder of the models is broken .*delete it"):
        tiny.run(tiny.plan(2), tmp_path)
    policy.unlink()
    assert tiny.run(tiny.plan(2), tmp_path).rows[: len(whole)] == whole


def test_a_result_tells_its_trial_and_the_versions(tmp_path: Path) -> None:
    tiny.run(tiny.plan(1), tmp_path)
    (path,) = tiny.files(tmp_path)
    content = json.loads(path.read_text())
    assert content["trial"]["method"]["name"] == tiny.ONE_LAYER.name
    assert content["versions"]["torch"] == torch.__version__


# ---------------------------------------------------------------------- failures


def test_a_failed_trial_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    bad = tiny.trial(method=Method("no such method", "nothing"))
    with pytest.raises(RuntimeError, match=r"1 trials failed, first success-no-such-method.*there are kbt"):
        tiny.run([bad, *tiny.plan(2)], tmp_path)
    assert len(list(tiny.files(tmp_path))) == 2


def test_an_interrupt_loses_nothing_that_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(trial: Trial, policy: bytes) -> Any:
        if trial.stream_seed == 2:
            raise KeyboardInterrupt
        return perform(trial, policy)

    monkeypatch.setattr(runner, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tiny.plan(3), tmp_path)
    assert len(list(tiny.files(tmp_path))) == 2


class Fragile(Executor):
    """Breaks at every third call, as a pool of processes does when one is killed."""

    def __init__(self, calls: list[int]) -> None:
        self._calls = calls

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._calls.append(1)
        if len(self._calls) % 3 == 0:
            raise BrokenProcessPool("a worker died")
        return Serial().submit(fn, *args, **kwargs)


def test_a_new_executor_goes_on_where_one_broke(tmp_path: Path) -> None:
    calls: list[int] = []
    table = tiny.run(tiny.plan(4), tmp_path / "broken", lambda: Fragile(calls))
    assert table.rows == tiny.run(tiny.plan(4), tmp_path / "whole").rows
    assert len(calls) == 1 + 4 + 2  # the policy, the trials, and two calls that broke


def test_executors_that_break_again_and_again_end_with_an_error(tmp_path: Path) -> None:
    class Broken(Executor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            raise BrokenProcessPool("a worker died")

    with pytest.raises(RuntimeError, match=r"died 3 times .* with 1 jobs left, among them cloned-shifted"):
        tiny.run(tiny.plan(2), tmp_path, Broken)


# ---------------------------------------------------------------------- executors


def test_trials_that_measure_time_run_alone_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(runner, "perform", lambda trial, policy: seen.append((trial.stream_seed, len(seen))) or [])
    trials = tiny.plan(3)
    tiny.run([replace(trials[0], alone=True), *trials[1:]], tmp_path)
    assert [seed for seed, _ in seen] == [1, 2, 0]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return tiny.run(tiny.plan(3), tmp_path_factory.mktemp("serial"))


def test_threads_give_what_one_process_gives(serial: Table, tmp_path: Path) -> None:
    assert tiny.run(tiny.plan(3), tmp_path, partial(ThreadPoolExecutor, 2)).rows == serial.rows


@pytest.mark.slow
def test_processes_give_what_one_process_gives(serial: Table, tmp_path: Path) -> None:
    assert tiny.run(tiny.plan(3), tmp_path, maker("processes", 2)).rows == serial.rows


def die_once(mark: Path, trial: Trial, policy: bytes) -> Any:
    """The trial, but for the first call of all, which kills the process it runs in."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return perform(trial, policy)
    return os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_killed_worker_costs_no_result(serial: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "perform", partial(die_once, tmp_path / "mark"))
    pool: list[Executor] = []

    def make() -> Executor:
        pool.append(processes(2))
        return pool[-1]

    assert tiny.run(tiny.plan(3), tmp_path, make).rows == serial.rows
    assert len(pool) == 3  # for the policy, and for the trials before and after the kill
    assert isinstance(pool[0], ProcessPoolExecutor)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\nfrom studies.executors import processes\n"
        "if __name__ == '__main__':\n"
        "    pool = processes(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(0.5)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, env=_environment(), check=False
    )
    worker = int(done.stdout)
    for _ in range(600):
        if not _runs(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_ray_cluster_gives_the_same_table_although_a_worker_is_killed(
    serial: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "kbt_rl[ray]"')
    monkeypatch.setenv("PYTHONPATH", _environment()["PYTHONPATH"] + os.pathsep + str(Path(__file__).parent))
    monkeypatch.setattr(runner, "perform", partial(die_once, tmp_path / "mark"))
    table = tiny.run(tiny.plan(3), tmp_path / "ray", partial(RayExecutor, 2))
    assert (tmp_path / "mark").exists()
    assert table.rows == serial.rows


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "kbt_rl\[ray\]"'):
        maker("ray", 2)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
