"""Callbacks that ask an expert for labels during a rollout and let the learner update on each.

``OnlineAdapter`` serves every learner; ``KalmanAdapter`` adds what a posterior can tell. Both write the same tags, so
that the curves of different learners lie over each other in TensorBoard.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.callbacks import BaseCallback

from kbt_rl.agents import posteriors as several
from kbt_rl.agents.bayesian import BayesianLearner, KBTInfo
from kbt_rl.agents.experts import Expert, check_kind
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.online_policy import Context, Labeller
from kbt_rl.agents.sample import LearnerInfo, Sample
from kbt_rl.arguments import flag, instance, whole
from kbt_rl.callbacks.adaptation import AdaptationStrategy
from kbt_rl.callbacks.progress import Progress, progress_of
from kbt_rl.callbacks.queries import Always, QueryRule
from kbt_rl.callbacks.streams import IidStream, SampleStream, StreamBatch, VisitedStream, as_stream
from kbt_rl.inference.change_detection import upper_quantile


class OnlineAdapter(BaseCallback):
    """Teach a learner during ``learn``: at each step take samples from a stream, label them, update.

    Logs under ``kalman/``, for every learner alike: ``labels`` (used so far), ``update_ms`` (mean since the last write)
    and ``innovation`` (rms of label minus prediction, action units); and ``labels_asked`` and ``labels_saved`` (rows
    that the query rule or the budget left out) of this adapter.

    Args:
        expert: An SB3 policy or algorithm, or a callable from observations ``(n, o)`` to actions ``(n, a)``; a row of
            NaN means no label. With discrete actions it answers with actions ``(n,)`` or distributions over them
            ``(n, a)``. None if the stream brings labels.
        stream: ``"iid"`` (uniform in the label box, one label per environment step, as in the paper), ``"visited"``
            (the states of the rollout, and the only one for a recurrent expert), ``"uncertain"`` (the most uncertain of
            a pool of i.i.d. states), or a ``SampleStream``. By default i.i.d. for the learners on this library's
            transformer, and for others every fifth visited state.
        query: Which of the stream's rows are worth asking for, such as ``VarianceGate()``; all by default.
        budget: Labels to ask for at most over all runs with a model; None for no limit.
        delay: Steps that a label takes. 0: before the policy acts in the state that was labelled; 1: just after.
        check_expert: Refuse an expert that was made for another plant than the training environment's.
        verbose: As in SB3.

    Attributes:
        asked: Labels that were asked for.
        saved: Rows that the query rule or the budget left out.

    Note:
        ``save`` of a ``KBT`` or ``WarmStart`` keeps what was asked for and the labels that are on the way. An adapter
        of the same class and kind of stream goes on from there when it first serves the loaded model; with a larger
        ``budget`` it asks for the difference. Nothing keeps the expert or what a stream or rule of your own remembers.
        The file of an adapted policy (``AdaptedPolicy.save``) keeps the posterior only: a new adapter starts anew.
    """

    model: OnlineAlgorithm

    def __init__(
        self,
        expert: Expert | None,
        stream: str | SampleStream | None = None,
        *,
        query: QueryRule | None = None,
        budget: int | None = None,
        delay: int = 0,
        check_expert: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(whole("verbose", verbose))
        self._given = None if stream is None else as_stream(stream)
        self.query = Always() if query is None else query
        instance("query", self.query, QueryRule, "a rule such as VarianceGate()")
        if budget is not None:
            budget = whole("budget", budget, 0, "a whole number of labels, not negative (None for no limit)")
        self.budget = budget
        self.delay = whole("delay", delay, 0, "a label arrives 0, 1, ... steps after it was asked for")
        self._progress, self._policy = Progress(), None  # type: tuple[Progress, object]
        if expert is None and not (self._given is not None and self._given.labelled):
            raise ValueError("this stream brings no labels; pass an expert")
        if expert is not None:
            check_kind(expert)
        self.expert, self.check_expert = expert, flag("check_expert", check_expert)
        self._labeller: Labeller | None = None
        self._said: npt.NDArray[Any] | None = None  # labels of an expert that follows, of this step

    @property
    def asked(self) -> int:
        """See the class."""
        return self._progress.asked

    @property
    def saved(self) -> int:
        """See the class."""
        return self._progress.saved

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnlineAlgorithm):
            raise TypeError(
                f"{type(self).__name__} teaches KBT, WarmStart and what adapt() has made; {type(self.model).__name__} "
                "learns by itself: adapt(model).learn(env, steps, callback=...) teaches a model that is trained"
            )
        every = self.model.label_every
        usual = IidStream() if every is None else VisitedStream(every)
        self.stream: SampleStream = usual if self._given is None else self._given
        if self.expert is not None:
            self._labeller = self.model.labeller(self.expert)
            if self.check_expert:
                self.model.check_expert(self.expert)

    def _on_training_start(self) -> None:
        self.model.taught = True
        self.stream.check(self.model)
        self.query.check(self.model)
        mine = self._progress if self._policy is self.model.policy else None
        self._progress = progress_of(self, f"{type(self).__name__} {type(self.stream).__name__}", self.model, mine)
        self._policy = self.model.policy
        self._said = None
        if self._follows and not isinstance(self.stream, VisitedStream):
            raise ValueError("a recurrent teacher knows where it has been; use the stream 'visited' with it")

    @property
    def _follows(self) -> bool:
        return self._labeller is not None and self._labeller.follow is not None

    def _on_rollout_start(self) -> None:
        if self._follows and self._said is None:
            self._follow(self.model.context, np.ones(self.model.n_envs, dtype=bool))

    def _follow(self, context: Context, begins: npt.NDArray[np.bool_]) -> None:
        assert self._labeller is not None
        assert self._labeller.follow is not None
        self._said = np.asarray(self._labeller.follow(context.newest, begins))

    def _on_step(self) -> bool:
        progress = self._progress
        progress.step += 1
        if self._follows:
            self._follow(self.locals["context"], self.locals["dones"])
        try:
            batch = self.stream.next(self.model, self.locals)
            sample = None if batch is None else self._ask(batch)
            if sample is not None:
                progress.on_the_way.append((progress.step + self.delay, sample))
            while progress.on_the_way and progress.on_the_way[0][0] <= progress.step:
                self._learn(progress.on_the_way)
        finally:  # the log of a run that ends in here tells what was learned
            self.logger.record("kalman/labels", self.model.labels_used)
            self.logger.record("kalman/labels_asked", self.asked)
            self.logger.record("kalman/labels_saved", self.saved)
        return True

    def _ask(self, batch: StreamBatch) -> Sample | None:
        """The batch with the labels of the rows that are worth one, or None if none is."""
        offered = np.ones(batch.context.episodes, dtype=bool) if batch.mask is None else batch.mask
        features, wanted = batch.features, offered
        if not isinstance(self.query, Always):
            features = self.model.policy.encode(batch.context) if features is None else features
            wanted = offered & self.query.wants(self.model, features)
        if self.budget is not None:
            wanted = wanted & (np.cumsum(wanted) <= self.budget - self.asked)
        asked = int(wanted.sum())
        self._progress.asked += asked
        self._progress.saved += int(offered.sum()) - asked
        if not asked:
            return None
        target, kind = batch.target, batch.kind
        if target is None:
            assert self._labeller is not None
            kind = self._labeller.kind
            if self._said is not None:
                labels = self._said[wanted]
            else:
                labels = self._labeller.ask(batch.context.rows(wanted).newest)
            target = np.full((len(wanted), *labels.shape[1:]), np.nan)
            target[wanted] = labels
        return Sample(batch.context, target, None if wanted.all() else wanted, features, kind)

    def _learn(self, on_the_way: deque[tuple[int, Sample]]) -> None:
        """Update on the first sample, whose labels have arrived.

        It leaves the queue when it was learned or refused; an interrupt before that leaves it where it is.
        """
        started, before = time.perf_counter(), self.model.labels_used
        try:
            info = self.model.update(on_the_way[0][1])
        except Exception:
            on_the_way.popleft()
            raise
        except BaseException:
            if self.model.labels_used != before:
                on_the_way.popleft()
            raise
        on_the_way.popleft()
        elapsed = time.perf_counter() - started
        if info.labels:
            self.logger.record_mean("kalman/update_ms", 1e3 * elapsed)
            self._after_update(info)
            self._record(info)

    def _after_update(self, info: LearnerInfo) -> None:
        """Hook: react to an update that had labels."""

    def _record(self, info: LearnerInfo) -> None:
        """Log what an update told."""
        self.logger.record_mean("kalman/innovation", info.innovation)


class KalmanAdapter(OnlineAdapter):
    """``OnlineAdapter`` for ``KBT``, with the posterior's telemetry.

    Logs besides: ``kalman/predictive_variance`` and ``kalman/epistemic_variance`` (action units squared, mean over the
    updates since the last write), ``kalman/nis`` (normalised innovation squared per scalar label: 1 on average if the
    variances are right), ``kalman/nlpd`` (negative log predictive density of a label before it is learned, nats with
    labels in action units, mean over the updates since the last write; of discrete actions the negative log
    probability), ``kalman/smallest_variance`` and ``kalman/repairs`` (so far, see ``UpdateInfo``). With
    continuous actions also ``kalman/coverage_95``: the share of the updates since the last
    write whose labels were inside the 95 % region that was predicted for them, 0.95 on average if the predictions are
    calibrated (with ``HeadConfig.robust_dof`` the region of ordinary labels). With a strategy also ``kalman/alarms``
    (changes noticed). Where the noise is learned or wild labels are expected, also ``kalman/noise_variance`` (action
    units squared, mean over the actions) and ``kalman/label_weight``.

    Args:
        *args: See ``OnlineAdapter``.
        strategy: What to do about a world that moves again, see ``kbt_rl.callbacks.adaptation``; None does nothing.
            For models with one posterior.
        **kwargs: See ``OnlineAdapter``.
    """

    model: BayesianLearner

    def __init__(self, *args: Any, strategy: AdaptationStrategy | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if strategy is not None:
            instance("strategy", strategy, AdaptationStrategy, "such as ReopenOnDetection()")
        self.strategy = strategy

    @property
    def repairs(self) -> int:
        """Times that an update repaired a covariance."""
        return self._progress.repairs

    def _init_callback(self) -> None:
        super()._init_callback()
        if not isinstance(self.model, BayesianLearner):
            raise TypeError(
                f"KalmanAdapter reads a posterior, which {type(self.model).__name__} has not; use OnlineAdapter"
            )

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.strategy is None:
            return
        if self.model.posteriors > 1:
            raise ValueError(
                f"the model has {self.model.posteriors} posteriors and {type(self.strategy).__name__} watches one; use "
                "it with per_env=False, or with one model for each environment"
            )
        self.strategy.attach(self.model)

    def _after_update(self, info: LearnerInfo) -> None:
        if self.strategy is not None:
            assert isinstance(info, KBTInfo)
            self.strategy.after_update(self.model, info)

    def _record(self, info: LearnerInfo) -> None:
        super()._record(info)
        assert isinstance(info, KBTInfo)
        self.logger.record_mean("kalman/predictive_variance", info.predictive_variance)
        self.logger.record_mean("kalman/epistemic_variance", info.epistemic_variance)
        self.logger.record_mean("kalman/nis", info.nis / info.degrees)
        self._progress.repairs += info.repairs
        self.logger.record("kalman/repairs", self.repairs)
        self._record_trust(info)
        if not several.plain_noise(self.model.policy.heads):
            self.logger.record_mean("kalman/noise_variance", info.predictive_variance - info.epistemic_variance)
            self.logger.record_mean("kalman/label_weight", info.label_weight)
        if self.strategy is not None:
            self.logger.record("kalman/alarms", self.strategy.alarms)

    def _on_rollout_end(self) -> None:
        smallest = min(float(head.variances().min()) for head in self.model.policy.heads)
        self.logger.record("kalman/smallest_variance", smallest)

    def _record_trust(self, info: KBTInfo) -> None:
        """Log how probable the labels were before they were learned, and whether they were where they should be."""
        if math.isnan(info.log_density):  # a learner that does not tell
            return
        self.logger.record_mean("kalman/nlpd", -info.log_density / info.labels)
        if several.link(self.model.policy.heads) == "identity":  # the NIS of a one-hot label is not chi-square
            inside = info.nis <= upper_quantile(0.05, info.degrees, info.dof)
            self.logger.record_mean("kalman/coverage_95", float(inside))
