"""What processes tell each other between steps, through jax's coordination service: without a program on the devices, so that nothing times out while one of them works."""

import hashlib
import itertools
from collections.abc import Mapping

from imagen_jax.distributed import startup

FOR_EVER_MS = 1000 * 60 * 60 * 24  # a process that is gone ends the wait; see watch.py for one that is stuck
_rounds = itertools.count()


def gather(text: str = "") -> list[str]:
    """What each process says, by process. Every process has to call it, in the same order, and waits for all others."""
    place = startup.place()
    if place is None:
        return [text]
    store, number = startup.store(), next(_rounds)
    said = "imagen_jax/said/{}/".format
    store.key_value_set(f"{said(number)}{place.index}", text)
    store.wait_at_barrier(f"imagen_jax/round {number}", FOR_EVER_MS)
    texts = {int(key.rpartition("/")[2]): value for key, value in store.key_value_dir_get(said(number))}
    if place.index == 0 and number:
        store.key_value_delete(said(number - 1))  # that all have read, or they would not be here
    return [texts[i] for i in range(place.count)]


def check(facts: Mapping[str, str]) -> None:
    """To be called by all processes with the same names. Raises ValueError, in all of them, naming what differs from process 0's and where."""
    hosts = startup.hosts()
    digests = [said.split() for said in gather(" ".join(hashlib.sha256(text.encode()).hexdigest() for text in facts.values()))]
    faults = [
        f"process {i} ({hosts[i]}) has another {name}"
        for i, found in enumerate(digests)
        for name, here, first in zip(facts, found, digests[0])
        if here != first
    ]
    if faults:
        raise ValueError(f"the processes were not started alike: {'; '.join(faults)} than process 0 ({hosts[0]})")
