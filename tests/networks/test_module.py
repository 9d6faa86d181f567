"""Finding the last linear layer of any module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kbt_rl.networks.base import Call
from kbt_rl.networks.links import LinkName
from kbt_rl.networks.module import ModuleNetwork

STATES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


class TwoHeads(nn.Module):
    """An actor and a critic on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.action, self.trunk = nn.Linear(8, 1), nn.Linear(8, 2), nn.Linear(4, 8)

    def forward(self, rows: Tensor) -> Tensor:
        """Both, side by side."""
        hidden = torch.relu(self.trunk(rows))
        return torch.cat([self.action(hidden), self.value(hidden)], dim=-1)


class Reversed(nn.Module):
    """Registers its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(8, 2), nn.Linear(4, 8)

    def forward(self, rows: Tensor) -> Tensor:
        """The usual."""
        found: Tensor = self.last(torch.tanh(self.first(rows)))
        return found


def test_the_last_layer_is_the_one_that_no_other_depends_on() -> None:
    module = Reversed()
    network = ModuleNetwork(module, states=STATES)
    assert network.layer is module.last
    assert network.before == [module.first]
    assert network.observation_space.shape == (4,)
    assert network.action_space.shape == (2,)


def test_a_chain_needs_no_states() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 2), nn.Tanh())
    network = ModuleNetwork(net)
    assert network.layer is net[1]
    assert network.observation_space.shape == (4,)


def test_an_ambiguous_layer_is_named_with_its_rivals() -> None:
    with pytest.raises(ValueError, match="several layers could be the last: action, value; name one as layer="):
        ModuleNetwork(TwoHeads(), states=STATES)
    with pytest.raises(ValueError, match="or pass states="):
        ModuleNetwork(Reversed())
    module = TwoHeads()
    assert ModuleNetwork(module, "action", STATES).layer is module.action
    with pytest.raises(ValueError, match="layer is 'actor'; the linear layers are value, action, trunk"):
        ModuleNetwork(module, "actor", STATES)


def test_a_module_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Conv1d has no nn\.Linear"):
        ModuleNetwork(nn.Conv1d(3, 3, 1))


def test_it_runs_one_observation_and_rows_of_them() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    network = ModuleNetwork(net)
    with torch.no_grad():
        expected = net(torch.from_numpy(STATES)).numpy()
    np.testing.assert_array_equal(network.run(Call(STATES))[0], expected)
    np.testing.assert_allclose(network.run(Call(STATES[0]))[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (), (2, 2, 4)])
def test_an_observation_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    network = ModuleNetwork(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    with pytest.raises(ValueError, match=r"expected \(4,\) or \(n, \*\(4,\)\)"):
        network.run(Call(np.zeros(shape, np.float32)))


def test_looking_for_layers_leaves_no_hooks_and_no_gradients() -> None:
    module = Reversed()
    ModuleNetwork(module, states=STATES)
    assert not any(part._forward_hooks for part in module.modules())
    assert all(weights.grad is None for weights in module.parameters())


@pytest.mark.parametrize(("link", "expected"), [
    ("auto", lambda said: said), ("clipped", lambda said: said.clip(-1.0, 1.0)), ("squashed", np.tanh),
    ("scores", lambda said: said.argmax(axis=1)),
])  # fmt: skip
def test_a_link_says_what_the_last_layer_stands_for(link: LinkName, expected: Any) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    rows = np.random.default_rng(0).normal(size=(6, 3), scale=3.0).astype(np.float32)
    with torch.no_grad():
        said = module(torch.from_numpy(rows)).numpy()
    actions, _ = ModuleNetwork(module, link=link).run(Call(rows))
    assert np.allclose(actions, expected(said), atol=1e-6)


def test_a_link_is_one_of_four() -> None:
    with pytest.raises(ValueError, match="link is 'round'; choose 'auto', 'clipped', 'squashed' or 'scores'"):
        ModuleNetwork(nn.Linear(3, 2), link="round")  # type: ignore[arg-type]
