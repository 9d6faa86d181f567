"""What it costs in accuracy to learn rows in successive blocks instead of in one exact joint update.

With one layer there is no difference: conditioning on all rows at once or on one after another is the same. With a ReLU
between, the moments are propagated through the posterior of the moment, so the order and the blocks matter a little.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.accuracy import Task
from benchmarks.peers import Head
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import MAX_JOINT_ROWS

BLOCKS = (1, 8)


class BlockRow(NamedTuple):
    """Successive blocks against one joint update of all rows, on held-out rows.

    Attributes:
        task: Name of the task.
        seed: Of the task.
        rows: Labelled rows that were learned.
        block: Rows of each update; ``rows`` for the joint update itself.
        error: Root mean square of prediction minus noisy label.
        mean_difference: Root mean square difference of the predicted means, over the joint update's epistemic sd.
        sd_ratio: Epistemic sd over the joint update's, mean over the rows.
    """

    task: str
    seed: int
    rows: int
    block: int
    error: float
    mean_difference: float
    sd_ratio: float


def compare(task: Task, seed: int, config: HeadConfig, rows: int = MAX_JOINT_ROWS) -> list[BlockRow]:
    """Learn the first ``rows`` of a task jointly, and in blocks of each size of ``BLOCKS``."""
    features, labels = torch.from_numpy(task.features[:rows]), torch.from_numpy(task.labels[:rows, None])
    held_out, wanted = torch.from_numpy(task.test_features), torch.from_numpy(task.test_labels)
    found, joint = [], None
    for block in (rows, *BLOCKS):
        head = Head(features.shape[1], task.noise, config).head
        for inputs, targets in zip(features.split(block), labels.split(block), strict=True):
            head.update(inputs, targets)
        predicted = head.predict(held_out)
        mean, sd = predicted.mean.flatten(), predicted.epistemic.flatten().sqrt()
        joint = (mean, sd) if joint is None else joint
        error = float((wanted - mean).square().mean().sqrt())
        difference = float(((mean - joint[0]) / joint[1]).square().mean().sqrt())
        found.append(BlockRow(task.name, seed, rows, block, error, difference, float((sd / joint[1]).mean())))
    return found
