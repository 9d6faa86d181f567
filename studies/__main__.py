"""The studies behind the README's figures.

Each writes one result a trial to OUT/trials, then results.csv (every number), tables.md and figures. Interrupt it when
you like: the same command continues where it stopped, and runs nothing again that is there.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text as RichText

if TYPE_CHECKING:
    from types import ModuleType

    from studies.table import Table

#: A new study is a module of this folder and its name here.
STUDIES = (
    "reproduce", "success", "visited", "timing", "uncertainty", "start",
    "rescue", "film", "label_rules", "no_oracle", "change", "drift", "false_alarms", "noise", "trust", "discrete",
    "prior", "tune", "default_head", "policies", "tune_rivals",
)  # fmt: skip


@dataclass
class Options:
    """How to run a study."""

    quick: bool = False
    """A small version, for a look."""
    full: bool = False
    """As many trials as the README reports; what is run without --quick."""
    seed: int = 1000
    """First policy and stream seed. Seeds below 100 are for tuning; reported figures use 1000 and up."""
    policies: int | None = None
    """Pre-trained policies; as many as the study has if left out."""
    streams: int | None = None
    """Label streams for each policy; as many as the study has if left out."""
    out: Path | None = None
    """Folder of the results; results/NAME if left out, for reproduce results."""
    models: Path = Path("results/models")
    """Folder of the pre-trained policies, which all studies share."""
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Trials at a time, each with one thread."""
    executor: Literal["processes", "serial", "ray"] = "processes"
    """Where trials run. ray is a Ray cluster (extra `ray`): the one that runs (`ray start`), or else one of --jobs CPUs
    on this machine. It sends the code along and gets the results back, so that no folder has to be shared."""

    def check(self) -> None:
        """Raise ValueError for what cannot be meant."""
        if self.quick and self.full:
            raise ValueError("--quick and --full exclude each other")
        for name, least in (("seed", 0), ("jobs", 1), ("policies", 1), ("streams", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} is {value}; it must be at least {least}")


def run_study(name: str, options: Options, console: Console) -> None:
    """Run what is missing of a study, and show what it found."""
    options.check()
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:  # before a long run, not after it
        raise ImportError('the studies draw with matplotlib: pip install "kbt_rl[studies]"')
    import kbt_rl  # noqa: F401  registers the environments
    from studies.executors import maker
    from studies.runner import Store, run_all
    from studies.trial import Size

    study = import_module(f"studies.{name}")
    out = options.out or (Path("results") if name == "reproduce" else Path("results") / name)
    make_executor, store = maker(options.executor, options.jobs), Store(out, options.models)
    trials = study.plan(Size(options.quick, options.seed, options.streams, options.policies))
    show(study, run_all(trials, store, make_executor, console), out, console)


def show(study: ModuleType, table: Table, out: Path, console: Console) -> None:
    """Write the table, then print and draw what the study reports; numbers are on disk before anything is drawn."""
    from kbt_rl.files import write_text
    from studies.table import Text

    table.write(out / "results.csv")
    written, words = [out / "results.csv"], []
    for shown in study.report(table):
        if isinstance(shown, Text):
            console.print(shown.rich())
            words.append(shown.markdown())
            write_text(out / "tables.md", "\n".join(words))
        else:
            written.append(shown.write(out))
    console.print(f"written: {', '.join(map(str, written))}", markup=False, highlight=False)


def description(name: str) -> str:
    """What a study says of itself, without importing it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def _command(name: str, arguments: Sequence[str], chosen: list[Callable[[Console], None]]) -> Callable[..., None]:
    """A subcommand; its help is the study's own, in the list of all the first line of it."""

    def command(options: tyro.conf.OmitArgPrefixes[Options]) -> None:
        chosen.append(partial(run_study, name, options))

    whole = description(name)
    command.__doc__ = whole if name.replace("_", "-") in arguments else whole.partition("\n")[0]
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    console, chosen = Console(soft_wrap=True), list[Any]()
    commands = {name.replace("_", "-"): _command(name, given, chosen) for name in STUDIES}
    flags = (tyro.conf.FlagCreatePairsOff,)
    tyro.extras.subcommand_cli_from_dict(
        commands, args=given, prog="python -m studies", description=__doc__, config=flags
    )
    # A fresh torch takes all cores for networks that are too small for two.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        chosen[0](console)
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():  # else each would finish its trial first
            child.terminate()
        console.print("interrupted; the same command continues where this one stopped")
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        console.print(RichText.assemble(("error: ", "red"), str(error)))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
