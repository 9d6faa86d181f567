"""The transformer as a function of its window: what an output may and may not depend on."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig

K, OBS, ACT = 4, 3, 2
LONG = DecisionTransformerConfig(context_length=K, max_timestep=10)
RETURNS = replace(LONG, target_return=5.0)
POST_NORM = replace(LONG, norm_first=False)


def transformer(config: DecisionTransformerConfig, seed: int = 0) -> DecisionTransformer:
    torch.manual_seed(seed)
    return DecisionTransformer(OBS, ACT, config).eval()


def window(rows: int = 2, length: int = K, timestep: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "observations": torch.randn(rows, length, OBS),
        "actions": torch.randn(rows, length, ACT),
        "timesteps": torch.full((rows,), timestep),
        "returns": torch.randn(rows, length),
    }


def disturbed(inputs: dict[str, Tensor], name: str, position: int) -> dict[str, Tensor]:
    changed = {key: value.clone() for key, value in inputs.items()}
    changed[name][:, position] += 3.0
    return changed


def reached(config: DecisionTransformerConfig, name: str, position: int, timestep: int = 7) -> list[bool]:
    """Which steps' features move when one token changes."""
    net, inputs = transformer(config), window(timestep=timestep)
    with torch.no_grad():
        before, after = net.encode(**inputs), net.encode(**disturbed(inputs, name, position))
    return (before != after).flatten(2).any(-1).any(0).tolist()


@pytest.mark.parametrize("config", [LONG, RETURNS, POST_NORM], ids=["plain", "returns", "norm last"])
@pytest.mark.parametrize("position", range(K))
def test_features_depend_on_the_past_and_present_only(config: DecisionTransformerConfig, position: int) -> None:
    assert reached(config, "observations", position) == [step >= position for step in range(K)]
    assert reached(config, "actions", position) == [step > position for step in range(K)]  # so not on the newest


@pytest.mark.parametrize("norm_first", [True, False])
def test_one_token_takes_a_shorter_way_through_the_same_layers(norm_first: bool) -> None:
    net = transformer(DecisionTransformerConfig(norm_first=norm_first))
    inputs = window(length=1, timestep=0)

    def assert_same(net: DecisionTransformer) -> Tensor:
        with torch.no_grad():
            short, tokens = net.encode(**inputs), net.embed_state(inputs["observations"] / net.observation_scale)
            torch.testing.assert_close(short, net.encoder(tokens))
        return short

    before = assert_same(net)
    twin = copy.deepcopy(net)
    net.load_state_dict(transformer(net.config, seed=1).state_dict())
    loaded = assert_same(net)
    assert not torch.equal(before, loaded)
    net.load_state_dict(transformer(net.config, seed=2).state_dict(), assign=True)
    assert not torch.equal(loaded, assert_same(net))
    assert torch.equal(before, assert_same(pickle.loads(pickle.dumps(twin))))


@pytest.mark.parametrize("position", range(K))
def test_returns_to_go_matter_only_if_configured(position: int) -> None:
    assert reached(RETURNS, "returns", position) == [step >= position for step in range(K)]
    assert reached(LONG, "returns", position) == [False] * K


@pytest.mark.parametrize("config", [LONG, RETURNS, POST_NORM], ids=["plain", "returns", "norm last"])
@pytest.mark.parametrize("name", ["observations", "actions"])
@pytest.mark.parametrize("timestep", [0, 1, 2])
def test_padding_does_not_leak(config: DecisionTransformerConfig, name: str, timestep: int) -> None:
    valid = K - 1 - timestep
    for position in range(valid):
        assert not any(reached(config, name, position, timestep)[valid:])
    assert all(reached(config, "observations", valid, timestep)[valid:])


def test_a_row_does_not_depend_on_the_others() -> None:
    net, inputs = transformer(RETURNS), window(rows=3)
    inputs["timesteps"] = torch.tensor([0, 2, 9])
    with torch.no_grad():
        together = net.encode(**inputs)
        for row in range(3):
            alone = net.encode(**{name: value[row : row + 1] for name, value in inputs.items()})
            # Padded positions see themselves only and are never read; rounding differs with the batch size.
            torch.testing.assert_close(alone[:, -1], together[row : row + 1, -1], rtol=1e-5, atol=1e-6)


