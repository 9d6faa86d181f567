"""How the weight covariance of the head is stored, and what the smoother asks of it.

The weights of layer ``i`` form a matrix ``(n, k)``, bias last, vectorised neuron by neuron. ``layer`` stores one full
symmetric matrix a layer (as a block triangle), ``neuron`` one ``k x k`` block a neuron, ``diagonal`` the variances. In
these three, layers are independent of each other and stored as one tensor each; ``joint``, which adds the covariance
between layers, has its own module.

A structure answers four questions about one layer, for rows of inputs ``z~ = [z; 1]`` of shape ``(..., B, k)``:

* ``project``: the product ``Sigma (I (x) z~)``, computed once a step and used twice;
* ``output_cov``: ``z~_b' Sigma_jl z~_c + trace(Sigma_jl C_cb)``, what the weights add to ``Cov(u)``;
* ``cross_cov``: ``Cov(w, u^L)`` from the projection and the mean Jacobian of the layers above;
* ``downdate_``: add ``V diag(signs) V'`` in place, dropping the entries that are not stored.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kbt_rl.inference import triangle
from kbt_rl.inference.triangle import LayerShape


class Structure(Protocol):
    """The weight covariance of one layer, independent of the other layers."""

    def from_neuron_blocks(self, blocks: Tensor) -> Tensor:
        """Stored form of independent neurons with covariances ``(n, k, k)``."""

    def project(self, cov: Tensor, shape: LayerShape, inputs: Tensor) -> Tensor:
        """``Sigma (I (x) z~)``; its shape is the structure's own."""

    def output_cov(
        self, cov: Tensor, shape: LayerShape, projection: Tensor, inputs: Tensor, input_cov: Tensor | None
    ) -> Tensor:
        """What the weights add to the covariance of ``u``, ``(..., B n, B n)``."""

    def cross_cov(self, projection: Tensor, jacobian: Tensor) -> Tensor:
        """``Cov(w, u^L)``, shape ``(..., n k, B o)``, from the mean Jacobian ``(..., B, o, n)``."""

    def downdate_(self, cov: Tensor, shape: LayerShape, factor: Tensor, signed: Tensor) -> None:
        """``cov += V diag(signs) V'`` in place, for ``V`` and ``signed`` = ``V diag(signs)`` of shape ``(n k, q)``.

        Allocates nothing of the covariance's size, so that it does not fail half way.
        """

    def set_variances_(self, cov: Tensor, shape: LayerShape, variances: Tensor) -> None:
        """Put the variance of each weight, ``(n k,)``, in its place."""

    def neuron_blocks(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """Covariance of each neuron's weights, ``(n, k, k)``; a view where the storage allows."""

    def variances(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """Variance of each weight, ``(n k,)``."""

    def dense(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """The full ``(n k, n k)`` matrix, for tests, plots and small heads."""


def as_rows(input_cov: Tensor, rows: int) -> Tensor:
    """``(..., B m, B m)`` as ``(..., B, m, B, m)``."""
    width = input_cov.shape[-1] // rows
    return input_cov.reshape(*input_cov.shape[:-2], rows, width, rows, width)


class Layer:
    """One full covariance matrix a layer, the paper's choice, as a block triangle."""

    def from_neuron_blocks(self, blocks: Tensor) -> Tensor:
        """See ``Structure``."""
        return triangle.pack_neurons(blocks)

    def project(self, cov: Tensor, shape: LayerShape, inputs: Tensor) -> Tensor:
        """``(..., n k, n, B)``."""
        flat = triangle.project(cov, shape, inputs.reshape(-1, shape.k))
        return triangle.unflatten_rows(flat, inputs)

    def output_cov(
        self, cov: Tensor, shape: LayerShape, projection: Tensor, inputs: Tensor, input_cov: Tensor | None
    ) -> Tensor:
        """See ``Structure``."""
        dense = None if input_cov is None else triangle.unpack(cov, shape)
        return dense_output_cov(dense, projection, inputs, input_cov)

    def cross_cov(self, projection: Tensor, jacobian: Tensor) -> Tensor:
        """See ``Structure``."""
        if projection.shape[-1] == 1:
            return projection.squeeze(-1) @ jacobian.squeeze(-3).mT
        return torch.einsum("...alb,...bol->...abo", projection, jacobian).flatten(-2)

    def downdate_(self, cov: Tensor, shape: LayerShape, factor: Tensor, signed: Tensor) -> None:
        """See ``Structure``."""
        triangle.downdate_(cov, shape, factor, signed)

    def set_variances_(self, cov: Tensor, shape: LayerShape, variances: Tensor) -> None:
        """See ``Structure``."""
        triangle.set_diagonal_(cov, shape, variances)

    def neuron_blocks(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return triangle.neuron_blocks(cov, shape)

    def variances(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return triangle.diagonal(cov, shape)

    def dense(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return triangle.unpack(cov, shape)


def dense_output_cov(cov: Tensor | None, projection: Tensor, inputs: Tensor, input_cov: Tensor | None) -> Tensor:
    """The weights' part of ``Cov(u)`` for a layer whose own covariance is full.

    Args:
        cov: ``Sigma``, ``(n k, n k)``; needed only if the inputs are uncertain.
        projection: ``Sigma (I (x) z~)``, ``(..., n k, n, B)``.
        inputs: ``z~``, ``(..., B, k)``.
        input_cov: ``Cov(z)``, ``(..., B (k-1), B (k-1))`` or None.

    Returns:
        ``(..., B n, B n)``.
    """
    rows, k = inputs.shape[-2:]
    n = projection.shape[-2]
    lead = inputs.shape[:-2]
    by_neuron = projection.reshape(*lead, n, k, n * rows)
    term = (inputs.unsqueeze(-3) @ by_neuron).reshape(*lead, n, rows, n, rows)  # [j, b, l, c]
    if input_cov is not None:
        assert cov is not None
        inner = cov.view(n, k, n, k)[:, :-1, :, :-1]
        term = term + torch.einsum("jplq,...bpcq->...jblc", inner, as_rows(input_cov, rows))
    return term.movedim(-4, -3).mT.reshape(*lead, rows * n, rows * n)


class _PerNeuron:
    """What ``neuron`` and ``diagonal`` share: neurons are independent, so what weights add to ``Cov(u)`` is diagonal.

    Their projection has the shape ``(..., n, k, B)``.
    """

    def _embed(self, by_neuron: Tensor) -> Tensor:
        """``(..., n, B, B)`` to ``(..., B n, B n)``, zero between different neurons."""
        n, rows = by_neuron.shape[-3:-1]
        full = torch.diag_embed(by_neuron.movedim(-3, -1))  # [b, c, j, l]
        return full.movedim(-3, -2).reshape(*by_neuron.shape[:-3], rows * n, rows * n)

    def cross_cov(self, projection: Tensor, jacobian: Tensor) -> Tensor:
        """See ``Structure``."""
        # [j, p, b, 1] * [j, 1, b, o]
        blocks = projection.unsqueeze(-1) * jacobian.movedim(-1, -3).unsqueeze(-3)
        return blocks.flatten(-2).flatten(-3, -2)


class Neuron(_PerNeuron):
    """One block ``(k, k)`` a neuron, as in Kalman Bayesian neural networks (Wagner et al. 2023)."""

    def from_neuron_blocks(self, blocks: Tensor) -> Tensor:
        """See ``Structure``."""
        return blocks.clone()

    def project(self, cov: Tensor, shape: LayerShape, inputs: Tensor) -> Tensor:
        """``(..., n, k, B)``."""
        flat = cov.view(-1, shape.k) @ inputs.mT
        return flat.reshape(*inputs.shape[:-2], shape.n, shape.k, inputs.shape[-2])

    def output_cov(
        self, cov: Tensor, shape: LayerShape, projection: Tensor, inputs: Tensor, input_cov: Tensor | None
    ) -> Tensor:
        """See ``Structure``."""
        term = inputs.unsqueeze(-3) @ projection  # [j, b, c]
        if input_cov is not None:
            rows = as_rows(input_cov, inputs.shape[-2])
            term = term + torch.einsum("jpq,...bpcq->...jbc", cov[:, :-1, :-1], rows)
        return self._embed(term)

    def downdate_(self, cov: Tensor, shape: LayerShape, factor: Tensor, signed: Tensor) -> None:
        """See ``Structure``."""
        blocks, signed_blocks = (whole.view(shape.n, shape.k, -1) for whole in (factor, signed))
        cov.baddbmm_(signed_blocks, blocks.mT)

    def set_variances_(self, cov: Tensor, shape: LayerShape, variances: Tensor) -> None:
        """See ``Structure``."""
        cov.diagonal(dim1=-2, dim2=-1).copy_(variances.view(shape))

    def neuron_blocks(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return cov

    def variances(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return cov.diagonal(dim1=-2, dim2=-1).flatten()

    def dense(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        full: Tensor = torch.block_diag(*cov)
        return full


class Diagonal(_PerNeuron):
    """One variance a weight, ``(n, k)``: for wide heads."""

    def from_neuron_blocks(self, blocks: Tensor) -> Tensor:
        """See ``Structure``; refuses correlated weights, which it cannot store."""
        variances = torch.diagonal(blocks, dim1=-2, dim2=-1)
        if not torch.equal(torch.diag_embed(variances), blocks):
            raise ValueError(
                "the diagonal structure cannot store the correlated weights of a tied prior; pass rho=0 for the "
                "paper's independent prior, or use structure='neuron'"
            )
        return variances.clone()

    def project(self, cov: Tensor, shape: LayerShape, inputs: Tensor) -> Tensor:
        """``(..., n, k, B)``."""
        return cov.unsqueeze(-1) * inputs.mT.unsqueeze(-3)

    def output_cov(
        self, cov: Tensor, shape: LayerShape, projection: Tensor, inputs: Tensor, input_cov: Tensor | None
    ) -> Tensor:
        """See ``Structure``."""
        term = inputs.unsqueeze(-3) @ projection
        if input_cov is not None:
            rows = as_rows(input_cov, inputs.shape[-2])
            term = term + torch.einsum("jp,...bpcp->...jbc", cov[:, :-1], rows)
        return self._embed(term)

    def downdate_(self, cov: Tensor, shape: LayerShape, factor: Tensor, signed: Tensor) -> None:
        """See ``Structure``."""
        cov.view(-1, 1, 1).baddbmm_(signed.unsqueeze(-2), factor.unsqueeze(-1))

    def set_variances_(self, cov: Tensor, shape: LayerShape, variances: Tensor) -> None:
        """See ``Structure``."""
        cov.copy_(variances.view(shape))

    def neuron_blocks(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return torch.diag_embed(cov)

    def variances(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return cov.flatten()

    def dense(self, cov: Tensor, shape: LayerShape) -> Tensor:
        """See ``Structure``."""
        return torch.diag(cov.flatten())


LAYERWISE: dict[str, Structure] = {"layer": Layer(), "neuron": Neuron(), "diagonal": Diagonal()}
STRUCTURES = ("joint", *LAYERWISE)
