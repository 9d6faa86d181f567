"""Tidy rows from the results of trials, as CSV files that figures, reports and TensorBoard runs are made from.

A result is what a trial's file holds: ``{"trial": ..., "record": ..., "versions": ...}``. A row is one observation;
means and intervals are computed from rows where they are shown, by :mod:`kbt_rl.experiments.aggregate`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from kbt_rl.files import write_text

Result = Mapping[str, Any]
Row = TypeVar("Row", bound=tuple[Any, ...])

#: Names of the methods that figures and tables treat apart.
KBT, LINEAR, PRINTED = "KBT", "linear layer (L = 1)", "KBT as printed"
FLOOR, PRETRAINED, EXPERT = "linear floor", "pre-trained", "expert"
WARM_START = "warm start"


class AdaptRow(NamedTuple):
    """One trial at one checkpoint of Figure 3; ``failed`` where its posterior was no longer proper."""

    method: str
    pretrain_seed: int
    stream_seed: int
    samples: int
    success: float
    regret: float
    failed: bool


class TimingRow(NamedTuple):
    """Figure 4: seconds per sample; ``pytorch_encoder_s`` is a pass of the encoder by PyTorch's own layers."""

    method: str
    update_s: float
    encoder_s: float
    sample_to_posterior_s: float
    pytorch_encoder_s: float


class VarianceRow(NamedTuple):
    """Figure 5: predicted variance of the label, N^2, averaged over the iterations before."""

    rule: str
    noise_variance: float
    iteration: int
    predicted_variance: float


class UncertaintyRow(NamedTuple):
    """Figure 5 at the end: variances in N^2, error of the mean in N, coverage of 95 % intervals."""

    rule: str
    noise_variance: float
    noise_floor: float
    final_variance: float
    mean_error: float
    coverage: float


class InitialisationRow(NamedTuple):
    """Largest difference between head and pre-trained layer before any update, in units of the label rms."""

    layers: int
    prior_variance: float
    largest_difference: float


class SoftmaxRow(NamedTuple):
    """Error of the first-order softmax moments against sampling."""

    logit_variance: float
    mean_rmse: float
    cov_relative_error: float


class CorrelatedRow(NamedTuple):
    """One trial at one checkpoint with ``iid`` or ``visited`` labels; ``falls`` of the whole run, None if ``iid``."""

    method: str
    stream: str
    pretrain_seed: int
    stream_seed: int
    samples: int
    success: float
    regret: float
    falls: int | None


@dataclass(frozen=True)
class Tables:
    """All rows of an experiment; a table whose trials were not run is empty."""

    figure3: list[AdaptRow] = field(default_factory=list)
    figure4: list[TimingRow] = field(default_factory=list)
    figure5: list[VarianceRow] = field(default_factory=list)
    figure5_summary: list[UncertaintyRow] = field(default_factory=list)
    initialisation: list[InitialisationRow] = field(default_factory=list)
    softmax: list[SoftmaxRow] = field(default_factory=list)
    correlated: list[CorrelatedRow] = field(default_factory=list)


#: Type of the rows of each table; the table ``name`` is the file ``name.csv``.
_ROW_TYPES: dict[str, type[Any]] = {
    "figure3": AdaptRow,
    "figure4": TimingRow,
    "figure5": VarianceRow,
    "figure5_summary": UncertaintyRow,
    "initialisation": InitialisationRow,
    "softmax": SoftmaxRow,
    "correlated": CorrelatedRow,
}


