"""Messages between processes outside the training step, through jax's coordination service.

They need no program on the devices, so no collective operation times out while one process works.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from imagen_jax.distributed import startup

# Twenty days. A lost process ends the wait earlier; watch.py names one that is stuck.
FOR_EVER_MS = 1000 * 60 * 60 * 24 * 20
SHOWN = 5  # facts of a process that a message names
_rounds = itertools.count()
Task = TypeVar("Task")


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    member = startup.member()
    return member is None or member.index == 0


def own_share(tasks: Sequence[Task]) -> list[Task]:
    """The tasks of this process: a run of consecutive ones, whatever the progress of others."""
    member = startup.member()
    if member is None:
        return list(tasks)
    bounds = [len(tasks) * i // member.count for i in (member.index, member.index + 1)]
    return list(tasks[bounds[0] : bounds[1]])


def gather(text: str = "") -> list[str]:
    """The texts of all processes, by process. A barrier: all call it in the same order."""
    member = startup.member()
    if member is None:
        return [text]
    store, number = startup.store(), next(_rounds)
    said = "imagen_jax/said/{}/".format
    store.key_value_set(f"{said(number)}{member.index}", text)
    store.wait_at_barrier(f"imagen_jax/round {number}", FOR_EVER_MS)
    texts = {
        int(key.rpartition("/")[2]): value for key, value in store.key_value_dir_get(said(number))
    }
    if member.index == 0 and number:
        store.key_value_delete(said(number - 1))  # all processes have read it
    return [texts[i] for i in range(member.count)]


def check(facts: Mapping[str, str]) -> None:
    """Raises ValueError in all processes unless {name: content} is the same in all.

    The message names the process and the facts that differ. All processes call it.
    """
    hosts = startup.hosts()
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()}
    first, *others = map(json.loads, gather(json.dumps(own)))
    faults = []
    for i, there in enumerate(others, 1):
        if names := [name for name in first | there if first.get(name) != there.get(name)]:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            faults.append(
                f"process {i} ({hosts[i]}) differs from process 0 ({hosts[0]}) in: {shown}"
            )
    if faults:
        raise ValueError(
            f"the processes were not started alike: {'; '.join(faults)}; start the same command"
            " everywhere"
        )


def check_in_first(check: Callable[[], None]) -> None:
    """Calls `check` in process 0 and raises its ValueError in all processes. All call it."""
    fault = ""
    if is_first():
        try:
            check()
        except ValueError as error:
            fault = str(error)
    if fault := gather(fault)[0]:
        raise ValueError(fault)


def first_says(yes: bool) -> bool:
    """Whether `yes` is true in process 0. A barrier: all call it in the same order."""
    return bool(gather("yes" if yes else "")[0])
