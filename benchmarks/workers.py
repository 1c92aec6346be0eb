"""What one more worker process costs: `python -m benchmarks.workers [--bundle demo/bundle] [--json]`.

Proportional memory (each shared page divided among its users) of a ready service with 1, 2 and 3 workers, after
searches; the supervisor that several workers have is in their sum.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.wire import report, serving
from onesearch.hardware import hardware

SEARCHES = 20


def memory_mb(bundle: Path, workers: int) -> float:
    """Memory of a service with some workers, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"ONESEARCH_STATE": f"sqlite:{folder}/state.sqlite3", "ONESEARCH_CATALOG": f"{folder}/catalog"}
        settings |= {"ONESEARCH_WORKERS": str(workers), "ONESEARCH_NOTICE_SECONDS": "0"}
        program = "from service.cli import main; main()"
        with serving([sys.executable, "-c", program, str(bundle.resolve()), "--port"], settings) as server:
            while f"onesearch_workers {workers:.1f}" not in server.get("/metrics").decode():
                pass
            for _ in range(SEARCHES * workers):
                server.get("/v1/search?q=shoes")
            return server.memory_mb()


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of worker processes.")
    parser.add_argument("--bundle", type=Path, default=Path("demo/bundle"))
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else")
    arguments = parser.parse_args()
    one, two, three = (memory_mb(arguments.bundle, workers) for workers in (1, 2, 3))
    row = {"hardware": hardware(), "mb_1_worker": round(one, 1), "mb_2_workers": round(two, 1)}
    row |= {"mb_3_workers": round(three, 1), "mb_per_extra_worker": round(three - two, 1)}
    report(row, arguments.json)


if __name__ == "__main__":
    main()
