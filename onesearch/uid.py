"""User ids: a user as two SIDs, made of the items of the short and the long history (spec §3.6).

Both histories run oldest to newest, in the long one clicks before orders, and item i of m weighs
λ_i = e^√i / Σ_j e^√j: the newest weighs most. Three ways to make one SID of many. Legend: m items, L SID levels.
"""

import numpy as np
import numpy.typing as npt

from onesearch.quantizer import Codebooks
from onesearch.sequence import UidMode
from onesearch.sid import Codes


def user_id(short: Codes, long: Codes, mode: UidMode, codebooks: Codebooks) -> Codes | None:
    """uint16 [2, L]: the SID of the short and of the long history, uint16 [m, L] each.

    A history without items is replaced by the other; None for a user without any, and for mode "off".
    """
    if mode == "off" or not (len(short) or len(long)):
        return None
    histories = (short if len(short) else long, long if len(long) else short)
    if mode == "index_mean":
        return np.stack([index_mean(sids, codebooks.sizes) for sids in histories])
    if mode == "vote":
        return np.stack([vote(sids) for sids in histories])
    return codebooks.encode(np.stack([_mean_embedding(sids, codebooks) for sids in histories]))


def recency(count: int) -> npt.NDArray[np.float64]:
    """λ_1 … λ_m, float64 [m], summing to 1."""
    raised = np.exp(np.sqrt(np.arange(1, count + 1)))
    weights: npt.NDArray[np.float64] = raised / raised.sum()
    return weights


def index_mean(sids: Codes, sizes: tuple[int, ...]) -> Codes:
    """The published form: the weighted mean of the code numbers of each level, rounded up, uint16 [L].

    Numbers of clusters have no order, so the mean means nothing by itself; the model may still learn it as a name.
    """
    mean = recency(len(sids)) @ sids.astype(np.float64)
    up = np.ceil(mean - 1e-9)  # a mean that is whole but for rounding errors stays
    codes: Codes = np.minimum(up, np.asarray(sizes) - 1).astype(np.uint16)
    return codes


def vote(sids: Codes) -> Codes:
    """The code of most weight at each level among the items under the codes chosen so far, uint16 [L].

    Ties go to the lower code. The result is the SID of one of the items, so every prefix of it is valid.
    """
    weights = recency(len(sids))
    for level in range(sids.shape[1]):
        votes = np.bincount(sids[:, level], weights=weights)
        agree = sids[:, level] == votes.argmax()
        sids, weights = sids[agree], weights[agree]
    chosen: Codes = sids[0]
    return chosen


def _mean_embedding(sids: Codes, codebooks: Codebooks) -> npt.NDArray[np.float32]:
    return (recency(len(sids)) @ codebooks.decode(sids)).astype(np.float32)
