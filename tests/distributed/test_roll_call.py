"""The roll call, its processes as threads of this one."""

import concurrent.futures
import socket
import struct
import time

import pytest

from imagen_jax.distributed import roll_call

HOST = socket.gethostname()


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        yield pool


def lead(port, count, seconds=20.0, about="v1"):
    return roll_call.lead(
        port, count, about, seconds, lambda index: f"process {index} (tpu-{index})"
    )


def report(port, index, count, seconds=20.0, about="v1"):
    return roll_call.report("127.0.0.1", port, index, count, about, seconds)


def test_all_learn_all_hosts(port, pool):
    """Catches: process 0 that has to start first, an answer to the last only, a port still taken
    when jax needs it.
    """
    early = [pool.submit(report, port, index, 4) for index in (3, 1)]
    time.sleep(0.3)
    leader = pool.submit(lead, port, 4)
    late = pool.submit(report, port, 2, 4)
    for future in (*early, leader, late):
        assert future.result() == [HOST] * 4
    with socket.create_server(("", port)):
        pass


def test_missing_are_named_to_all(port, pool):
    """Catches: a time-out that only process 0 explains, or that does not say who is missing."""
    leader, there = pool.submit(lead, port, 4, 1.0), pool.submit(report, port, 2, 4)
    for future in (leader, there):
        with pytest.raises(
            ValueError,
            match=(
                r"^2 of 4 processes did not report within 1 s: process 1 \(tpu-1\), process 3"
                rf" \(tpu-3\); there are 0 \({HOST}\), 2"
            ),
        ):
            future.result()


def test_without_process_0(port):
    """Catches: waiting for ever where nobody listens."""
    with pytest.raises(
        ValueError,
        match=f"process 0 did not answer at 127.0.0.1:{port} within 0.5 s: Connection refused",
    ):
        report(port, 1, 2, 0.5)


def test_port_in_use(port, pool):
    """Catches: a traceback where another run has the coordinator's port, and a process that takes
    that run for its process 0.
    """
    with socket.create_server(("", port)) as other:
        with pytest.raises(
            ValueError, match=f"cannot listen on port {port} of {HOST}: Address already in use"
        ):
            lead(port, 2)
        astray = pool.submit(report, port, 1, 2)
        with other.accept()[0] as connection:
            connection.sendall(
                b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\n"
            )  # how a gRPC server begins
    leader = pool.submit(lead, port, 2)
    assert astray.result() == leader.result() == [HOST] * 2


@pytest.mark.parametrize(
    "second, message",
    [
        (dict(index=1, count=3), "process 1 (.*) expects 3 processes, process 0 (.*) expects 2"),
        (dict(index=1, count=2, about="v2"), "process 1 (.*) runs v2, process 0 (.*) runs v1"),
    ],
)
def test_processes_that_do_not_fit(port, pool, second, message):
    """Catches: runs of different size or version that begin together."""
    futures = pool.submit(lead, port, 2), pool.submit(report, port, **second)
    for future in futures:
        with pytest.raises(ValueError, match=message):
            future.result()


def test_the_same_process_twice(port, pool):
    """Catches: two processes of the same number of which one hangs in jax."""
    futures = [
        pool.submit(lead, port, 3),
        pool.submit(report, port, 1, 3),
        pool.submit(report, port, 1, 3),
    ]
    for future in futures:
        with pytest.raises(ValueError, match="two processes report as process 1"):
            future.result()


def test_the_same_process_twice_and_gone(port, pool):
    """Catches: a process that was there twice and did not wait for the answer, whose broken
    connection ends the call without a word to the others.
    """
    leader, first = pool.submit(lead, port, 3), pool.submit(report, port, 1, 3)
    time.sleep(0.3)
    message = roll_call._line({"index": 1, "count": 3, "host": "b", "about": "v1"})
    with socket.create_connection(("127.0.0.1", port), timeout=5) as second:
        second.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )  # closed with a reset
        second.sendall(message)
    for future in (leader, first):
        with pytest.raises(ValueError, match="two processes report as process 1|did not report"):
            future.result()


def test_listens_where_it_is_told_to(port, pool):
    """Catches: a coordinator of this machine's own processes that other machines can reach."""
    leader = pool.submit(roll_call.lead, port, 2, "v1", 20.0, str, "127.0.0.1")
    while (taken := socket.socket()).connect_ex(("127.0.0.1", port)):
        taken.close()
    with socket.socket() as elsewhere:
        assert elsewhere.connect_ex(("127.0.0.2", port)), "it listens on other addresses too"
    taken.close()
    assert report(port, 1, 2) == leader.result() == [HOST] * 2


def test_restart_and_strangers_during_the_roll_call(port, pool):
    """Catches: a process that is not let in again after it was killed while it waited; a port
    scanner or health check that counts as one, or ends the call.
    """
    leader = pool.submit(lead, port, 2)
    for sent in (
        b"",
        b"GET / HTTP/1.1\r\n",
        b"[1]\n",
        b'{"index": "x", "count": 2, "host": "a", "about": ""}\n',
        b"x" * 10000,
    ):
        deadline = time.monotonic() + 5
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline
        stranger.sendall(sent)
        if len(sent) < 100:
            stranger.close()
    killed = socket.create_connection(("127.0.0.1", port), timeout=5)
    killed.sendall(
        roll_call._line({"index": 1, "count": 3 - 1, "host": "before", "about": "v1"})[:-5]
    )
    killed.close()
    assert report(port, 1, 2) == leader.result() == [HOST] * 2
