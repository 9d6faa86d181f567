"""Every check of an input: what came, what was expected, what to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.types import Rows

# How far the sum of a target distribution, in float32, may be from 1.
SUM_TOLERANCE = 1e-5
# PyTorch's and Hugging Face's label of a row that does not count.
IGNORED = -100


def as_array(values: Tensor | npt.ArrayLike, name: str = "observations, features or target") -> npt.NDArray[Any]:
    """Values on the CPU, detached, without a copy where that is possible.

    Args:
        values: What came.
        name: What it is, for the message.

    Raises:
        TypeError: They are not real numbers: complex, text or objects; or some of them are masked.
        ValueError: Their rows differ in length.
    """
    array: npt.NDArray[Any]
    if isinstance(values, Tensor):
        try:
            array = values.numpy()
        except (TypeError, RuntimeError):  # it needs a gradient, is elsewhere, or has a dtype that NumPy lacks
            values = values.detach().cpu()
            array = (values if values.is_complex() else values.double()).numpy()
    else:
        if isinstance(values, np.ma.MaskedArray):
            raise TypeError(f"{name}: a masked array, whose mask would be lost; use NaN for no label, or fill it")
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{name} are no array: their rows differ in length") from error
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} hold {array.dtype}; expected real numbers")
    # PyTorch knows no longer numbers.
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array


def are_distributions(targets: Any, tolerance: float = SUM_TOLERANCE) -> Any:
    """Whether each row of targets ``(B, o)``, an array or a tensor, may be one of the softmax link: >= 0, sum 1."""
    return (targets >= 0.0).all(-1) & (abs(targets.sum(-1) - 1.0) <= tolerance)


def is_whole(values: Rows) -> bool:
    """Whether numbers are of an integer type."""
    if isinstance(values, Tensor):
        return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    return np.asarray(values).dtype.kind in "iu"


def one_hot(classes: Tensor, count: int) -> Tensor:
    """Rows of class indices; NaN for ``IGNORED``."""
    ignored = classes == IGNORED
    wrong = ((classes < 0) | (classes >= count)) & ~ignored
    if bool(wrong.any()):
        raise ValueError(
            f"target holds the class {int(classes[wrong][0])}; expected 0 to {count - 1}, or {IGNORED} for no label"
        )
    rows = torch.zeros(len(classes), count, dtype=classes.dtype, device=classes.device)
    rows.scatter_(1, classes.clamp_min(0).long().unsqueeze(1), 1.0)
    rows[ignored] = math.nan
    return rows


def distributions(labels: Tensor, given: Rows) -> Tensor:
    """Rows that are >= 0 and sum to 1, to the rounding of the dtype they came in."""
    dtype = given.dtype if isinstance(given, Tensor) else torch.float64
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    tolerance = max(SUM_TOLERANCE, 4.0 * eps * labels.shape[-1] ** 0.5)
    if not bool(are_distributions(labels, tolerance).all()):
        raise ValueError("with the softmax link each target row is one-hot or a distribution: >= 0, sum 1")
    return labels / labels.sum(-1, keepdim=True)


def noise_rows(link: str, noise: Tensor, labels: Tensor) -> Tensor:
    """Variances of labels as ``(B, o)``."""
    if link != "identity":
        raise ValueError("a noise of each label is for the identity link; classes have none")
    rows = noise.unsqueeze(-1).expand_as(labels) if noise.ndim == 1 and len(noise) == len(labels) else noise
    if rows.shape != labels.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {(len(labels),)} or {tuple(labels.shape)}")
    if not bool(((rows >= 0.0) & torch.isfinite(rows))[~torch.isnan(labels)].all()):
        raise ValueError("noise holds a variance that is negative or not finite")
    return torch.where(torch.isnan(labels), 1.0, rows)


def finite(
    name: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor, default: float | None = None
) -> Tensor:
    """A finite tensor of this shape in the dtype of ``like`` and on its device; ``default`` everywhere if None."""
    if given is None and default is not None:
        return like.new_full(shape, default)
    if not isinstance(given, Tensor):
        given = torch.as_tensor(np.asarray(given))
    if given.is_complex():
        raise ValueError(f"{name} is complex; expected real numbers")
    value = given.detach().to(like)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return value


def positive(name: str, given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A positive vector, ones if None."""
    scale = finite(name, given, shape, like, default=1.0)
    if not bool((scale > 0).all()):
        raise ValueError(f"{name} must be positive everywhere; its smallest value is {float(scale.min())}")
    return scale


def orthogonal(name: str, given: Tensor | None, size: int, like: Tensor) -> Tensor:
    """An orthogonal matrix."""
    if given is None:
        raise ValueError(
            f"structure='rotated' needs {name}, the eigenvectors of the features' covariance, one a column: "
            "torch.linalg.eigh(torch.cov(features.T)).eigenvectors"
        )
    basis = finite(name, given, (size, size), like)
    off = float((basis.mT @ basis - torch.eye(size).to(basis)).abs().max())
    if off > 1e-4:  # float32 eigenvectors of some thousand features
        raise ValueError(f"{name} is not orthogonal: its columns' products are off by {off:.3g}")
    return basis


def noise_covariance(noise: float | Tensor, outputs: int, like: Tensor, strict: bool) -> Tensor:
    """A covariance ``(o, o)`` from a variance or a covariance; positive in every direction where ``strict``."""
    cov = noise.detach() if isinstance(noise, Tensor) else torch.from_numpy(np.array(noise))
    if cov.is_complex():
        raise ValueError("the noise covariance is complex; expected real numbers")
    cov = cov.to(like.device, torch.float64)
    if cov.ndim == 0:
        cov = cov * torch.eye(outputs, dtype=torch.float64, device=like.device)
    if cov.shape != (outputs, outputs):
        raise ValueError(
            f"the noise covariance has shape {tuple(cov.shape)}; expected a number or {(outputs, outputs)}"
        )
    if not bool(torch.isfinite(cov).all()):
        raise ValueError(f"the noise covariance is not finite: {cov.tolist()}")
    if not torch.equal(cov, cov.mT):
        raise ValueError("the noise covariance is not symmetric; pass (C + C.T) / 2 if rounding is to blame")
    smallest = float(torch.linalg.eigvalsh(cov)[0])
    # The eigenvalues of a singular covariance come out negative by rounding.
    if not smallest >= -1e-12 * float(cov.diagonal().max()):
        raise ValueError(f"the noise covariance has the eigenvalue {smallest:.3g}; variances are not negative")
    if strict and not smallest > 0.0:
        raise ValueError(
            f"the noise covariance has the eigenvalue {smallest:.3g}; a noise that is learned, or that labels are "
            "weighed by, must be positive in every direction"
        )
    return cov


def diagonal_noise(cov: Tensor) -> None:
    """Raise ValueError unless outputs have independent noise."""
    if not torch.equal(cov.diagonal().diag(), cov):
        raise ValueError(
            "the structure 'shared' takes independent noise of each output; use structure='joint' for correlated noise"
        )


def moved(buffer: Tensor, device: torch.device) -> Tensor:
    """The buffer on another device."""
    try:
        return buffer.to(device)
    except TypeError as error:
        raise TypeError(
            f"the device {device} has no float64, which the posterior needs; keep the model on the CPU (one update is "
            "bound by latency, not by arithmetic)"
        ) from error
