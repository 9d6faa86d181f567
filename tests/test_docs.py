"""The words outside the code: links lead somewhere, every block of code runs, and every name that is named exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import SAC

import kbt_rl
from studies.__main__ import STUDIES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
# The changelog names what is gone, the page on extending what it defines itself.
OF_TODAY = [page for page in PAGES if page.name not in ("CHANGELOG.md", "extending.md")]
# What makes a block take seconds.
SMALLER = {
    "model.pretrain(LQRExpert.for_env(nominal))": "model.pretrain(LQRExpert.for_env(nominal), SMALL)",
    "model.learn(400": "model.learn(20",
    'Pendulum-v0", 20), eval_freq=50, n_eval_episodes=20': 'Pendulum-v0", 1), eval_freq=20, n_eval_episodes=1',
}
CODE = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
# Its blocks register what they define; tests/inference/test_seams.py runs them and takes it out again.
ELSEWHERE = ROOT / "docs" / "extending.md"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks() -> list[Any]:
    """Code of all pages; a block is left out where its first line is ```python no-run."""
    return [
        pytest.param(block, id=f"{name_of(page)} {index}")
        for page in PAGES
        if page != ELSEWHERE
        for index, block in enumerate(CODE.findall(page.read_text(encoding="utf-8")), start=1)
    ]


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            path, _, heading = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{name_of(page)} links to {target}"
            assert not heading or heading in anchors(file.read_text(encoding="utf-8")), f"{name_of(page)}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks())
def test_code_runs_as_it_stands(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kbt_rl.agents.behaviour_cloning import PretrainConfig

    monkeypatch.chdir(tmp_path)
    if "trained.zip" in block:
        for name in ("trained", "teacher"):
            SAC("MlpPolicy", "Pendulum-v1", buffer_size=1).save(name)
    for long, short in SMALLER.items():
        block = block.replace(long, short)
    exec(compile(block, "block", "exec"), {"__name__": "example", "SMALL": PretrainConfig(samples=500, steps=60)})


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_names_of_the_package_exist(page: Path) -> None:
    for dotted in set(re.findall(r"`(kbt_rl(?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found: Any = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            for part in parts[length:]:
                assert hasattr(found, part), f"{name_of(page)} names {dotted}"
                found = getattr(found, part)
            break


@pytest.mark.parametrize("page", OF_TODAY, ids=name_of)
def test_settings_and_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    studies = set(re.findall(r"python\s+-m\s+studies\s+([a-z][a-z-]+)", text))
    assert studies <= {study.replace("_", "-") for study in STUDIES}
    assert set(re.findall(r"`kbt-rl\s+([a-z-]+)", text)) <= {"pretrain", "adapt", "evaluate", "render"}
    for call in re.findall(r"\bHeadConfig\(([^()]*)\)", text):
        given = re.findall(r"(\w+)=(?:(\"\w+\")|([\d.e-]+)|\.\.\.)", call)
        values = {name: word.strip('"') if word else float(number) for name, word, number in given if word or number}
        for name in ("layers", "rank", "history"):
            if name in values:
                values[name] = int(values[name])
        kbt_rl.HeadConfig(**values)


def test_the_readme_fits_a_reader() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8_192


def test_every_extra_is_described() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE))
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").partition("## Extras")[2]
    described = {name for cell in re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE) for name in cell.split("`")}
    assert extras <= described, f"docs/settings.md leaves out {extras - described}"
