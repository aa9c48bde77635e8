"""What preemptions cost the clients of a served model: `python -m benchmarks.serving [--preemptions 20] [--seconds 10]`.

Two replicas of a server that works 50 ms on each request, on the local cloud, behind an haproxy; four clients, each with one
request after another. Times without and with preemptions take turns, so that both see the same computer: `--seconds` of
peace, then a preemption with notice, until its replacement serves; and so on. Prefect, haproxy, machines and clients all
share this computer's cores, so the start of a replacement slows the others down: on machines of their own it does not.

| key | what |
| --- | --- |
| failed | requests that got no answer, or one that is not 200; none is retried |
| p50_ms, p99_ms, largest_ms | of the requests that were begun while nothing happened (`without`), or while a machine was going and another coming (`with`) |
| p50_ratio, p99_ratio | `with` over `without` |
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.recovery import workplace

RESULT = Path(__file__).parent / "results" / "serving.json"
CLIENTS = 4
WORK_SECONDS = 0.05
NOTICE_SECONDS = 8.0


class Clients:
    """They ask until the end; every request is put down under the phase in which it began."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.phase = "warming up"
        self.milliseconds: dict[str, list[float]] = {}
        self.failed: dict[str, int] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        while not self._stop.is_set():
            phase, begun = self.phase, time.perf_counter()
            try:
                connection.request("GET", f"/?seconds={WORK_SECONDS}")
                answer = connection.getresponse()
                answer.read()
                good = answer.status == 200
            except (OSError, http.client.HTTPException):
                connection.close()
                good = False
            taken = 1000 * (time.perf_counter() - begun)
            with self._lock:
                if good:
                    self.milliseconds.setdefault(phase, []).append(taken)
                else:
                    self.failed[phase] = self.failed.get(phase, 0) + 1
        connection.close()

    def of(self, phase: str) -> dict[str, Any]:
        found = self.milliseconds[phase]
        hundredths = statistics.quantiles(found, n=100)
        return {
            "requests": len(found),
            "failed": self.failed.get(phase, 0),
            "p50_ms": round(hundredths[49], 1),
            "p99_ms": round(hundredths[98], 1),
            "largest_ms": round(max(found), 1),
        }


def measure(folder: Path, preemptions: int, seconds: float) -> dict[str, Any]:
    from holdfast.storage import DirectoryStore
    from tests.chaos.runs import cloud
    from tests.story.test_serving import serve_job, serving, take, taken_when_told

    driver = cloud(folder, taken_when_told(preemptions + 4, notice=True, seconds=NOTICE_SECONDS))
    taken: list[str] = []
    with serving(serve_job(folder), driver, DirectoryStore(folder / "store")) as served:
        served.wait_until_whole()
        with Clients(served.url) as clients:
            time.sleep(2)
            for number in range(preemptions):
                clients.phase = "without"
                time.sleep(seconds)
                taken.append(served.next_to_go(taken))
                clients.phase = "with"
                take(folder, taken[-1])
                served.wait_until_whole(but=set(taken))
                print(f"{number + 1} of {preemptions}", flush=True)
            clients.phase = "over"
    without, during = clients.of("without"), clients.of("with")
    return {
        "preemptions": preemptions,
        "failed": sum(clients.failed.values()),
        "requests": sum(len(found) for found in clients.milliseconds.values()),
        "p50_ratio": round(during["p50_ms"] / without["p50_ms"], 3),
        "p99_ratio": round(during["p99_ms"] / without["p99_ms"], 3),
        "without": without,
        "with": during,
        "seconds_without_a_replica": served.summary["seconds_without_a_replica"],
        "share_at_target": served.summary["share_at_target"],
        "clients": CLIENTS,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    options.add_argument("--preemptions", type=int, default=20, help="with notice, one after another (default 20)")
    options.add_argument("--seconds", type=float, default=10.0, help="of peace before each (default 10)")
    options.add_argument("--result", type=Path, default=RESULT, help="where the figures are written")
    given = options.parse_args()
    result_path = given.result.absolute()
    with workplace() as folder:
        result = measure(folder, given.preemptions, given.seconds)
    result_path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if result["failed"]:
        raise SystemExit(f"{result['failed']} requests failed")


if __name__ == "__main__":
    main()
