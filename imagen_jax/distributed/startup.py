"""jax.distributed, started from what the environment says.

Explicitly: JAX_COORDINATOR_ADDRESS (host:port, a free port of process 0's host), JAX_NUM_PROCESSES
and JAX_PROCESS_ID (0, 1, ...); all three, or JAX_NUM_PROCESSES=1 for a process that is to be alone
whatever else is there. (jax itself reads only the first.) Otherwise what jax detects: Cloud TPU
pods, TPUs on GKE, SLURM, Kubernetes Jobs and JobSets (with the package `kubernetes`), Open MPI.
"""

import dataclasses
import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from imagen_jax import __version__
from imagen_jax.distributed import roll_call

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# host:port where process 0 is to listen, if not on all of its addresses; jax reads it too
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place among `count`. local_devices: the ids of the devices it is to use, None
    for all of its host. names: host names of processes, as far as the environment tells. how: where
    all this was found.
    """

    coordinator: str
    count: int
    index: int
    how: str
    local_devices: tuple[int, ...] | None = None
    names: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(
                f"the coordinator's address {self.coordinator!r} ({self.how}) is not host:port,"
                " such as 10.0.0.2:8476"
            )
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"process {self.index} of {self.count} ({self.how}): the processes of {self.count}"
                f" are 0 to {self.count - 1}"
            )

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])

    def name(self, index: int) -> str:
        """How a process is called that has not said its host's name."""
        return f"process {index}" + (f" ({self.names[index]})" if index in self.names else "")


_place: Place | None = None
_hosts: list[str] = []  # by process, once started


def start(timeout_s: float = 300.0, lost_s: float = 100.0) -> None:
    """Joins the other processes, if the environment says that there are any; called again it does
    nothing. To be called before jax is used.

    timeout_s: how long to wait for them. lost_s: after how long without a sign of life from one jax
    ends all the others.

    Raises ValueError, in one line, for an environment that makes no sense, and after `timeout_s`
    naming each process that did not come.
    """
    global _place
    if _hosts:
        return
    place = from_environment(os.environ, timeout_s)
    if place is None:
        return
    import jax

    about = f"imagen_jax {__version__} with jax {jax.__version__}"
    log.info(
        "process %d of %d (%s) on %s waits for all at %s",
        place.index,
        place.count,
        place.how,
        socket.gethostname(),
        place.coordinator,
    )
    if place.index == 0:
        bind = os.environ.get(BIND, "").rpartition(":")[0].strip("[]")
        hosts = roll_call.lead(place.port, place.count, about, timeout_s, place.name, bind)
    else:
        hosts = roll_call.report(place.host, place.port, place.index, place.count, about, timeout_s)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout_s),
        heartbeat_timeout_seconds=int(lost_s),
    )
    _place = place
    _hosts.extend(hosts)
    local = jax.local_devices()
    kind = local[0].device_kind
    log.info(
        "process %d of %d: %d devices here (%s), %d in all; hosts %s",
        place.index,
        place.count,
        len(local),
        kind,
        jax.device_count(),
        ", ".join(hosts),
    )


def hosts() -> list[str]:
    """Host names by process; [] in a process that is alone."""
    return list(_hosts)


def place() -> Place | None:
    """This process's place, None if it is alone."""
    return _place


def store() -> Any:
    """The client of jax's coordination service, whose keys and barriers all processes share; there
    is no public way to it.
    """
    from jax._src.distributed import global_state

    return global_state.client


def from_environment(environ: Mapping[str, str], timeout_s: float) -> Place | None:
    """This process's place, or None if it is alone. Raises ValueError, in one line, if the
    variables make no sense.
    """
    if environ.get(COUNT) == "1":
        return None
    given = [name for name in (ADDRESS, COUNT, INDEX) if environ.get(name)]
    if not given:
        return _detected(timeout_s)
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in given]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not set beside {' and '.join(given)}: set all three, or none,"
            f" or {COUNT}=1 to run alone"
        )
    numbers = {}
    for name in (COUNT, INDEX):
        if not environ[name].isdecimal():
            raise ValueError(f"{name}={environ[name]!r} is not a number of 0 or more")
        numbers[name] = int(environ[name])
    return Place(environ[ADDRESS], numbers[COUNT], numbers[INDEX], "by JAX_* variables")


def _detected(timeout_s: float) -> Place | None:
    """What jax would find by itself; asked through its own classes, because the place is needed
    before jax acts on it.
    """
    from jax._src.clusters import ClusterEnv

    name = "the cluster"
    try:
        found: Any = next(
            (
                env
                for env in ClusterEnv._cluster_types
                if not env.opt_in_only_method and env.is_env_present()
            ),
            None,
        )
        if found is None:
            return None
        name = found.name or found.__name__
        count = int(found.get_process_count())
        if count == 1:
            return None
        address = found.get_coordinator_address(
            timeout_secs=int(timeout_s),
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
        )
        index, local = int(found.get_process_id()), found.get_local_process_id()
    except Exception as error:  # each class raises what it likes
        raise ValueError(
            f"{name} was detected, but not this process's place in it:"
            f" {' '.join(str(error).split())}; set {ADDRESS}, {COUNT} and {INDEX}, or {COUNT}=1 to"
            " run alone"
        ) from error
    names = (
        dict(enumerate(found._get_worker_list_in_slice()))
        if hasattr(found, "_get_worker_list_in_slice") and index == 0
        else {}
    )
    return Place(address, count, index, name, None if local is None else (local,), names)
