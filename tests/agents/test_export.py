"""Policies as safetensors files: the same bits back, and every wrong file named and refused."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import LONGER, SHIFTED, changed, expert, kbt, learner, longer_kbt, states, warm_start, weights
from safetensors.torch import load_file, save_file

from kbt_rl import KBT, HeadConfig, Sample
from kbt_rl.agents.export import FORMAT, load_safetensors, save_safetensors
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.transformer_policy import TransformerPolicy


def learned() -> KBT:
    model = kbt()
    model.update(Sample(states(3), expert().label(states(3))))
    return model


def header_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return header


def rewritten(
    path: Path,
    *,
    header: dict[str, str] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    forged: bool = True,
) -> Path:
    """The file with other header entries or tensors, under another name, and with the digest of that if ``forged``."""
    other = path.with_name("rewritten.safetensors")
    new, content = {**header_of(path), **(header or {})}, {**load_file(path), **(tensors or {})}
    if forged:
        new["sha256"] = FORMAT.digest(new, content)
    save_file(content, other, new)
    return other


def settings_of(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(header_of(path)["settings"])
    return settings


MODELS: dict[str, Any] = {
    "KBT": learned,
    "warm start": warm_start,
    "context": longer_kbt,
    "learned noise": lambda: kbt(policy_kwargs={"head": HeadConfig(noise="learned", structure="neuron")}),
    "deep": lambda: kbt(policy_kwargs={"head": HeadConfig(layers=3, structure="layer", robust_dof=4.0)}),
    "one for each environment": lambda: learner(KBT, n_envs=9, per_env=True),
    "discrete": lambda: KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0"), seed=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_comes_back_bit_for_bit_and_acts_the_same(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    path = save_safetensors(model, tmp_path / "policy")
    assert path == tmp_path / "policy.safetensors"
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]
    policy = load_safetensors(tmp_path / "policy")
    assert type(policy) is type(model.policy)
    assert not changed(weights(model), weights(policy))
    assert (policy.observation_space, policy.action_space) == (model.observation_space, model.action_space)
    for ours, theirs in zip(
        policy.predict(states(9), deterministic=True), model.predict(states(9), deterministic=True), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours[0]), np.asarray(theirs[0]))


def test_a_loaded_posterior_goes_on_learning_as_the_saved_one(tmp_path: Path) -> None:
    model, other = learned(), kbt()
    load_safetensors(save_safetensors(model, tmp_path / "policy"), into=other)
    assert not changed(weights(model), weights(other))
    sample = Sample(states(2, seed=5), expert().label(states(2, seed=5)))
    np.testing.assert_equal(dataclasses.astuple(model.update(sample)), dataclasses.astuple(other.update(sample)))
    assert not changed(weights(model), weights(other))


def test_a_policy_alone_is_saved_and_filled(tmp_path: Path) -> None:
    model, other = learned(), kbt()
    path = save_safetensors(model.policy, str(tmp_path / "policy.safetensors"))
    assert load_safetensors(str(path), into=other.policy) is other.policy
    assert not changed(weights(model), weights(other))


def test_the_file_holds_no_pickle_and_states_its_version(tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    header = header_of(path)
    assert header["format_version"] == str(FORMAT.version) == "2"
    assert header["sha256"] == FORMAT.digest(header, load_file(path))
    assert json.loads(header["forces"])["max_force"] == 120.0
    assert settings_of(path)["head"]["rule"] == "measure"
    assert load_file(path)["policy.head.mean"].dtype == torch.float64


def test_the_digest_tells_all_content_apart(tmp_path: Path) -> None:
    """Settings, names, shapes, dtypes and every byte; and nothing else, so that the same policy has the same."""
    path = save_safetensors(learned(), tmp_path / "policy")
    header, tensors = header_of(path), load_file(path)
    mean = tensors["policy.head.mean"]
    others = [
        FORMAT.digest({**header, "settings": header["settings"] + " "}, tensors),
        FORMAT.digest({**header, "forces": "{}"}, tensors),
        FORMAT.digest(header, {name: value for name, value in tensors.items() if name != "policy.head.mean"}),
        FORMAT.digest(header, {**tensors, "policy.head.mean": mean.view(1, -1)}),
        FORMAT.digest(header, {**tensors, "policy.head.mean": mean.view(torch.int64)}),
        FORMAT.digest(header, {**tensors, "policy.head.mean": mean.nextafter(mean + 1.0)}),
    ]
    assert len({FORMAT.digest(header, tensors), *others}) == 1 + len(others)
    assert header_of(save_safetensors(learned(), tmp_path / "again"))["sha256"] == FORMAT.digest(header, tensors)


# ---------------------------------------------------------------------- what is saved can be loaded


def test_posteriors_after_many_rows_at_once_are_loaded(tmp_path: Path) -> None:
    model = kbt(policy_kwargs={"head": HeadConfig(layers=2)})
    for seed in range(3):
        model.update(Sample(states(16, seed=seed), expert().label(states(16, seed=seed))))
    loaded = load_safetensors(save_safetensors(model, tmp_path / "policy"))
    assert not changed(weights(model), weights(loaded))


def broken_mean(model: KBT) -> None:
    model.policy.head.mean[0] = np.nan


def broken_root(model: KBT) -> None:
    model.policy.head.cov_0[..., 0, 1] = 1.0


def broken_noise(model: KBT) -> None:
    model.policy.head.noise_cov.fill_(-1.0)


def broken_scale(model: KBT) -> None:
    model.policy.transformer.observation_scale[0] = 0.0


@pytest.mark.parametrize("break_", [broken_mean, broken_root, broken_noise, broken_scale])
def test_what_could_not_be_loaded_is_not_saved(break_: Any, tmp_path: Path) -> None:
    path, model = save_safetensors(learned(), tmp_path / "policy"), learned()
    before = path.read_bytes()
    break_(model)
    with pytest.raises(ValueError, match="this policy is not saved, as it could not be loaded"):
        save_safetensors(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]


# ---------------------------------------------------------------------- wrong files


def assert_refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    """By a fresh start, and by a model that stays as it was."""
    model = learned()
    before = weights(model)
    for into in (None, model, model.policy):
        with pytest.raises(error, match=message):
            load_safetensors(path, into=into)
    assert not changed(before, weights(model))


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(path, "truncated or no safetensors file")


def test_other_files_are_refused(tmp_path: Path) -> None:
    kbt().save(tmp_path / "model.zip")
    assert_refused(tmp_path / "model.zip", "truncated or no safetensors file")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", r"no policy of kbt_rl: its header lacks \['forces'")
    assert_refused(
        tmp_path / "missing", r"there is no file \S*/missing or \S*/missing\.safetensors;", FileNotFoundError
    )
    assert_refused(tmp_path / "missing.safetensors", r"there is no file \S*/missing\.safetensors;", FileNotFoundError)


def test_another_version_is_named(tmp_path: Path) -> None:
    path = rewritten(save_safetensors(learned(), tmp_path / "policy"), header={"format_version": "1"})
    assert_refused(path, "format version 1; this version of kbt_rl reads 2")


ZERO = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head.mean", lambda mean: mean[:3], "head.mean has shape"),
        ("head.mean", lambda mean: mean.float(), "was cast has lost digits"),
        ("head.mean", lambda mean: mean.index_fill(0, torch.tensor(1), torch.nan), "head.mean holds NaN or infinity"),
        ("head.cov_0", lambda root: root.mT, "no root of a covariance"),
        ("head.cov_0", lambda root: root.repeat(2, 1, 1), r"groups \[0\]; there are 2"),
        ("head.cov_1", lambda group: group + 1, r"groups \[1\]; there are 1"),
        ("head.noise_cov", lambda noise: -noise, "eigenvalue -1e-06"),
        ("head.target_scale", lambda scale: 0 * scale, "target_scale is not positive"),
        ("head.unheard_of", lambda _: ZERO, "another architecture"),
        ("transformer.linear.weight", lambda weight: weight[:, :3], "another architecture"),
        ("transformer.observation_scale", lambda scale: -scale, "observation_scale is not positive"),
    ],
)
def test_tensors_that_are_no_policy_are_refused(name: str, change: Any, message: str, tmp_path: Path) -> None:
    """Also with the digest that belongs to them: it protects against damage, not against forgers."""
    path = save_safetensors(learned(), tmp_path / "policy")
    tensors = {f"policy.{name}": change(load_file(path).get(f"policy.{name}")).contiguous()}
    assert_refused(rewritten(path, tensors=tensors), message)
    assert_refused(rewritten(path, tensors=tensors, forged=False), "is damaged")


INTEGERS = [2.0, True, "2", None, [], 10**7, 10**30, 0, -1, float("nan"), float("inf")]
NUMBERS = ["1", True, None, [], float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((f"transformer.{name}", INTEGERS) for name in ("layers", "width", "heads", "feedforward", "context_length")),
        ("transformer.max_timestep", [value for value in INTEGERS if value != 10**7]),
        ("transformer.norm_first", [1, "true", None]),
        ("transformer.target_return", ["1", True, float("nan"), float("inf")]),
        *((f"head.{name}", INTEGERS) for name in ("layers", "relu_order")),
        ("head.width", [value for value in INTEGERS if value not in (None, 10**7)]),
        ("head.history", [2.5, True, -1, float("nan"), 10**30]),
        *((f"head.{name}", NUMBERS) for name in ("noise_variance", "hidden_variance")),
        ("head.last_variance", [value for value in NUMBERS if value is not None]),
        ("skip", ["none", "unheard of", None]),
        *((f"head.{name}", NUMBERS[:-1]) for name in ("noise_start", "forgetting_rate", "active_probability")),
        ("head.noise_memory", ["1", None, float("nan"), -float("inf")]),
        ("head.rho", ["1", True, float("nan"), 2.0]),
        ("head.structure", ["neuron", "unheard of", 1, None]),
        ("head.rule", ["fisher", ["measure"]]),
        ("head.unheard_of", [1]),
        ("head", [None, [], "x", {}]),
        ("sampling", ["unheard of", None]),
        ("posteriors", [0, 2, 10**7, 1.0, True, None]),
        ("policy", ["os.system", None, ["KBT"], "TransformerPolicy"]),
        ("observation_space", [None, {}, {"kind": "Box"}, {"kind": "Box", "dtype": "float64"}, {"kind": "Dict"}]),
        ("action_space", [{"kind": "Discrete", "n": 1.5, "start": 0}, {"kind": "Discrete", "n": 10**9, "start": 0}]),
        ("unheard_of", [1]),
    ],
)
def test_forged_settings_are_refused_before_anything_is_built(name: str, values: list[Any], tmp_path: Path) -> None:
    """Also those that would be built for minutes."""
    path = save_safetensors(learned(), tmp_path / "policy")
    for value in values:
        settings = settings_of(path)
        *inside, last = name.split(".")
        (settings[inside[0]] if inside else settings)[last] = value
        forged = rewritten(path, header={"settings": json.dumps(settings)})
        started = time.perf_counter()
        with pytest.raises(ValueError, match="is not loaded, and nothing has changed"):
            load_safetensors(forged)
        assert time.perf_counter() - started < 1.0, f"{name} = {value} was built"


@pytest.mark.parametrize("settings", ["{", "[]", "null", "1", "[" * 100_000])
def test_settings_that_are_no_settings_are_refused(settings: str, tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    assert_refused(rewritten(path, header={"settings": settings}), "is not loaded, and nothing has changed")


def test_settings_that_are_missing_are_refused(tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    for part in ("head", "transformer", None):
        names = settings_of(path)[part] if part else settings_of(path)
        for name in names:
            settings = settings_of(path)
            del (settings[part] if part else settings)[name]
            with pytest.raises(ValueError, match="is not loaded, and nothing has changed"):
                load_safetensors(rewritten(path, header={"settings": json.dumps(settings)}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (warm_start, "'TransformerPolicy' in the file"),
        (longer_kbt, r"transformer\.context_length is 3 in the file and 1 here"),
        (
            lambda: kbt(policy_kwargs={"head": HeadConfig(structure="neuron", noise_variance=1e-6)}),
            r"head\.structure is 'neuron' in the file",
        ),
        (
            lambda: kbt(policy_kwargs={"head": HeadConfig(noise_variance=0.5)}),
            r"head\.noise_variance is 0\.5 in the fil",
        ),
        (lambda: KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0")), r"action_space\.\w+ is"),
        (lambda: KBT(env=gym.make(SHIFTED, max_force=60.0)), r"max_force is 60\.0 in the file and 120\.0 here"),
    ],
    ids=["class", "context", "structure", "noise", "actions", "force"],
)
def test_a_file_of_another_architecture_changes_nothing(make: Any, message: str, tmp_path: Path) -> None:
    path = save_safetensors(make(), tmp_path / "policy")
    model = learned()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        load_safetensors(path, into=model)
    assert not changed(before, weights(model))


def test_a_class_of_ones_own_is_not_saved(tmp_path: Path) -> None:
    class Mine(DecisionTransformerPolicy):
        pass

    policy = Mine(kbt().observation_space, kbt().action_space)
    with pytest.raises(TypeError, match="Mine is not one of TransformerPolicy, DecisionTransformerPolicy"):
        save_safetensors(policy, tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_safetensors(kbt(), path), lambda: load_safetensors(path)):
        with pytest.raises(ImportError, match=r'pip install "kbt_rl\[export\]"'):
            call()


def test_an_old_file_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        save_safetensors(kbt(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]


def test_unbounded_observations_keep_their_infinite_bounds(tmp_path: Path) -> None:
    space = gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)
    policy = TransformerPolicy(space, kbt().action_space, transformer=LONGER)
    loaded = load_safetensors(save_safetensors(policy, tmp_path / "policy"))
    assert loaded.observation_space == space
