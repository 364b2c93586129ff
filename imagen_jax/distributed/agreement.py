"""Whether all processes were started alike: what has to be the same everywhere is compared before anything long begins."""

import hashlib
from collections.abc import Mapping

import numpy as np

from imagen_jax.distributed import startup


def check(facts: Mapping[str, str]) -> None:
    """To be called by all processes with the same names. Raises ValueError, in all of them, naming what differs from process 0's and where."""
    hosts = startup.hosts()
    if not hosts:
        return
    from jax.experimental import multihost_utils

    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in facts.values()])
    everywhere = np.asarray(multihost_utils.process_allgather(digests))  # [processes, facts, 32]
    differs = (everywhere != everywhere[0]).any(axis=2)
    faults = [f"process {i} ({hosts[i]}) has another {name}" for i in range(len(hosts)) for name, other in zip(facts, differs[i]) if other]
    if faults:
        raise ValueError(f"the processes were not started alike: {'; '.join(faults)} than process 0 ({hosts[0]})")
