"""The process of one measurement: `python -m tools.reading.measure READING SECONDS CORES`.

READING is JSON. Prints a `Result` as JSON. Runs on the last CORES cores that it may use, with its
worker processes.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from absl import flags


@dataclasses.dataclass(frozen=True)
class Result:
    """One measurement.

    images_per_s: per core, over `seconds`, after the first batches. cpu_ms: CPU time of the process
    and its workers per image. first_batch_s: from opening to the first batch.
    """

    images_per_s: float
    cpu_ms: float
    first_batch_s: float


def cpu_seconds(root: int) -> float:
    """CPU time, user and system, of a running process and its descendants."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])
    members = {root}
    while found := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= found
    return sum(ticks.get(pid, 0) for pid in members) / os.sysconf("SC_CLK_TCK")


def measure(reading: dict, seconds: float, cores: int) -> Result:
    """Reads for `seconds` on `cores` cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    from tools.reading import readers

    reading = readers.Reading(**reading)
    opened = time.perf_counter()
    with contextlib.closing(readers.READERS[reading.reader](reading)) as batches:
        next(batches)
        first_batch_s = time.perf_counter() - opened
        for _ in range(2 * reading.workers + 4):  # what was read before it was asked for
            next(batches)
        images, start, cpu = 0, time.perf_counter(), cpu_seconds(os.getpid())
        while not images or time.perf_counter() - start < seconds:
            images += len(next(batches))
        passed = time.perf_counter() - start
        cpu = cpu_seconds(os.getpid()) - cpu
    return Result(images / passed / cores, 1e3 * cpu / images, first_batch_s)


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()  # Grain's workers read them
    result = measure(json.loads(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(dataclasses.asdict(result)), flush=True)
    os._exit(0)  # workers of an endless reader need not be waited for
