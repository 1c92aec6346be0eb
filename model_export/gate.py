"""Whether the int8 form of a model may be served: what it changes on the held-out searches of its bundle."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from onesearch.bundle import HELD_OUT, Bundle, read_held_out
from onesearch.errors import ExportError
from onesearch.runtime import Decoder
from onesearch.search import Searcher, SearchOptions

TOP = 10
LEAST_OVERLAP = 0.95
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Gate:
    """Top-10 items of fp32 and int8 over n held-out searches.

    overlap: mean share of fp32's items that int8 shows as well. hit_rate_fp32, hit_rate_int8: HR@10, share of
    searches with a clicked item in the top 10. change, half_width: mean of int8 − fp32 per search and half of its
    paired 95 % interval.
    """

    searches: int
    overlap: float
    hit_rate_fp32: float
    hit_rate_int8: float
    change: float
    half_width: float

    def summary(self) -> dict[str, Any]:
        """For the stamp."""
        return {
            "searches": self.searches,
            f"overlap_top_{TOP}": self.overlap,
            f"hr_{TOP}_fp32": self.hit_rate_fp32,
            f"hr_{TOP}_int8": self.hit_rate_int8,
            f"hr_{TOP}_change": [self.change - self.half_width, self.change + self.half_width],
        }

    def faults(self) -> list[str]:
        """Why int8 may not be stamped; empty when overlap is enough and no loss of HR@10 is found."""
        faults = []
        if not self.overlap >= LEAST_OVERLAP:
            faults.append(
                f"int8: top {TOP} overlaps fp32 by {self.overlap:.3f} on {self.searches} held-out searches, "
                f"expected at least {LEAST_OVERLAP}"
            )
        if not self.change + self.half_width >= 0:
            faults.append(
                f"int8: HR@{TOP} is {self.hit_rate_int8:.3f}, fp32 has {self.hit_rate_fp32:.3f} on {self.searches} "
                f"held-out searches: a loss of {-self.change:.3f} ± {self.half_width:.3f}, expected none"
            )
        return faults


def measure(bundle: Bundle, fp32: Decoder, int8: Decoder) -> Gate:
    """Search every held-out request with both decoders. Raises ExportError for a bundle without any."""
    searches = read_held_out(bundle.path)
    if not searches:
        raise ExportError(f"bundle {bundle.path}", [f"{HELD_OUT}: holds nothing to compare int8 with fp32 on"])
    searchers, options = (Searcher(bundle, fp32), Searcher(bundle, int8)), SearchOptions(limit=TOP)
    overlaps, hits = [], []
    for held_out in track(searches, "held-out searches", console=Console(stderr=True)):
        shown = []
        for searcher in searchers:
            rows = searcher.search(held_out.context, options).rows
            shown.append(set(bundle.catalog.item_ids[rows].tolist()))
        overlaps.append(len(shown[0] & shown[1]) / max(1, len(shown[0])))
        hits.append([bool(items & set(held_out.clicked)) for items in shown])
    table = np.array(hits, dtype=np.float64)
    change = table[:, 1] - table[:, 0]
    spread = float(change.std(ddof=1)) if len(change) > 1 else 0.0
    return Gate(
        searches=len(table),
        overlap=float(np.mean(overlaps)),
        hit_rate_fp32=float(table[:, 0].mean()),
        hit_rate_int8=float(table[:, 1].mean()),
        change=float(change.mean()),
        half_width=_NORMAL_95 * spread / len(change) ** 0.5,
    )
