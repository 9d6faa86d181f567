"""What importing the package costs, what it promises, and which way its imports point."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest

import kbt_rl

PACKAGE = Path(kbt_rl.__file__).parent
HEAVY = ("torch", "stable_baselines3", "matplotlib", "pygame", "control")


def imported_heavy_modules(code: str) -> list[str]:
    """Which of the heavy packages a fresh interpreter has loaded after ``code``."""
    report = f"import sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    script = f"{code}\n{report}"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=PACKAGE.parent, check=True, capture_output=True, text=True
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import kbt_rl",
        "import gymnasium, kbt_rl; env = gymnasium.make('kbt_rl/InvertedPendulum-v0', render_mode='rgb_array')\n"
        "env.reset(seed=0); env.step(env.action_space.sample())",
        "import gymnasium, kbt_rl; envs = gymnasium.make_vec('kbt_rl/ShiftedInvertedPendulum-v0', num_envs=2)\n"
        "envs.reset(seed=0); envs.step(envs.action_space.sample())",
        "import kbt_rl; kbt_rl.InvertedPendulumParams",
    ],
)
def test_environments_load_numpy_and_gymnasium_only(code: str) -> None:
    assert imported_heavy_modules(code) == []


def test_expert_does_not_load_python_control_before_it_solves() -> None:
    assert "control" not in imported_heavy_modules("import kbt_rl; kbt_rl.LQRExpert")


def test_detector_of_heavy_modules_works() -> None:
    assert "torch" in imported_heavy_modules("import torch")


@pytest.mark.parametrize("name", kbt_rl.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(kbt_rl, name)
    assert value.__name__ == name
    assert getattr(kbt_rl, name) is value
    assert name in dir(kbt_rl)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kbt_rl' has no attribute 'NotThere'"):
        kbt_rl.NotThere  # noqa: B018


def test_lazy_names_and_type_checking_imports_agree() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert declared == kbt_rl._MODULE_OF
    assert sorted(declared) == sorted(kbt_rl.__all__)


def test_reload_registers_once() -> None:
    before = dict(gym.registry)
    importlib.reload(kbt_rl)  # a second registration would warn, and warnings are errors here
    assert dict(gym.registry) == before


def test_version_is_that_of_the_project() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', project, flags=re.MULTILINE)
    assert found is not None
    assert kbt_rl.__version__ == found.group(1)


# --- directions -------------------------------------------------------------------------------------------------------

LOWEST = {"inference", "models", "envs"}
FORBIDDEN = {
    "inference": {"kbt_rl.models", "kbt_rl.envs"},
    "models": {"kbt_rl.inference", "kbt_rl.envs"},
    "envs": {"kbt_rl.inference", "kbt_rl.models", "torch"},
    "agents": {"kbt_rl.callbacks", "kbt_rl.experiments", "kbt_rl.cli"},
    "callbacks": {"kbt_rl.experiments", "kbt_rl.cli"},
    "experiments": {"kbt_rl.cli"},
}
ABOVE_LOWEST = {"stable_baselines3", "kbt_rl.agents", "kbt_rl.callbacks", "kbt_rl.experiments", "kbt_rl.cli"}
EXCEPTIONS = {("envs/sb3_vec_env.py", "stable_baselines3")}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Every module that ``source`` imports, at any depth, relative ones made absolute; names count as submodules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(source: str, path: str) -> list[str]:
    """Imports of the module at ``path``, relative to the package, that point the wrong way."""
    folder = path.split("/")[0]
    forbidden = FORBIDDEN[folder] | (ABOVE_LOWEST if folder in LOWEST else set())
    package = ".".join(["kbt_rl", *path.split("/")[:-1]])
    modules = set(imported_modules(source, package))
    found = {bad for bad in forbidden for module in modules if module == bad or module.startswith(f"{bad}.")}
    return sorted(bad for bad in found if (path, bad) not in EXCEPTIONS)


MODULES = sorted(
    path.relative_to(PACKAGE).as_posix() for folder in FORBIDDEN for path in PACKAGE.glob(f"{folder}/**/*.py")
)


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_one_way(path: str) -> None:
    assert violations((PACKAGE / path).read_text(), path) == []


def test_every_layer_is_looked_at() -> None:
    assert {path.split("/")[0] for path in MODULES} >= {"inference", "models", "envs", "agents", "callbacks"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("inference/head.py", "from stable_baselines3.common import policies"),
        ("models/x.py", "def f():\n    import kbt_rl.inference.head"),
        ("envs/x.py", "from ..models import decision_transformer"),
        ("envs/x.py", "from .. import models"),
        ("agents/x.py", "from kbt_rl import callbacks"),
        ("callbacks/x.py", "from kbt_rl.experiments.trials import run"),
        ("experiments/x.py", "import kbt_rl.cli"),
    ],
)
def test_wrong_directions_are_found(path: str, source: str) -> None:
    assert violations(source, path)
