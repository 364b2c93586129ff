"""Starts jax.distributed from environment variables or a detected cluster.

Explicit: JAX_COORDINATOR_ADDRESS (host:port, a free port of process 0's host), JAX_NUM_PROCESSES
and JAX_PROCESS_ID (0, 1, ...). Set all three, or JAX_NUM_PROCESSES=1 for a single-process run
inside a cluster. (jax itself reads only the first.)
Otherwise jax detects the cluster: Cloud TPU pods, TPUs on GKE, SLURM, Kubernetes Jobs and JobSets
(with the package `kubernetes`), Open MPI.
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
# host:port where process 0 listens, by default on all of its addresses; jax reads it too
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
TPU_HOSTS = "TPU_WORKER_HOSTNAMES"  # set by GKE and TPU VMs: the hosts of this process's slice
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Member:
    """The position of this process among all processes of the run.

    coordinator: host:port of process 0.
    count, index: the number of processes, and this one's from 0.
    how: where these values come from, for messages.
    local_devices: ids of the devices that this process uses; None: all of its host.
    names: host names by process, as far as the environment has them.
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
        """A process in words, with its host name if the environment has it."""
        return f"process {index}" + (f" ({self.names[index]})" if index in self.names else "")


_member: Member | None = None
_hosts: list[str] = []  # by process, once started


def start(timeout_s: float = 300.0, lost_s: float = 100.0) -> None:
    """Joins the other processes of the run; does nothing in a single-process run or a second time.

    Call it before jax initialises its devices.

    timeout_s: seconds to wait for the other processes.
    lost_s: seconds without a heartbeat after which `Watch` counts a process as lost.

    Raises ValueError, in one line, for contradictory variables, and after `timeout_s` with the
    processes that are missing.
    """
    global _member
    if _hosts:
        return
    member = from_environment(os.environ, timeout_s)
    if member is None:
        return
    import jax

    about = f"imagen_jax {__version__} with jax {jax.__version__}"
    log.info(
        "process %d of %d (%s) on %s waits for the others at %s",
        member.index,
        member.count,
        member.how,
        socket.gethostname(),
        member.coordinator,
    )
    if member.index == 0:
        bind = os.environ.get(BIND, "").rpartition(":")[0].strip("[]")
        hosts = roll_call.lead(member.port, member.count, about, timeout_s, member.name, bind)
    else:
        hosts = roll_call.report(
            member.host, member.port, member.index, member.count, about, timeout_s
        )
    jax.distributed.initialize(
        member.coordinator,
        member.count,
        member.index,
        local_device_ids=member.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout_s),
        # jax ends a process from C++ without naming the lost one, so `Watch` has to come first,
        # also on a loaded machine.
        heartbeat_timeout_seconds=int(3 * lost_s),
    )
    _member = member
    _hosts.extend(hosts)
    local = jax.local_devices()
    log.info(
        "process %d of %d: %d devices here (%s), %d in all; hosts %s",
        member.index,
        member.count,
        len(local),
        local[0].device_kind,
        jax.device_count(),
        ", ".join(hosts),
    )


def hosts() -> list[str]:
    """Host names by process; [] in a single-process run."""
    return list(_hosts)


def member() -> Member | None:
    """The position of this process; None in a single-process run."""
    return _member


def store() -> Any:
    """The client of jax's coordination service: keys and barriers that all processes share.

    jax has no public access to it.
    """
    from jax._src.distributed import global_state

    return global_state.client


def from_environment(environ: Mapping[str, str], timeout_s: float) -> Member | None:
    """The position of this process; None in a single-process run. Raises ValueError, in one line,
    for contradictory variables.
    """
    if environ.get(COUNT) == "1":
        return None
    present = [name for name in (ADDRESS, COUNT, INDEX) if environ.get(name)]
    if not present:
        return _detected(environ, timeout_s)
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in present]
    if missing:
        raise ValueError(
            f"{' and '.join(present)} is set, but {' and '.join(missing)} is not: set all three, or"
            f" none, or {COUNT}=1 for a single-process run"
        )
    numbers = {}
    for name in (COUNT, INDEX):
        if not environ[name].isdecimal():
            raise ValueError(f"{name}={environ[name]!r} is not a number of 0 or more")
        numbers[name] = int(environ[name])
    return Member(environ[ADDRESS], numbers[COUNT], numbers[INDEX], "by JAX_* variables")


def _detected(environ: Mapping[str, str], timeout_s: float) -> Member | None:
    """The position that jax detects.

    `jax.distributed.initialize` detects it too, but only together with the start, which must come
    after the roll call. jax has no public access to its cluster classes.
    """
    from jax._src.clusters import ClusterEnv

    kinds = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
    name = "the cluster"
    try:
        cluster: Any = next((env for env in kinds if env.is_env_present()), None)
        if cluster is None:
            return None
        name = cluster.name or cluster.__name__
        count = int(cluster.get_process_count())
        if count == 1:
            return None
        address = cluster.get_coordinator_address(
            timeout_secs=int(timeout_s),
            override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
        )
        index, local = int(cluster.get_process_id()), cluster.get_local_process_id()
    except Exception as error:  # each class raises its own errors
        raise ValueError(
            f"{name} was detected, but not the position of this process in it:"
            f" {' '.join(str(error).split())}; set {ADDRESS}, {COUNT} and {INDEX}, or {COUNT}=1 for"
            " a single-process run"
        ) from error
    names = [host for host in environ.get(TPU_HOSTS, "").split(",") if host]
    if index:  # only process 0 is known to be in the first slice
        names = []
    return Member(
        address, count, index, name, None if local is None else (local,), dict(enumerate(names))
    )
