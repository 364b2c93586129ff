"""What processes tell each other between steps, through jax's coordination service: without a
program on the devices, so that nothing times out while one of them works.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from imagen_jax.distributed import startup
from imagen_jax.storage import write_json

FOR_EVER_MS = (
    1000 * 60 * 60 * 24
)  # a process that is gone ends the wait; see watch.py for one that is stuck
_rounds = itertools.count()


def gather(text: str = "") -> list[str]:
    """What each process says, by process. Every process has to call it, in the same order, and
    waits for all others.
    """
    place = startup.place()
    if place is None:
        return [text]
    store, number = startup.store(), next(_rounds)
    said = "imagen_jax/said/{}/".format
    store.key_value_set(f"{said(number)}{place.index}", text)
    store.wait_at_barrier(f"imagen_jax/round {number}", FOR_EVER_MS)
    texts = {
        int(key.rpartition("/")[2]): value for key, value in store.key_value_dir_get(said(number))
    }
    if place.index == 0 and number:
        store.key_value_delete(said(number - 1))  # that all have read, or they would not be here
    return [texts[i] for i in range(place.count)]


def check(facts: Mapping[str, str]) -> None:
    """To be called by all processes with the same names. Raises ValueError, in all of them, naming
    what differs from process 0's and where.
    """
    hosts = startup.hosts()
    digests = [
        said.split()
        for said in gather(
            " ".join(hashlib.sha256(text.encode()).hexdigest() for text in facts.values())
        )
    ]
    faults = [
        f"process {i} ({hosts[i]}) has another {name}"
        for i, found in enumerate(digests)
        for name, here, first in zip(facts, found, digests[0])
        if here != first
    ]
    if faults:
        raise ValueError(
            f"the processes were not started alike: {'; '.join(faults)} than process 0 ({hosts[0]})"
        )


def check_shared(directory: Path, patience_s: float = 60.0) -> None:
    """Raises ValueError, in all processes, unless `directory` is the same for all: process 0 leaves
    hosts.json in it, which the others must see.

    patience_s: how long they look for it; a network file system may show a new file late.
    """
    hosts, place = startup.hosts(), startup.place()
    if place is None:
        return
    path, token = directory / "hosts.json", os.urandom(8).hex()
    if place.index == 0:
        write_json(path, {"hosts": hosts, "start": token})
    token, end = gather(token)[0], time.monotonic() + patience_s
    while not (seen := _start(path) == token) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [
        f"process {i} ({hosts[i]})"
        for i, said in enumerate(gather("seen" if seen else ""))
        if not said
    ]
    if blind:
        raise ValueError(
            f"{directory} is another directory on {', '.join(blind)} than on process 0"
            f" ({hosts[0]}): it has to be on a file system that all share"
        )


def _start(path: Path) -> str:
    try:
        return json.loads(path.read_text())["start"]
    except FileNotFoundError:
        return ""
