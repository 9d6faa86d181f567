"""Rows, aggregates, figures to reach and reports, against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from fabricated import BASE, KBT_REGRET, KBT_SUCCESS, adapt, everything, timing, uncertainty
from rich.console import Console

from kbt_rl.experiments.aggregate import (
    compare,
    curve,
    estimate,
    failures,
    largest_drop,
    methods_of,
    success_by_encoder,
    trial_curves,
    warm_starts,
)
from kbt_rl.experiments.config import KBT_METHOD, printed_method, warm_start_method
from kbt_rl.experiments.report import print_report
from kbt_rl.experiments.summary import write_summary
from kbt_rl.experiments.tables import AdaptRow, CorrelatedRow, Tables, collect, read_tables, write_tables
from kbt_rl.experiments.targets import Target, targets

WARM = warm_start_method(25, 1e-3)


def target(tables: Tables, what: str) -> Target:
    (found,) = (target for target in targets(tables) if target.what == what)
    return found


def test_a_row_for_each_checkpoint_of_each_trial() -> None:
    tables = collect([adapt(KBT_METHOD, (0.0, 0.5), (99.0, 2.0), seeds=(1001, 1007))])
    assert tables.figure3 == [
        AdaptRow("KBT", 1001, 1007, 0, 0.0, 99.0, False),
        AdaptRow("KBT", 1001, 1007, 10, 0.5, 2.0, False),
    ]
    assert tables.correlated == tables.figure4 == []


def test_rows_after_the_failure_are_marked() -> None:
    rows = collect([adapt(printed_method(0.1), (0.0, 0.5, 0.0), (99.0, 2.0, 99.0), failed_after=10)]).figure3
    assert [row.failed for row in rows] == [False, False, True]
    assert failures(rows, "KBT as printed") == {0: 0, 10: 0, 20: 1}


def test_correlated_rows_tell_falls_only_where_the_learner_acted() -> None:
    visited = adapt(KBT_METHOD, (0.0, 0.5), (99.0, 2.0), kind="correlated", stream="visited", falls=4)
    rows = collect([visited, adapt(KBT_METHOD, (1.0,), (0.0,), kind="correlated")]).correlated
    assert [row.falls for row in rows] == [4, 4, None]
    assert rows[2] == CorrelatedRow("KBT", "iid", 1000, 1000, 0, 1.0, 0.0, None)
    assert curve(rows, "KBT", stream="visited").samples == [0, 10]
    assert curve(rows, "KBT", stream="iid").samples == [0]


def test_tables_read_back_are_the_tables_written(tmp_path: Path) -> None:
    tables = collect(everything())
    written = write_tables(tables, tmp_path)
    assert read_tables(tmp_path) == tables
    assert {path.stem for path in written} == set(vars(tables))
    header = (tmp_path / "figure3.csv").read_text().splitlines()[0]
    assert header == "method,pretrain_seed,stream_seed,samples,success,regret,failed"
    assert not list(tmp_path.glob(".*"))


def test_floats_survive_the_file_exactly(tmp_path: Path) -> None:
    tables = collect([adapt(KBT_METHOD, (1 / 3,), (0.1 + 0.2,))])
    write_tables(tables, tmp_path)
    assert read_tables(tmp_path).figure3[0].regret == 0.1 + 0.2


def test_a_table_of_an_earlier_run_is_not_left_behind(tmp_path: Path) -> None:
    write_tables(collect(everything()), tmp_path)
    write_tables(collect([timing(KBT_METHOD, 1e-3)]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["figure4.csv"]


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run an experiment"):
        read_tables(tmp_path)
    (tmp_path / "figure4.csv").write_text("method,seconds\nKBT,1\n")
    with pytest.raises(ValueError, match="update_s"):
        read_tables(tmp_path)


# ---------------------------------------------------------------------- aggregates


def test_an_estimate_is_the_mean_with_the_interval_of_resampled_means() -> None:
    values = [0.0, 1.0, 1.0, 1.0]
    found = estimate(values)
    assert (found.mean, found.minimum, found.maximum, found.trials) == (0.75, 0.0, 1.0, 4)
    # The mean of 4 draws is k / 4 with k binomial(4, 3 / 4): below 1 / 4 with probability 0.004, at most it with 0.05.
    assert (found.lower, found.upper) == (0.25, 1.0)
    assert estimate(values) == found
    assert estimate([0.3]) == (0.3, 0.3, 0.3, 0.3, 0.3, 1)


def test_the_interval_covers_the_true_mean_in_most_experiments() -> None:
    rng = np.random.default_rng(0)
    found = [estimate(rng.normal(2.0, 1.0, 60)) for _ in range(200)]
    assert 0.90 <= np.mean([e.lower <= 2.0 <= e.upper for e in found]) <= 0.98


def test_curve_averages_trials_at_each_checkpoint() -> None:
    rows = collect(
        [
            adapt(KBT_METHOD, (0.0, 0.4), (99.0, 3.0)),
            adapt(KBT_METHOD, (0.0, 0.8), (99.0, 1.0), seeds=(1000, 1001)),
            adapt(WARM, (0.0, 0.1), (99.0, 9.0)),
        ]
    ).figure3
    assert methods_of(rows) == ["KBT", "warm start 25"]
    points = curve(rows, "KBT")
    assert points.samples == [0, 10]
    assert points.estimates[1].mean == pytest.approx(0.6)
    assert points.estimates[1].minimum == 0.4
    assert points.at(5) is None
    regret = curve(rows, "KBT", "regret").at(10)
    assert regret is not None
    assert (regret.mean, regret.maximum) == (2.0, 3.0)


def test_warm_starts_are_ordered_by_memory() -> None:
    assert warm_starts(["warm start 100", "KBT", "warm start 20"]) == ["warm start 20", "warm start 100"]


def test_comparison_is_paired_by_policy_and_stream() -> None:
    rows = collect(
        [
            adapt(KBT_METHOD, (0.9,), (1.0,), seeds=(1000, 1000)),
            adapt(KBT_METHOD, (0.5,), (2.0,), seeds=(1000, 1001)),
            adapt(WARM, (0.4,), (4.0,), seeds=(1000, 1001)),
            adapt(WARM, (0.6,), (2.0,), seeds=(1000, 1000)),
            adapt(WARM, (0.0,), (9.0,), seeds=(1001, 1000)),  # has no partner
        ]
    ).figure3
    (found,) = compare(rows, "warm start 25")
    assert found.trials == 2
    # Differences of success 0.3 and 0.1: mean 0.2, standard deviation 0.1 sqrt(2), standard error 0.1.
    assert (found.success_difference, found.success_standard_error) == pytest.approx((0.2, 0.1))
    assert (found.regret_difference, found.regret_standard_error) == pytest.approx((-1.5, 0.5))


def test_largest_drop_looks_back_over_all_but_counts_only_after_50() -> None:
    assert largest_drop([(10, 1.0), (50, 0.2), (60, 0.7), (70, 0.9)]) == pytest.approx(0.3)
    assert largest_drop([(10, 0.2), (60, 0.7), (70, 0.9)]) == 0.0


def test_the_worst_encoder_is_told_by_samples_10_to_50() -> None:
    rows = collect(
        [
            adapt(KBT_METHOD, (0.0, 0.5, 1.0, 1.0, 1.0, 0.0), KBT_REGRET, seeds=(1000, 1000)),
            adapt(KBT_METHOD, (1.0, 0.5, 0.6, 1.0, 1.0, 1.0), KBT_REGRET, seeds=(1001, 1000)),
        ]
    ).figure3
    assert success_by_encoder(rows) == pytest.approx({1000: 0.875, 1001: 0.775})
    assert list(trial_curves(rows, "KBT")) == [(1000, 1000), (1001, 1000)]


# ---------------------------------------------------------------------- figures to reach


def test_all_required_figures_of_a_good_run_are_reached() -> None:
    found = targets(collect(everything()))
    assert [(t.what, t.measured) for t in found if not t.reached and not t.aim] == []
    missed = [t for t in found if not t.reached]
    assert [t.what for t in missed] == [  # weak encoder, and a warm start that ends lower
        "success of KBT after 10 samples",
        "regret of KBT minus every warm start's, everywhere, worst",
    ]
    assert missed[0].measured == pytest.approx(0.89)
    assert missed[1].detail == "warm start 10 after 100 samples"


def test_without_results_nothing_is_claimed() -> None:
    found = targets(Tables())
    assert len(found) == len(targets(collect(everything())))
    assert all(t.measured is None and t.reached is None for t in found)


@pytest.mark.parametrize(("ours", "theirs", "reached"), [(0.50, 0.50, True), (0.495, 0.50, True), (0.48, 0.50, False)])
def test_a_deficit_against_warm_start_beyond_both_tolerances_counts(ours: float, theirs: float, reached: bool) -> None:
    pairs = [(1000, stream) for stream in range(1000, 1004)]
    results = [adapt(KBT_METHOD, (0.0, ours), (99.0, 1.0), seeds=pair) for pair in pairs]
    results += [adapt(WARM, (0.0, theirs), (99.0, 1.0), seeds=pair) for pair in pairs]
    found = [t for t in targets(collect(results)) if t.what.startswith("success of KBT minus")]
    assert [t.reached for t in found] == [reached, ours == theirs]
    assert found[1].measured == pytest.approx(ours - theirs)


def test_a_deficit_within_its_noise_is_tolerated() -> None:
    differences = (-0.2, 0.2, -0.2, 0.0)  # mean -0.05, standard error 0.096
    results = [adapt(KBT_METHOD, (0.5 + d,), (1.0,), seeds=(1000, 1000 + i)) for i, d in enumerate(differences)]
    results += [adapt(WARM, (0.5,), (1.0,), seeds=(1000, 1000 + i)) for i in range(4)]
    found = [t for t in targets(collect(results)) if t.what.startswith("success of KBT minus")]
    assert [t.reached for t in found] == [True, False]
    assert found[0].measured == pytest.approx(-0.05)


def test_a_drop_of_the_mean_is_told_with_the_worst_trial() -> None:
    results = [
        adapt(KBT_METHOD, (*KBT_SUCCESS[:5], last), KBT_REGRET, seeds=(1000, 1000 + i))
        for i, last in enumerate((1.0, 0.88))
    ]
    found = target(collect(results), "drop of KBT below its running maximum after 50 samples")
    assert found.measured == pytest.approx(0.06)
    assert not found.reached
    assert "0.12 in the worst single trial" in found.detail


def test_costs_are_ratios_of_the_timed_methods() -> None:
    times = [(KBT_METHOD, 2e-3), (warm_start_method(100, 1e-3), 8e-3), (warm_start_method(10, 1e-3), 0.2)]
    tables = collect([timing(method, seconds) for method, seconds in times])
    found = target(tables, "time of an update, KBT over warm start 100")
    assert (found.measured, found.reached) == (pytest.approx(0.25), False)
    found = target(tables, "time from sample to posterior, KBT over warm start 10")
    assert (found.measured, found.reached) == (pytest.approx(3e-3 / 0.201), True)
    assert target(tables, "time of an update of KBT over a forward pass of PyTorch's encoder").reached is False


def test_the_worst_of_three_variances_counts() -> None:
    tables = collect([uncertainty("measure", v, f, 0.6, 0.92) for v, f in ((10, 10.1), (20, 18.0), (50, 51.0))])
    found = target(tables, "predicted variance, relative error at 10, 20, 50 N^2, measure")
    assert (found.measured, found.reached) == (pytest.approx(0.1), False)
    assert target(tables, "coverage of 95 % intervals at 50 N^2, measure").reached is False
    assert target(tables, "error of the mean at 50 N^2, measure, N").reached is True


# ---------------------------------------------------------------------- summary and report


def test_the_summary_holds_seeds_configuration_versions_and_the_worst_encoder(tmp_path: Path) -> None:
    results = everything()
    tuning = {"epsilon": 0.1, "seeds": {"stream": [0, 1], "pretrain": [0]}}
    path = write_summary(results, collect(results), tmp_path / "new", tuning)
    summary = json.loads(path.read_text())
    assert summary["seeds"] == {"pretraining": [1000, 1001], "streams": [1000, 1001], "tuning": tuning["seeds"]}
    assert summary["worst_encoder"]["pretrain_seed"] == 1001
    assert summary["worst_encoder"]["all"] == pytest.approx({"1000": 0.975, "1001": 0.965})
    assert summary["versions"] == [{"kbt_rl": "0.1.0", "torch": "2.13"}]
    adapt_kind = summary["configuration"]["adapt"]
    assert adapt_kind["trials"] == 32
    assert adapt_kind["methods"]["warm start 10"] == {"memory": 10, "learning_rate": 1e-3}
    assert adapt_kind["pretraining"] == [asdict(BASE.pretraining)]
    assert all({"what", "required", "measured", "interval", "reached"} <= set(t) for t in summary["targets"])
    assert {p.name for p in path.parent.iterdir()} == {"summary.json", "figure3_summary.csv", "comparison.csv"}


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    results = [uncertainty("measure", 50.0, float("nan"), float("nan"), 0.0)]
    path = write_summary(results, collect(results), tmp_path)
    found = {t["what"]: t["measured"] for t in json.loads(path.read_text())["targets"]}
    assert found["error of the mean at 50 N^2, measure, N"] is None


def test_the_report_shows_every_method_and_every_figure_to_reach() -> None:
    tables = collect(everything())
    stream = StringIO()
    print_report(tables, Console(file=stream, width=160))
    printed = stream.getvalue()
    for word in ("KBT as printed", "warm start 100", "Figures to reach", "0.20 ms", "(4 NaN)", "50.50 N²", "NO", "yes"):
        assert word in printed
    lines = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    (success,) = (index for index, cells in enumerate(lines) if cells[1:4] == ["KBT", "0.89", "0.99"])
    assert lines[success + 1][1:4] == ["", "[0.88, 0.90]", "[0.98, 1.00]"]
    assert sum(line.startswith("┡") for line in printed.splitlines()) == 5  # tables, each with a header


def test_a_report_of_nothing_says_not_measured() -> None:
    stream = StringIO()
    print_report(Tables(), Console(file=stream, width=160))
    assert "not measured" in stream.getvalue()
