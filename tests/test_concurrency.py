"""One thread learns, others predict: each prediction is that of a posterior that existed, bit for bit."""

from __future__ import annotations

import copy
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import STRUCTURES, randn
from torch import Tensor, nn

from kbt_rl.inference import interrupts
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.interrupts import interrupts_deferred

# Rows of one update and a head that takes each way of committing: machine code for a whole update, machine code for the
# commit, and PyTorch for several rows, deeper heads and successive blocks.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    **{f"one row, {structure}": (1, 1, {"structure": structure}) for structure in STRUCTURES},
    "two outputs": (1, 2, {"structure": "joint"}),
    "learned noise": (1, 1, {"structure": "joint", "noise": "learned"}),
    "eight rows": (8, 2, {"structure": "joint"}),
    "forty rows": (40, 1, {"structure": "layer"}),
    "three layers": (6, 1, {"structure": "joint", "layers": 3, "width": 12}),
}


@pytest.fixture
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def make_head(outputs: int, **config: Any) -> BayesianHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(6, outputs)
    return BayesianHead.from_linear(linear, HeadConfig(**{"noise_variance": 0.05, "hidden_variance": 1e-3, **config}))


def everything(head: BayesianHead, probe: Tensor) -> dict[str, bytes]:
    """Each way to ask for a prediction, as bytes, with all its parts together."""
    prediction = head.predict(probe)
    return {
        "forward": head(probe).numpy().tobytes(),
        "predict": b"".join(part.contiguous().numpy().tobytes() for part in prediction),
    }


@pytest.mark.usefixtures("_quick_switches")
@pytest.mark.parametrize("case", CASES)
def test_predictions_during_updates_are_those_of_whole_posteriors(case: str) -> None:
    rows, outputs, config = CASES[case]
    updates = 400 if rows == 1 else 60
    features, labels, probe = (
        randn(updates, rows, 6, seed=1),
        randn(updates, rows, outputs, seed=2),
        randn(5, 6, seed=3),
    )
    head = make_head(outputs, **config)
    twin = copy.deepcopy(head)
    known: dict[str, set[bytes]] = {name: {value} for name, value in everything(twin, probe).items()}
    for row, label in zip(features, labels, strict=True):
        twin.update(row, label)
        for name, value in everything(twin, probe).items():
            known[name].add(value)

    seen: dict[str, set[bytes]] = {name: set() for name in known}
    errors: list[BaseException] = []
    done = [0]  # predictions, roughly: threads may count the same one
    finished = threading.Event()

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
            finished.set()

    def act() -> None:
        while not finished.is_set():
            for name, value in everything(head, probe).items():
                seen[name].add(value)
            done[0] += 1

    def learn() -> None:
        for index, (row, label) in enumerate(zip(features, labels, strict=True)):
            head.update(row, label)
            before = done[0]
            while index % 20 == 0 and done[0] < before + 4 and not errors:  # let the others see something of it
                time.sleep(0.0)
        finished.set()

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (act, act, act, learn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for name, values in seen.items():
        assert not values - known[name], f"{len(values - known[name])} of {len(values)} results of {name} are mixtures"
        assert len(values) >= len(features) // 20, "the acting threads have seen too few posteriors to tell"
    assert torch.equal(head.mean, twin.mean)
    assert torch.equal(head.state.dense_cov(), twin.state.dense_cov())


def test_whoever_acts_does_not_wait_for_an_update_that_changes_nothing_yet() -> None:
    """The published view is there while the lock is held by another thread."""
    head, probe = make_head(1), randn(2, 6, seed=3)
    before, results = head(probe), []
    with head._lock:
        thread = threading.Thread(target=lambda: results.append(head(probe)))
        thread.start()
        thread.join(60.0)
        assert not thread.is_alive()
    assert torch.equal(results[0], before)


@pytest.mark.parametrize("call", ["forward", "predict", "predict_logits"])
def test_a_prediction_waits_while_the_posterior_changes(call: str) -> None:
    head, probe = make_head(1, layers=3, width=12), randn(2, 6, seed=3)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(getattr(head, call)(probe)))
    with head._changing():
        mean = head.mean.clone()
        head.mean.fill_(float("nan"))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        head.mean.copy_(mean)
    thread.join()
    first = results[0] if isinstance(results[0], Tensor) else results[0][0]
    assert bool(torch.isfinite(first).all())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_has_a_lock_of_its_own(duplicate: Any) -> None:
    head = make_head(1)
    other = duplicate(head)
    with head._lock:
        thread = threading.Thread(target=other.update, args=(randn(1, 6, seed=1), randn(1, 1, seed=2)))
        thread.start()
        thread.join(60.0)
        assert not thread.is_alive()


def test_interrupts_are_left_alone_outside_the_main_thread() -> None:
    results: list[bool] = []

    def work() -> None:
        with interrupts_deferred():
            results.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [True]


def test_interrupts_are_as_before_if_the_handler_of_another_signal_raises_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class AnotherSignal:
        """After the first change of a handler."""

        getsignal = staticmethod(signal.getsignal)
        came = False

        def signal(self, number: int, handler: Any) -> Any:
            before = signal.signal(number, handler)
            if not self.came:
                self.came = True
                raise TimeoutError
            return before

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupts, "_signal", AnotherSignal())
    with pytest.raises(TimeoutError), interrupts_deferred():
        pytest.fail("the block must not begin")
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupts_are_as_before_if_the_handler_of_another_signal_raises_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class AnotherSignal:
        """Pending when the handler is put back, which Python then does not do."""

        getsignal = staticmethod(signal.getsignal)
        calls = 0

        def signal(self, number: int, handler: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise TimeoutError
            return signal.signal(number, handler)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(interrupts, "_signal", AnotherSignal())
    with pytest.raises(TimeoutError), interrupts_deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_during_a_block_that_fails_is_delivered_with_the_error() -> None:
    def fail() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("the block failed")

    with pytest.raises(KeyboardInterrupt) as caught:
        fail()
    assert isinstance(caught.value.__context__, ValueError)
