"""The runs that TensorBoard reads hold the same numbers as the tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricated import CHECKPOINTS, KBT_REGRET, everything
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kbt_rl.experiments.aggregate import curve
from kbt_rl.experiments.tables import Tables, collect
from kbt_rl.experiments.tensorboard import export_runs, run_name


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def tables() -> Tables:
    return collect(everything())


def test_every_method_has_a_run_with_its_curves(tables: Tables, tmp_path: Path) -> None:
    folders = export_runs(tables, tmp_path)
    assert {folder.name for folder in folders} == {
        "KBT", "linear_layer_L_1", "KBT_as_printed", "warm_start_10", "warm_start_100", "linear_floor", "pre-trained",
        "expert",
    }  # fmt: skip
    found = scalars(tmp_path / "tensorboard" / "KBT")
    assert [step for step, _ in found["eval/success_rate"]] == list(CHECKPOINTS)
    for suffix, field in (("", "mean"), ("_lower", "lower"), ("_upper", "upper")):
        wanted = [getattr(estimate, field) for estimate in curve(tables.figure3, "KBT").estimates]
        assert [value for _, value in found[f"eval/success_rate{suffix}"]] == pytest.approx(wanted)
    assert [value for _, value in found["eval/regret"]] == pytest.approx(KBT_REGRET)
    assert found["kalman/update_ms"] == [(0, pytest.approx(0.2))]
    assert "kalman/update_ms" not in scalars(tmp_path / "tensorboard" / "expert")


def test_a_second_export_replaces_the_first_and_nothing_else(tables: Tables, tmp_path: Path) -> None:
    mine = tmp_path / "tensorboard" / "PPO_1" / "events.out.tfevents.1.mine"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"")
    for _ in range(2):
        export_runs(tables, tmp_path)
    assert mine.exists()
    folder = tmp_path / "tensorboard" / "KBT"
    assert len(list(folder.iterdir())) == 1
    assert len(scalars(folder)["eval/regret"]) == len(CHECKPOINTS)


def test_the_interval_is_a_band_in_custom_scalars(tables: Tables, tmp_path: Path) -> None:
    events = EventAccumulator(str(export_runs(tables, tmp_path)[0]))
    events.Reload()
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_nothing_to_show_makes_no_folder(tmp_path: Path) -> None:
    assert export_runs(Tables(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_names_of_runs_need_no_quotes_in_a_shell() -> None:
    assert run_name("linear layer (L = 1)") == "linear_layer_L_1"
    assert run_name("../up") == ".._up"
