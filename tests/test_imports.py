"""What importing the package costs, what it promises, and which way its imports point."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Collection
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

# What modules of a folder may import besides the standard library and themselves.
ALLOWED = {
    "inference": {"torch", "numpy", "scipy"},
    "models": {"torch", "numpy"},
    "envs": {"numpy", "gymnasium", "pygame"},
    "networks": {"torch", "numpy", "gymnasium", "stable_baselines3"},
    "agents": {"kbt_rl.inference", "kbt_rl.models", "kbt_rl.networks", "kbt_rl.envs", "kbt_rl.files"},
    "callbacks": {"kbt_rl.inference", "kbt_rl.models", "kbt_rl.networks", "kbt_rl.envs", "kbt_rl.agents"},
}
# What all may import, as it imports nothing itself but the standard library.
COMMON = {"kbt_rl.arguments"}
# Folders whose packages are not listed: anything but the folders above them.
ANY_PACKAGE = {"agents", "callbacks"}
EXCEPTIONS = {
    "envs/parameters.py": {"mujoco"},
    "envs/sb3_vec_env.py": {"stable_baselines3"},
    "envs/video.py": {"kbt_rl.files", "PIL"},
    "networks/hugging_face.py": {"kbt_rl.models.context", "transformers"},
    "inference/machine_code.py": {"numba"},
    "inference/kernels/": {"numba"},
}
MODULES = {
    ".".join(["kbt_rl", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(tree: ast.AST, package: str, modules: Collection[str], *, types: bool) -> set[str]:
    """Every module that is imported at any depth, with ``types`` also for types alone; relative ones made absolute.

    ``from package import name`` is an import of ``package.name`` if that is a module, else of ``package``.
    """
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names & set(modules) or {module}
        else:
            found |= imported(node, package, modules, types=types)
    return found


def imports_of(
    name: str, source: str, modules: Collection[str], *, is_package: bool = False, types: bool = False
) -> set[str]:
    return imported(ast.parse(source), name if is_package else name.rpartition(".")[0], modules, types=types)


def violations(name: str, imports: set[str]) -> set[str]:
    """Imports of a module that point the wrong way."""
    path = "/".join(name.split(".")[1:]) + ".py"
    folder = path.split("/")[0]
    if folder not in ALLOWED:
        return set()
    allowed = ALLOWED[folder] | {f"kbt_rl.{folder}"} | COMMON | sys.stdlib_module_names
    allowed |= {part for prefix, parts in EXCEPTIONS.items() if path.startswith(prefix) for part in parts}

    def fits(module: str) -> bool:
        own = module.split(".")[0] == "kbt_rl"
        return any(module == good or module.startswith(f"{good}.") for good in allowed) or (
            folder in ANY_PACKAGE and not own
        )

    return {module for module in imports if not fits(module)}


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules of which each imports every other, in some steps."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for module in edges.get(ahead.pop(), set()) - seen:
                seen.add(module)
                ahead.append(module)
        return seen

    reach = {module: reached(module) for module in edges}
    found = [{other for other in reach[module] if module in reach.get(other, set())} for module in edges]
    return [circle for index, circle in enumerate(found) if circle and circle not in found[:index]]


def graph(*, types: bool) -> dict[str, set[str]]:
    return {
        name: imports_of(
            name, path.read_text(encoding="utf-8"), MODULES, is_package=path.name == "__init__.py", types=types
        )
        for name, path in MODULES.items()
    }


def test_imports_point_one_way() -> None:
    assert {name.split(".")[1] for name in MODULES if name.count(".") > 1} >= ALLOWED.keys()
    assert {name: wrong for name, found in graph(types=False).items() if (wrong := violations(name, found))} == {}


def test_what_all_import_needs_nothing() -> None:
    for name in COMMON:
        assert {module.split(".")[0] for module in graph(types=True)[name]} <= sys.stdlib_module_names


def test_no_modules_import_each_other() -> None:
    """Not in any folder nor between them, at any depth of a function, nor for types alone."""
    assert circles(graph(types=True)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kbt_rl.inference.head", "from stable_baselines3.common import policies"),
        ("kbt_rl.inference.head", "import numba"),
        ("kbt_rl.inference.x", "from kbt_rl.files import write_text"),
        ("kbt_rl.models.x", "def f():\n    import kbt_rl.inference.head"),
        ("kbt_rl.envs.x", "from ..models import decision_transformer"),
        ("kbt_rl.envs.x", "if True:\n    from .. import models"),
        ("kbt_rl.agents.x", "from kbt_rl import callbacks"),
        ("kbt_rl.callbacks.x", "try:\n    import kbt_rl.cli\nexcept ImportError:\n    pass"),
    ],
)
def test_wrong_directions_are_found(name: str, source: str) -> None:
    assert violations(name, imports_of(name, source, MODULES))


def test_circles_are_found() -> None:
    sources = {
        "kbt_rl.a": "from kbt_rl import b",
        "kbt_rl.b": "def f():\n    from .c import g",
        "kbt_rl.c": "import kbt_rl.a",
        "kbt_rl.d": "import kbt_rl.a\nif TYPE_CHECKING:\n    from kbt_rl import e",
        "kbt_rl.e": "import kbt_rl.d",
    }
    at_run_time, of_all = (
        {name: imports_of(name, source, sources, types=types) for name, source in sources.items()}
        for types in (False, True)
    )
    assert circles(at_run_time) == [{"kbt_rl.a", "kbt_rl.b", "kbt_rl.c"}]
    assert circles(of_all) == [{"kbt_rl.a", "kbt_rl.b", "kbt_rl.c"}, {"kbt_rl.d", "kbt_rl.e"}]
