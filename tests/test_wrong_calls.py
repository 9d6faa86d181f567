"""Wrong kinds of values in the public calls: an error that says what came and what is expected, or it works.

Every argument of every call here gets values of every wrong kind. A raw error of Python, NumPy, PyTorch or SB3 tells a
user nothing about his mistake, and what is accepted silently fails later, or never.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from learners import NOMINAL, SHIFTED, changed, expert, kbt, pretrained, states, warm_start, weights
from stable_baselines3 import PPO

import kbt_rl
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.identification import SelfTuningLQR
from kbt_rl.agents.levels import ForceLevels
from kbt_rl.agents.linear_model import pendulum_prior
from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.arguments import between, choice, flag, number, seed, whole
from kbt_rl.callbacks import (
    Forgetting,
    IdentificationCallback,
    IidStream,
    ProcessNoise,
    Random,
    RecordedStream,
    ReopenOnDetection,
    TowardsPrior,
    UncertainStream,
    VarianceGate,
    VisitedStream,
)
from kbt_rl.envs import (
    DiscreteInvertedPendulumEnv,
    DynamicsShift,
    InvertedPendulumEnv,
    InvertedPendulumParams,
    InvertedPendulumVectorEnv,
)
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv
from kbt_rl.envs.schedule import RandomWalkDrift, ScheduledShifts
from kbt_rl.inference.change_detection import Cusum, LogLossCusum, WindowedChiSquare

NAN, INF = math.nan, math.inf
ROWS = states(2)
LABELS = expert(NOMINAL).label(ROWS)
MASKED = np.ma.masked_array([1.0, 2.0], mask=[True, False])
VALUES: dict[str, Any] = {
    "nan": NAN, "inf": INF, "-inf": -INF, "-1": -1, "0": 0, "0.5": 0.5, "huge": 10**30, "-huge": -(10**30),
    "text": "x", "empty text": "", "bytes": b"a", "None": None, "complex": 1j, "True": True, "object": object(),
    "array": np.array([1.0, 2.0]), "masked": MASKED, "complex array": np.array([1j]), "text array": np.array(["a"]),
    "object array": np.array([None]), "0-d nan": np.array(NAN), "float32 nan": np.float32(NAN),
    "tensor": torch.tensor(NAN), "list": [], "ragged": [[1], [2, 3]], "dict": {}, "tuple": (), "function": lambda: 0,
    "class": int,
}  # fmt: skip
#: No number, flag, word or array that an argument could mean.
NEVER = ("nan", "-inf", "complex", "complex array", "masked", "text array", "0-d nan", "float32 nan", "tensor")
SHAPED: dict[str, Callable[[Any], Any]] = {
    "complex rows": lambda rows: rows + 1j, "masked rows": lambda rows: np.ma.masked_array(rows, mask=True),
    "rows of nan": lambda rows: rows * NAN, "infinite rows": lambda rows: np.full_like(rows, INF),
    "rows of objects": lambda rows: rows.astype(object), "rows of text": lambda rows: rows.astype(str),
    "one number": lambda rows: rows.flat[0], "an axis more": lambda rows: rows[None],
    "a list": lambda rows: rows.tolist(),
    "a tensor": lambda rows: torch.from_numpy(rows.copy()),
}  # fmt: skip
#: What Python and the libraries below say, by which nobody finds the argument.
RAW = re.compile(
    r"not supported between|truth value|only (0-dim|length-1|size-1|integer|one element)|object has no|has no len|"
    r"must be real number, not|not callable|cannot (convert|cast|be interpreted)|can't convert|is not iterable|"
    r"could not convert (string|complex)|unsupported operand|unhashable|must be str|float\(\) argument|"
    r"int\(\) argument|seed must be|inhomogeneous shape after|0-d tensor|unsized|ufunc|not subscriptable|"
    r"unexpected keyword|expected str, bytes|too many values|not enough values",
    re.IGNORECASE,
)


class Case:
    """A call with good arguments, each of which is replaced by bad ones in turn.

    Args:
        call: Takes the arguments by name.
        may: Arguments that may take some of the values that otherwise nothing takes.
        **good: The good ones.
    """

    def __init__(self, call: Callable[..., Any], may: dict[str, tuple[str, ...]] | None = None, **good: Any) -> None:
        self.call, self.may, self.good = call, may or {}, good


def env() -> Any:
    return gym.make(NOMINAL)


@functools.cache
def learner(kind: str) -> Any:
    return kbt() if kind == "kbt" else warm_start()


@functools.cache
def adapted() -> Any:
    policy = kbt_rl.adapt(PPO("MlpPolicy", SHIFTED, n_steps=8, batch_size=8, seed=0), states=states(50))
    policy.predict(ROWS)
    return policy


def fresh(make: Callable[[], Any], method: str) -> Callable[..., Any]:
    """A method of an environment that has been reset."""

    def call(**arguments: Any) -> Any:
        subject = make()
        if method != "reset":
            subject.reset(seed=0)
        return getattr(subject, method)(**arguments)

    return call


def settings(kind: type[Any]) -> dict[str, Any]:
    return {field.name: getattr(kind(), field.name) for field in fields(kind)}


def pendulum(**arguments: Any) -> DynamicsShift:
    return DynamicsShift(gym.make("Pendulum-v1"), **arguments)


INFINITE = ("inf",)
CASES: dict[str, Case] = {
    "KBT": Case(
        kbt_rl.KBT, env=env(), n_steps=10, policy_kwargs=None, stats_window_size=100, tensorboard_log=None, verbose=0,
        seed=0, device="cpu", per_env=False, policy="DecisionTransformerPolicy",
    ),
    "WarmStart": Case(kbt_rl.WarmStart, env=env(), memory=5, epochs=2, learning_rate=1e-3, n_steps=10, seed=0),
    "policy": Case(
        kbt_rl.DecisionTransformerPolicy, observation_space=env().observation_space, action_space=env().action_space,
        transformer=None, observation_scale=None, skip="none", head=None, sampling="epistemic", posteriors=1,
    ),
    "transformer": Case(kbt_rl.DecisionTransformerConfig, **settings(kbt_rl.DecisionTransformerConfig)),
    "pretraining": Case(PretrainConfig, **settings(PretrainConfig)),
    "head": Case(kbt_rl.HeadConfig, **settings(kbt_rl.HeadConfig)),
    "adapter": Case(
        kbt_rl.KalmanAdapter, expert=expert(), stream="iid", query=None, budget=3, delay=0, check_expert=True,
        verbose=0, strategy=None,
    ),
    "fallback": Case(functools.partial(kbt_rl.Fallback, expert()), limit=1.0),
    "gate": Case(VarianceGate, threshold=1.0),
    "random": Case(Random, probability=0.5),
    "visited": Case(VisitedStream, every=1),
    "uncertain": Case(UncertainStream, pool=3, box=None),
    "iid": Case(IidStream, box=None),
    "recorded": Case(RecordedStream, observations=ROWS, targets=LABELS, may={"targets": ("rows of nan",)}),
    "forgetting": Case(Forgetting, factor=0.9),
    "process noise": Case(ProcessNoise, scale=0.9),
    "towards prior": Case(TowardsPrior, fraction=0.9),
    "reopen": Case(ReopenOnDetection, monitor=None, misfit=0.01, noise_lag=0, fraction=1.0, rest=25),
    "identification": Case(IdentificationCallback, expert=SelfTuningLQR.for_env(env()), verbose=0),
    "self-tuning": Case(
        SelfTuningLQR.for_env, env=env(), Q=None, R=None, spread=20.0, model_error=0.5, forgetting=1.0, dt=0.02,
        region=(1.0, 1.0, 1.0, 1.0), tolerance=1e-3,
    ),
    "lqr of an env": Case(kbt_rl.LQRExpert.for_env, env=env(), Q=None, R=None, tracking=False, temperature=None),
    "lqr": Case(
        kbt_rl.LQRExpert, observation_space=env().observation_space, action_space=env().action_space,
        gain=expert().gain, max_force=120.0, params=None, levels=None,
    ),
    "gain": Case(lqr_gain, params=InvertedPendulumParams(), Q=None, R=None),
    "levels": Case(ForceLevels, forces=(-1.0, 1.0), temperature=1.0),
    "prior": Case(
        pendulum_prior, nominal=InvertedPendulumParams(), spread=20.0, model_error=0.5, forgetting=1.0, dt=0.02
    ),
    "params": Case(InvertedPendulumParams, cart_mass=1.0, pole_mass=1.0, gravity=9.8, max_force=1.0),
    "env": Case(InvertedPendulumEnv, cart_mass=1.0, max_force=1.0, render_mode=None),
    "discrete env": Case(DiscreteInvertedPendulumEnv, forces=(-1.0, 1.0), cart_mass=1.0),
    "vector env": Case(
        InvertedPendulumVectorEnv, num_envs=2, max_episode_steps=5, render_mode=None,
        autoreset_mode=AutoresetMode.NEXT_STEP, cart_mass=1.0, max_force=1.0,
    ),
    "sb3 env": Case(InvertedPendulumSB3VecEnv, env_id=NOMINAL, num_envs=2, cart_mass=1.0),
    "step": Case(fresh(InvertedPendulumEnv, "step"), action=np.zeros(1)),
    "reset": Case(fresh(InvertedPendulumEnv, "reset"), seed=0, options=None),
    "set dynamics": Case(fresh(InvertedPendulumEnv, "set_dynamics"), cart_mass=1.0, pole_mass=1.0),
    "vector step": Case(fresh(lambda: InvertedPendulumVectorEnv(2), "step"), actions=np.zeros((2, 1))),
    "vector reset": Case(fresh(lambda: InvertedPendulumVectorEnv(2), "reset"), seed=0, options=None),
    "vector dynamics": Case(
        fresh(lambda: InvertedPendulumVectorEnv(2), "set_dynamics"), indices=[0], cart_mass=1.0, pole_mass=1.0
    ),
    "start state": Case(lambda state: InvertedPendulumEnv().reset(options={"state": state}), state=np.zeros(4)),
    "shift": Case(
        pendulum, values={"m": 1.2}, at=[(3, {"m": 1.0})], drift={"l": 1e-5}, ranges={"g": (9.0, 10.0)},
        bounds={"g": (1.0, 20.0)}, world=None,
    ),
    "shifted value": Case(lambda m: pendulum(values={"m": m}), m=1.2),
    "shift time": Case(lambda time: pendulum(at=[(time, {"m": 1.0})]), time=3),
    "drift rate": Case(lambda rate: pendulum(drift={"m": rate}), rate=0.1),
    "range": Case(lambda low: pendulum(ranges={"m": (low, 2.0)}), low=0.1),
    "schedule": Case(lambda shifts: ScheduledShifts(env(), shifts), shifts=[(1, {"pole_mass": 1.0})]),
    "walk": Case(lambda **given: RandomWalkDrift(env(), **given), rate=0.1, bounds=None, seed=0),
    "cusum": Case(Cusum, **Cusum(1e-3).settings()),
    "log loss": Case(LogLossCusum, **LogLossCusum(1e-3).settings()),
    "window": Case(WindowedChiSquare, **WindowedChiSquare().settings()),
    "learn": Case(
        lambda **given: learner("kbt").learn(**given), callback=None, total_timesteps=2, log_interval=1,
        tb_log_name="x", reset_num_timesteps=True, progress_bar=False,
    ),
    "adapted learn": Case(
        lambda **given: adapted().learn(**given), env=gym.make(SHIFTED), total_timesteps=2, callback=None, n_steps=1,
        seed=0, verbose=0, progress_bar=False, tb_log_name="x",
    ),
    "pretrain": Case(
        lambda **given: learner("kbt").pretrain(**given), expert=expert(NOMINAL), progress_bar=False,
        config=PretrainConfig(samples=20, steps=1),
    ),
    "moments": Case(lambda observation: learner("kbt").policy.predict_moments(observation), observation=ROWS),
    "fallback of a model": Case(lambda fallback: learner("kbt").set_fallback(fallback), fallback=None),
    "select": Case(lambda index: learner("kbt").policy.select(index), index=0),
    "prior choice": Case(
        lambda model, stream, candidates: kbt_rl.choose_prior(model, stream, candidates=candidates),
        model=pretrained(), stream=[kbt_rl.Sample(ROWS, LABELS)], candidates=[kbt_rl.HeadConfig()],
    ),
    "adapt": Case(
        lambda **given: kbt_rl.adapt(adapted().model, **given), states=states(20), head=None, skip="none",
        layer="auto", vec_normalize=None, history=0,
    ),
    "adapted predict": Case(lambda **given: adapted().predict(**given), observation=ROWS, deterministic=True),
    "adapted update": Case(
        lambda **given: adapted().update(**given), observation=ROWS, label=LABELS, kind="action",
        may={"label": ("rows of nan",)},
    ),
    "adapted moments": Case(lambda observation: adapted().predict_moments(observation), observation=ROWS),
    "observe": Case(
        lambda **given: SelfTuningLQR.for_env(env()).observe(**given), states=ROWS, actions=np.zeros((2, 1)),
        next_states=ROWS,
    ),
    "label": Case(lambda observations: expert().label(observations), observations=ROWS),
    "lqr predict": Case(lambda observation: expert().predict(observation), observation=ROWS),
}  # fmt: skip
for _kind in ("kbt", "warm start"):
    CASES |= {
        f"{_kind} predict": Case(
            lambda _kind=_kind, **given: learner(_kind).predict(**given), observation=ROWS, state=None,
            episode_start=None, deterministic=True,
        ),
        f"{_kind} predict one": Case(
            lambda _kind=_kind, **given: learner(_kind).predict(**given), observation=ROWS[0], deterministic=True
        ),
        f"{_kind} sample": Case(
            lambda _kind=_kind, **given: learner(_kind).update(kbt_rl.Sample(**given)), context=ROWS, target=LABELS,
            mask=None, features=None, kind="action", may={"target": ("rows of nan",)},
        ),
        f"{_kind} update": Case(
            lambda sample, _kind=_kind: learner(_kind).update(sample), sample=kbt_rl.Sample(ROWS, LABELS)
        ),
        f"{_kind} set_env": Case(lambda env, _kind=_kind: learner(_kind).set_env(env), env=gym.make(SHIFTED)),
        f"{_kind} start_from": Case(lambda other, _kind=_kind: learner(_kind).start_from(other), other=pretrained()),
    }  # fmt: skip

CASES["head"].may = {"noise_memory": INFINITE}
CASES["fallback"].may = {"limit": INFINITE}
CASES["self-tuning"].may = {"region": INFINITE}


@contextmanager
def in_time(seconds: int) -> Iterator[None]:
    """An error if it takes longer, where the platform has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: object) -> None:
        raise AssertionError(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempts(name: str, argument: str) -> dict[str, Any]:
    """Bad values for an argument: all that are never good, and some of the others, always the same."""
    good = CASES[name].good[argument]
    values = {key: make(good) for key, make in SHAPED.items()} if isinstance(good, np.ndarray) else {}
    slow = "None" if argument == "config" else ""  # a pre-training of the usual size
    others = [key for key in VALUES if key not in (*NEVER, slow)]
    picked = random.Random(f"{name} {argument}").sample(others, 10)
    return values | {key: VALUES[key] for key in (*NEVER, *picked)}


#: Never right for rows of numbers; the other shapes may be.
NEVER_ROWS = ("complex rows", "masked rows", "rows of nan", "infinite rows", "rows of objects", "rows of text")


def fault(case: Case, argument: str, kind: str, value: Any) -> str | None:
    """What is wrong with what a call makes of a bad value."""
    try:
        with in_time(120), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call(**{**case.good, argument: value})
    except (TypeError, ValueError, IndexError) as error:
        raw = RAW.search(str(error)) or len(str(error)) < 15
        return f"{type(error).__name__}: {error}" if raw else None
    except Exception as error:
        # SB3's assertions about spaces, and files that are not there, say enough.
        said = isinstance(error, (AssertionError, OSError)) and argument in ("env", "states", "vec_normalize")
        return None if said else repr(error)
    allowed = kind in case.may.get(argument, ()) or kind not in (*NEVER, *NEVER_ROWS)
    return None if allowed else "was accepted"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_value_is_named_or_works(name: str) -> None:
    case = CASES[name]
    case.call(**case.good)
    tried = [(argument, *item) for argument in case.good for item in attempts(name, argument).items()]
    found = {f"{argument}={kind}": fault(case, argument, kind, value) for argument, kind, value in tried}
    assert not {where: what for where, what in found.items() if what is not None}


@pytest.mark.filterwarnings("ignore")
def test_refused_calls_change_nothing() -> None:
    for kind in ("kbt", "warm start"):
        model = learner(kind)
        before, used = weights(model), model.labels_used
        for argument in ("context", "target", "mask", "features", "kind"):
            for value in (*VALUES.values(), *(make(ROWS) for make in SHAPED.values())):
                try:
                    info = model.update(kbt_rl.Sample(**{"context": ROWS, "target": LABELS, argument: value}))
                except (TypeError, ValueError):
                    assert model.labels_used == used
                    assert not changed(before, weights(model))
                else:
                    before, used = weights(model), used + info.labels


@pytest.mark.parametrize("kind", ["kbt", "warm start"])
@pytest.mark.parametrize("spoil", ["complex rows", "masked rows", "rows of objects", "rows of text"])
def test_predict_refuses_what_update_refuses(kind: str, spoil: str) -> None:
    model, bad = learner(kind), SHAPED[spoil](ROWS)
    _, state = model.predict(ROWS)
    calls: list[Callable[[], Any]] = [
        lambda: model.predict(bad), lambda: model.predict(bad[0]), lambda: model.predict(bad, state),
        lambda: model.update(kbt_rl.Sample(bad, LABELS)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(TypeError, match=r"masked array|expected real numbers"):
            call()


@pytest.mark.parametrize("method", ["save", "load"])
@pytest.mark.parametrize("kind", ["kbt", "warm start", "policy", "adapted"])
@pytest.mark.parametrize("bad", [kind for kind in VALUES if "text" not in kind or "array" in kind])
def test_a_path_is_a_path(method: str, kind: str, bad: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    subject = {"policy": lambda: learner("kbt").policy, "adapted": adapted}.get(kind, lambda: learner(kind))()
    more = (subject.model,) if (kind, method) == ("adapted", "load") else ()
    with pytest.raises(TypeError, match=r"path is .*; expected a path"):
        getattr(subject if method == "save" else type(subject), method)(VALUES[bad], *more)


@pytest.mark.parametrize("steps", [NAN, INF, -1, 0.5, 10**30, "10", None, 1j, MASKED])
def test_a_number_of_steps_is_one(steps: Any) -> None:
    model = kbt()
    for run in (model.learn, functools.partial(adapted().learn, gym.make(SHIFTED))):
        with pytest.raises((TypeError, ValueError), match="total_timesteps is"):
            run(steps, callback=kbt_rl.KalmanAdapter(expert()))
    model.learn(3e0, callback=kbt_rl.KalmanAdapter(expert()))  # type: ignore[arg-type]  # as people write 1e6
    assert model.num_timesteps == 3


def test_the_checks_take_what_is_meant_and_return_plain_numbers() -> None:
    for value in (3, 3.0, np.int64(3), np.float32(3), np.uint8(3)):
        assert whole("n", value) == number("n", value) == between("n", value, 0, expected="") == 3
        assert seed("s", value) == 3
        assert type(whole("n", value)) is int
    assert flag("f", np.True_) is True
    assert seed("s", None) is None
    assert number("n", INF) == INF
    assert choice("c", "a", ("a", "b")) == "a"
    for bad in (True, np.False_, "3", None, 3j, [3], np.array([3]), MASKED):
        for check in (whole, number, seed, functools.partial(between, low=0, expected="a number")):
            if check is seed and bad is None:
                continue
            with pytest.raises(TypeError, match=r"n is .*; expected a|n is .*; a "):
                check("n", bad)
    long = copy.deepcopy(list(range(1_000)))
    with pytest.raises(TypeError, match=r"n is \[0, 1, .*\.\.\. \(list\)"):
        whole("n", long)