def test_the_constant_target_return_stands_in_for_missing_returns() -> None:
    net, inputs = transformer(RETURNS), window()
    inputs["returns"] = torch.full((2, K), 5.0)
    without = {name: value for name, value in inputs.items() if name != "returns"}
    torch.testing.assert_close(net.encode(**without), net.encode(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("earlier", "later", "same"), [(12, 30, True), (9, 10, False), (5, 6, False)])
def test_steps_beyond_the_last_embedding_share_it(earlier: int, later: int, same: bool) -> None:
    """With ten embeddings and a window of four, all of it lies at or beyond step 9 from step 12 on."""
    net = transformer(LONG)
    with torch.no_grad():
        equal = torch.equal(net.encode(**window(timestep=earlier)), net.encode(**window(timestep=later)))
    assert equal == same


def test_default_is_the_network_of_the_paper() -> None:
    net = transformer(DecisionTransformerConfig())
    assert len(net.encoder.layers) == 2
    for layer in net.encoder.layers:
        assert layer.self_attn.num_heads == 2
        assert (layer.linear1.in_features, layer.linear1.out_features) == (16, 8)
    assert (net.linear.in_features, net.linear.out_features) == (16, ACT)
    per_layer = (3 * 16 * 16 + 3 * 16) + (16 * 16 + 16) + (16 * 8 + 8) + (8 * 16 + 16) + 4 * 16
    assert sum(p.numel() for p in net.parameters()) == (OBS * 16 + 16) + 2 * per_layer + (16 * ACT + ACT)


@pytest.mark.parametrize("name", ["actions", "returns", "timesteps"])
def test_context_of_one_reads_the_state_alone(name: str) -> None:
    net, inputs = transformer(DecisionTransformerConfig()), window(length=1)
    other = {**inputs, name: inputs[name] + 2}
    torch.testing.assert_close(net.encode(**other), net.encode(**inputs), rtol=0, atol=0)
    assert not torch.equal(net.encode(**{**inputs, "observations": inputs["observations"] + 2}), net.encode(**inputs))


@pytest.mark.parametrize("config", [DecisionTransformerConfig(), LONG, RETURNS], ids=["paper", "long", "returns"])
def test_forward_is_the_scaled_last_layer_on_the_features(config: DecisionTransformerConfig) -> None:
    net, inputs = transformer(config), window(length=config.context_length)
    net.action_scale.copy_(torch.tensor([0.5, 3.0]))
    features = net.encode(**inputs)
    assert features.shape == (2, config.context_length, config.width)
    expected = (features @ net.linear.weight.T + net.linear.bias) * torch.tensor([0.5, 3.0])
    torch.testing.assert_close(net(**inputs), expected)


@pytest.mark.parametrize(
    ("buffer", "name"),
    [("observation_scale", "observations"), ("action_scale", "actions"), ("return_scale", "returns")],
)
def test_inputs_are_divided_by_their_scale(buffer: str, name: str) -> None:
    net, inputs = transformer(RETURNS), window()
    expected = net.encode(**inputs)
    getattr(net, buffer).mul_(8.0)  # a power of two: no rounding
    torch.testing.assert_close(net.encode(**{**inputs, name: 8.0 * inputs[name]}), expected, rtol=0, atol=0)
    assert not torch.equal(net.encode(**inputs), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 0}, "context_length is 0"),
        ({"layers": 1.5}, r"layers is 1\.5"),
        ({"layers": 2.0}, r"layers is 2\.0"),
        ({"width": True}, "width is True"),
        ({"heads": float("inf")}, "heads is inf"),
        ({"target_return": float("nan")}, "target_return is nan"),
        ({"feedforward": -1}, "feedforward is -1"),
        ({"max_timestep": 0}, "max_timestep is 0"),
        ({"width": 16, "heads": 3}, "not a multiple of the 3 heads"),
    ],
)
def test_bad_sizes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionTransformerConfig(**settings)
