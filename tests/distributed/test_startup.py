"""What the environment says of a process: its index, the number of processes, the coordinator."""

import pytest

from imagen_jax.distributed import startup

ALL = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_explicit_place():
    """Catches: swapped variables, an IPv6 address cut at its first colon."""
    member = startup.from_environment(ALL, 1)
    assert (member.host, member.port, member.count, member.index, member.local_devices) == (
        "10.0.0.2",
        8476,
        4,
        3,
        None,
    )
    member = startup.from_environment(ALL | {"JAX_COORDINATOR_ADDRESS": "[fe80::2]:8476"}, 1)
    assert (member.host, member.port) == ("fe80::2", 8476)


def test_alone():
    """Catches: a service started, or a cluster asked, for a process that is alone or
    wants to be.
    """
    assert startup.from_environment({}, 1) is None
    assert startup.from_environment({"JAX_NUM_PROCESSES": "1"}, 1) is None
    assert startup.hosts() == [] and startup.member() is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"JAX_PROCESS_ID": "4"}, "process 4 of 4 .*: the processes of 4 are 0 to 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1' is not a number"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four' is not a number"),
        (
            {"JAX_PROCESS_ID": ""},
            (
                "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES is set, but JAX_PROCESS_ID is not:"
                " set all three"
            ),
        ),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "but JAX_COORDINATOR_ADDRESS is not: set"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "'10.0.0.2' .* is not host:port"),
        ({"JAX_COORDINATOR_ADDRESS": ":8476"}, "is not host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "host:http"}, "is not host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "host:99999"}, "is not host:port"),
    ],
)
def test_environment_that_makes_no_sense(change, message):
    """Catches: a process that goes on alone, or waits for minutes, where a variable is wrong."""
    with pytest.raises(ValueError, match=message) as error:
        startup.from_environment(ALL | change, 1)
    assert "\n" not in str(error.value)


class Cluster:
    """What jax asks of a cluster."""

    name, opt_in_only_method = "pod", False
    count, index, local = 4, 0, None

    is_env_present = classmethod(lambda cls: True)
    get_process_count = classmethod(lambda cls: cls.count)
    get_process_id = classmethod(lambda cls: cls.index)
    get_local_process_id = classmethod(lambda cls: cls.local)
    get_coordinator_address = classmethod(
        lambda cls, timeout_secs, override_coordinator_port: (
            f"head:{override_coordinator_port or 1234}"
        )
    )


@pytest.fixture
def cluster(monkeypatch):
    from jax._src.clusters import ClusterEnv

    def use(**changes):
        monkeypatch.setattr(ClusterEnv, "_cluster_types", [type("Changed", (Cluster,), changes)])

    return use


def test_detected_cluster(cluster, monkeypatch):
    """Catches: detected settings that are not used, hosts known by name and called by number, one
    process a device forgotten.
    """
    cluster()
    member = startup.from_environment({"TPU_WORKER_HOSTNAMES": "head,b,c,d"}, 1)
    assert (member.coordinator, member.count, member.index, member.how, member.local_devices) == (
        "head:1234",
        4,
        0,
        "pod",
        None,
    )
    assert member.name(2) == "process 2 (c)"
    cluster(index=3, local=1)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "99")
    member = startup.from_environment({}, 1)
    assert (member.coordinator, member.index, member.local_devices) == ("head:99", 3, (1,))
    cluster(count=1)
    assert startup.from_environment({}, 1) is None


def test_cluster_that_does_not_answer(cluster):
    """Catches: the traceback of a metadata server or of Kubernetes."""

    def fails(cls):
        raise RuntimeError("no\nmetadata")

    cluster(get_process_id=classmethod(fails))
    with pytest.raises(
        ValueError,
        match="pod was detected, but not the position of this process in it: .*set JAX_COORD",
    ):
        startup.from_environment({}, 1)
