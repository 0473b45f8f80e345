"""How many evaluations a new run waits for a better one, where its config leaves that open (``train.patience: auto``).

Much of what a model learns shows only when the learning rate falls: a run that seems to stand still at its peak gains
several points of AP in its last third. So the wait is as long as the run takes until its rate has fallen to a quarter
of the peak: even if nothing after the very first evaluation is better, the run goes on until then, and what is saved is
a part of its last third. A run that is stopped is one that has been getting worse all along, as on small data sets.
"""

from __future__ import annotations

import math

from mvision.config import DecidedTrain
from mvision.engine.optim import falling_part

MOST_IMAGES = 2000
"""With a larger validation split evaluation is not cheap, and such runs have data enough to go on learning."""
LEAST_WAIT = 10  # evaluations
LEAST_RUN = 20  # evaluations of a run that may be stopped
LEAST_SHARE = 1 / 4  # of the run
FALLEN = {"cosine": 2 / 3, "flat_cosine": 2 / 3, "linear": 3 / 4}
"""By schedule, the share of the fall after which the learning rate is a quarter of the peak."""


def wait_of(config: DecidedTrain, total: int, last: int, images: int) -> int:
    """The number of evaluations without a better one after which a run stops; 0 for a run that never does.

    Args:
        total: optimiser steps of the run.
        last: those of its ``data.augment.last_epochs``.
        images: of all validation splits together.
    """
    evaluations = math.ceil(config.epochs / config.val_interval)
    if evaluations < LEAST_RUN or images > MOST_IMAGES:
        return 0
    share = LEAST_SHARE
    if config.schedule != "constant":
        begin, end = falling_part(config, total, last)
        share = max(share, (begin + FALLEN[config.schedule] * (end - begin)) / total)
    wait = max(LEAST_WAIT, math.ceil(share * evaluations))
    return wait if wait < evaluations else 0