def collect(results: Sequence[Result]) -> Tables:
    """Rows of all results, in the order of the results."""
    tables = Tables()
    for result in results:
        trial, record = result["trial"], result["record"]
        match trial["kind"]:
            case "adapt":
                tables.figure3.extend(_adapt_rows(trial, record))
            case "correlated":
                tables.correlated.extend(_correlated_rows(trial, record))
            case "timing":
                tables.figure4.extend(TimingRow(name, **times) for name, times in record["methods"].items())
            case "uncertainty":
                tables.figure5.extend(_variance_rows(trial, record))
                tables.figure5_summary.append(_uncertainty_row(trial, record))
            case "initialisation":
                tables.initialisation.extend(_initialisation_rows(record))
            case "softmax":
                columns = (record["logit_variances"], record["mean_rmse"], record["cov_relative_error"])
                tables.softmax.extend(SoftmaxRow(*values) for values in zip(*columns, strict=True))
    return tables


def _adapt_rows(trial: Result, record: Result) -> Iterator[AdaptRow]:
    failed_after = record.get("failed_after")
    seeds = (trial["pretrain_seed"], trial["stream_seed"])
    for samples, success, regret in zip(record["checkpoints"], record["success"], record["regret"], strict=True):
        failed = failed_after is not None and samples > failed_after
        yield AdaptRow(trial["method"]["name"], *seeds, samples, success, regret, failed)


def _correlated_rows(trial: Result, record: Result) -> Iterator[CorrelatedRow]:
    first = (trial["method"]["name"], trial["stream"], trial["pretrain_seed"], trial["stream_seed"])
    for samples, success, regret in zip(record["checkpoints"], record["success"], record["regret"], strict=True):
        yield CorrelatedRow(*first, samples, success, regret, record.get("falls"))


def _variance_rows(trial: Result, record: Result) -> Iterator[VarianceRow]:
    for iteration, variance in zip(record["iterations"], record["predicted_variance"], strict=True):
        yield VarianceRow(_rule(trial), trial["noise_variance"], iteration, variance)


def _uncertainty_row(trial: Result, record: Result) -> UncertaintyRow:
    values = (record[name] for name in ("noise_floor", "final_variance", "mean_error", "coverage"))
    return UncertaintyRow(_rule(trial), trial["noise_variance"], *values)


def _rule(trial: Result) -> str:
    rule: str = trial["method"]["settings"].get("rule", "measure")
    return rule


def _initialisation_rows(record: Result) -> Iterator[InitialisationRow]:
    for layers, differences in record["largest_difference"].items():
        for variance, difference in zip(record["prior_variances"], differences, strict=True):
            yield InitialisationRow(int(layers), variance, difference)


# ---------------------------------------------------------------------- files


def write_tables(tables: Tables, out: Path) -> list[Path]:
    """Write each table that has rows to its CSV file under ``out``; a table without rows leaves no file."""
    written = []
    for name in _ROW_TYPES:
        path = out / f"{name}.csv"
        if rows := getattr(tables, name):
            write_rows(path, rows)
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def read_tables(out: Path) -> Tables:
    """Read what :func:`write_tables` wrote.

    Raises:
        FileNotFoundError: The folder holds none of the CSV files.
    """
    found = {name: out / f"{name}.csv" for name in _ROW_TYPES if (out / f"{name}.csv").exists()}
    if not found:
        raise FileNotFoundError(f"{out} holds no table such as figure3.csv; run an experiment into it first")
    return Tables(**{name: read_rows(path, _ROW_TYPES[name]) for name, path in found.items()})


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write named tuples of one type as CSV, with exact floats; the file is replaced as a whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0]._fields)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_rows(path: Path, row: type[Row]) -> list[Row]:
    """Read rows of a named tuple type from CSV.

    Raises:
        ValueError: The columns are not the type's fields.
    """
    types = get_type_hints(row)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or list(reader.fieldnames) != list(types):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; expected {list(types)}")
        return [row(**{name: _parse(line[name], types[name]) for name in types}) for line in reader]


def _parse(text: str, kind: Any) -> Any:
    """The value that a CSV cell of this annotation holds."""
    options = get_args(kind)  # of ``int | None``
    if options and not text:
        return None
    kind = options[0] if options else kind
    return text == "True" if kind is bool else kind(text)
