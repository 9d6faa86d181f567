"""Where labelled samples come from: i.i.d. states, visited states, recordings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from learners import LABEL_HIGH, SHIFTED, Recorder, Updates, changed, expert, kbt, longer_kbt, states, weights
from stable_baselines3.common.env_util import make_vec_env

from kbt_rl import KalmanAdapter, Sample
from kbt_rl.callbacks import IidStream, RecordedStream, SampleStream, StreamBatch, VisitedStream
from kbt_rl.models.context import ContextWindow

# ---------------------------------------------------------------------- i.i.d.


@pytest.mark.parametrize("n_envs", [1, 4])
def test_iid_states_fill_the_label_box(n_envs: int) -> None:
    model = kbt(n_envs=n_envs)
    seen = Updates(model)
    model.learn(100, callback=KalmanAdapter(expert(), "iid"))
    assert seen.observations.shape == (100, 4)
    assert (np.abs(seen.observations) <= LABEL_HIGH).all()
    assert (np.abs(seen.observations).max(0) > 0.9 * LABEL_HIGH).all()
    assert (np.abs(seen.observations.mean(0)) < 6 * LABEL_HIGH / np.sqrt(3 * 100)).all()
    assert all((sample.context.timesteps == 0).all() for sample in seen.samples)  # type: ignore[union-attr]


def test_iid_labels_are_not_clipped() -> None:
    strong = expert().__class__(expert().observation_space, expert().action_space, 3 * expert().gain, 120.0)
    model = kbt()
    seen = Updates(model)
    model.learn(40, callback=KalmanAdapter(strong))
    np.testing.assert_array_equal(seen.targets, strong.label(seen.observations))
    assert np.abs(seen.targets).max() > 1.0  # beyond the action space


def test_iid_states_follow_the_models_seed() -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = kbt(seed=seed)
        seen = Updates(model)
        model.learn(5, callback=KalmanAdapter(expert()))
        drawn.append(seen.observations)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_iid_states_of_a_box_of_ones_own() -> None:
    box = spaces.Box(np.array([1.0, 2.0, 0.1, 0.0]), np.array([1.5, 3.0, 0.2, 0.5]), dtype=np.float64)
    model = kbt()
    seen = Updates(model)
    model.learn(30, callback=KalmanAdapter(expert(), IidStream(box)))
    assert (seen.observations >= np.float32(box.low)).all()
    assert (seen.observations <= np.float32(box.high)).all()


# ---------------------------------------------------------------------- visited


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("every", [1, 4])
def test_visited_states_are_those_of_the_rollout(n_envs: int, every: int) -> None:
    model = longer_kbt(make_vec_env(SHIFTED, n_envs=n_envs))
    seen, recorder = Updates(model), Recorder("context")
    model.learn(10 * n_envs, callback=[recorder, KalmanAdapter(expert(), VisitedStream(every))])
    expected = [step["context"] for number, step in enumerate(recorder.steps, 1) if number % every == 0]
    assert len(seen.samples) == len(expected) == 10 // every
    for sample, context in zip(seen.samples, expected, strict=True):
        assert isinstance(sample.context, ContextWindow)
        for part, other in zip(sample.context, context, strict=True):
            np.testing.assert_array_equal(part, other)
        np.testing.assert_array_equal(sample.target, expert().label(context.newest))


def test_visited_counts_on_over_calls_of_learn() -> None:
    model = kbt()
    adapter = KalmanAdapter(expert(), VisitedStream(every=4))
    model.learn(3, callback=adapter)
    assert model.labels_used == 0
    model.learn(1, callback=adapter, reset_num_timesteps=False)
    assert model.labels_used == 1


# ---------------------------------------------------------------------- recorded


@pytest.mark.parametrize("n_envs", [1, 3])
def test_recordings_play_once_in_order(n_envs: int) -> None:
    observations, targets = states(7), expert().label(states(7))
    model, other = kbt(n_envs=n_envs), kbt()
    seen = Updates(model)
    model.learn(5 * n_envs, callback=KalmanAdapter(None, RecordedStream(observations, targets)))
    count = min(7, 5 * n_envs)
    np.testing.assert_array_equal(seen.observations, observations[:count])
    np.testing.assert_array_equal(seen.targets, targets[:count])
    for start in range(0, count, n_envs):
        other.update(Sample(observations[start : start + n_envs], targets[start : start + n_envs]))
    assert not changed(weights(model), weights(other))


def test_recorded_labels_are_used_even_with_an_expert() -> None:
    model = kbt()
    seen = Updates(model)
    model.learn(2, callback=KalmanAdapter(expert(), RecordedStream(states(2), np.full((2, 1), 3.0))))
    np.testing.assert_array_equal(seen.targets, 3.0)


# ---------------------------------------------------------------------- one's own


def test_a_stream_of_ones_own_needs_one_method() -> None:
    class EpisodeEnds(SampleStream):
        """Labels where an episode has just begun."""

        def next(self, model: Any, step: dict[str, Any]) -> StreamBatch | None:
            return StreamBatch(step["context"], step["features"], mask=step["dones"]) if step["dones"].any() else None

    model = longer_kbt(make_vec_env(SHIFTED, n_envs=4))
    seen, recorder = Updates(model), Recorder("dones")
    model.learn(4 * 600, callback=[recorder, KalmanAdapter(expert(), EpisodeEnds())])
    ended = sum(int(step["dones"].sum()) for step in recorder.steps)
    assert model.labels_used == ended > 0
    assert all((sample.context.timesteps[sample.mask] == 0).all() for sample in seen.samples)  # type: ignore[union-attr]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KalmanAdapter(expert(), "random"), "choose 'iid', 'visited'"),
        (lambda: KalmanAdapter(None, "iid"), "brings no labels; pass an expert"),
        (lambda: VisitedStream(every=0), "every is 0"),
        (lambda: RecordedStream(states(3), np.zeros((2, 1))), "3 observations and 2 targets"),
    ],
)
def test_bad_streams_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (IidStream(spaces.Box(-1, 1, (3,))), "not inside the observation space"),
        (IidStream(spaces.Box(-1e9, 1e9, (4,))), "not inside the observation space"),
        (RecordedStream(states(3)[:, :3], np.zeros((3, 1))), r"recorded observations have shape \(3, 3\)"),
        (RecordedStream(states(3), np.zeros(3)), r"recorded targets have shape \(3,\)"),
        (RecordedStream(states(3), np.zeros((3, 2))), r"expected \(N, 1\)"),
    ],
)
def test_a_stream_that_does_not_fit_changes_nothing(stream: SampleStream, message: str) -> None:
    model = kbt()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.learn(3, callback=KalmanAdapter(expert(), stream))
    assert (model.labels_used, model.stream_positions, model.num_timesteps) == (0, {}, 0)
    assert not changed(before, weights(model))


def test_another_recording_starts_at_its_own_beginning() -> None:
    model = kbt()
    first, second = states(6, seed=1), states(6, seed=2)
    model.learn(4, callback=KalmanAdapter(None, RecordedStream(first, np.zeros((6, 1)))))
    seen = Updates(model)
    recorded = KalmanAdapter(None, RecordedStream(second, np.zeros((6, 1))))
    model.learn(3, callback=recorded, reset_num_timesteps=False)
    np.testing.assert_array_equal(seen.observations, second[:3])
