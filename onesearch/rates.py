"""Calibrated rates: what live events say of an item, on top of what the training log said (spec §4.9).

They order the items of one SID. The rule stands with the live catalog: SIDs by score, then this rate, then item id.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def calibrated_rate(impressions: int, clicks: int, orders: int) -> float:
    """Harmonic mean of calibrated CTR and CVR, in (0, 1).

    Ctr = log(clicks + 10) / log[(impressions + 10)(clicks + 10)(orders + 10)], Cvr = log(orders + 10) /
    log(clicks + 10): the adaptive reward of spec §4.9 without the weight of a level. 0.5 where nothing happened yet.
    """
    shown, clicked, ordered = (math.log(count + 10) for count in (impressions, clicks, orders))
    ctr, cvr = clicked / (shown + clicked + ordered), ordered / clicked
    return 2 * ctr * cvr / (ctr + cvr)


class CalibratedRates:
    """Rates by item, kept up to date in the background and read by searches in other threads.

    An item's rate is its click rate in the training log, moved by what live events add: an item without events
    keeps its trained rate exactly. version is another after every update that changed something.
    """

    def __init__(self) -> None:
        self.version = 0
        self._gains: dict[int, float] = {}

    def update(self, counts: Mapping[int, tuple[int, int, int]]) -> None:
        """Take over the counters of some items: impressions, clicks, orders."""
        nothing = calibrated_rate(0, 0, 0)
        self._gains.update({item: calibrated_rate(*numbers) - nothing for item, numbers in counts.items()})
        self.version += bool(counts)  # after the gains: what was found with a version never holds older ones

    def __call__(
        self, item_ids: npt.NDArray[np.int64], trained: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Rates float32 [n] of item ids int64 [n] whose rate in the training log is `trained`, float32 [n]."""
        if not self._gains:
            return trained
        gains = [self._gains.get(item, 0.0) for item in item_ids.tolist()]
        return trained + np.asarray(gains, dtype=np.float32)
