"""The roll call before jax.distributed starts: it names the processes that are missing.

Each process reports to process 0 on the coordinator's port, and process 0 answers all of them. jax
waits for every process too, but after its timeout it ends the process from C++ without naming the
missing ones. A message is one JSON object on one line: {"index", "count", "host", "about"} to
process 0, and {"hosts": [...]} or {"error": ...} back.
"""

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

RETRY_S = 0.2  # between two attempts to reach process 0, which may start last
LONGEST = 4096  # bytes of a message to process 0; a longer one is not from a process of a run


def lead(
    port: int, count: int, about: str, timeout_s: float, name: Callable[[int], str], bind: str = ""
) -> list[str]:
    """Process 0's part: waits for the other processes and returns the host names by process.

    port, bind: where to listen; an empty `bind` means all addresses of this host.
    about: text that must be equal in all processes, such as versions.
    name: a missing process in words.

    Raises ValueError, here and in all processes that reported, if a process is missing after
    `timeout_s` seconds, reports twice, expects another number of processes or differs in `about`.
    """
    end = time.monotonic() + timeout_s
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(_listen(bind, port))
        roll = _Roll(opened.enter_context(selectors.DefaultSelector()), opened, count, about)
        roll.selector.register(server, selectors.EVENT_READ)
        while len(roll.hosts) < count and not roll.error and (left := end - time.monotonic()) > 0:
            for key, _ in roll.selector.select(left):
                roll.accept(server) if key.fileobj is server else roll.read(key.fileobj, key.data)
        missing = [name(index) for index in range(count) if index not in roll.hosts]
        if missing and not roll.error:
            present = ", ".join(f"{index} ({roll.hosts[index]})" for index in sorted(roll.hosts))
            roll.error = (
                f"{count - len(roll.hosts)} of {count} processes did not report within"
                f" {timeout_s:g} s: {', '.join(missing)}; there are {present}"
            )
        answer = (
            {"error": roll.error}
            if roll.error
            else {"hosts": [roll.hosts[index] for index in range(count)]}
        )
        roll.answer(answer)
    return _hosts(answer)


def report(host: str, port: int, index: int, count: int, about: str, timeout_s: float) -> list[str]:
    """The part of every other process: reports to process 0 at host:port and returns the host names
    by process. Raises as `lead` does.
    """
    me = _line({"index": index, "count": count, "host": socket.gethostname(), "about": about})
    end, failure = time.monotonic() + timeout_s, "nobody there"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10)) as connection:
                connection.sendall(me)
                connection.settimeout(timeout_s + 10)  # process 0 may have begun to wait just now
                with connection.makefile("rb") as answers:
                    return _hosts(json.loads(answers.readline() or b"null"))
        except OSError as error:
            failure = error.strerror or str(error)
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            # another run, or process 0 was stopped
            failure = "the program that listens there is not a process 0 that waits for others"
        time.sleep(min(RETRY_S, max(0.0, end - time.monotonic())))
    raise ValueError(f"process 0 did not answer at {host}:{port} within {timeout_s:g} s: {failure}")


class _Roll:
    """The processes that have reported, with the connections on which they wait."""

    def __init__(
        self, selector: selectors.BaseSelector, opened: contextlib.ExitStack, count: int, about: str
    ):
        self.selector, self.error = selector, ""
        self.hosts = {0: socket.gethostname()}
        self._opened, self._count, self._about = opened, count, about
        self._waiting: dict[int, socket.socket] = {}

    def accept(self, server: socket.socket) -> None:
        connection = self._opened.enter_context(server.accept()[0])
        connection.setblocking(False)
        self.selector.register(connection, selectors.EVENT_READ, bytearray())

    def read(self, connection: socket.socket, received: bytearray) -> None:
        """Reads from a connection. When it ends, its process may report again."""
        try:
            new = connection.recv(LONGEST)
        except OSError:
            new = b""
        received += new
        if not new or len(received) > LONGEST:
            self.selector.unregister(connection)
            connection.close()
            for index in [
                index for index, waiting in self._waiting.items() if waiting is connection
            ]:
                del self._waiting[index], self.hosts[index]
        elif received.endswith(b"\n"):
            self._note(connection, received)

    def _note(self, connection: socket.socket, received: bytearray) -> None:
        try:
            message = json.loads(received)
            index, count, host, about = (
                int(message["index"]),
                int(message["count"]),
                str(message["host"]),
                message["about"],
            )
        except (ValueError, TypeError, KeyError):
            return  # not from a process of a run; it gets no answer
        if count != self._count or not 0 <= index < count:
            self.error = (
                f"process {index} ({host}) expects {count} processes, process 0 ({self.hosts[0]})"
                f" expects {self._count}"
            )
        elif index in self.hosts:
            self.error = (
                f"two processes report as process {index}: on {self.hosts[index]} and on {host}"
            )
        elif about != self._about:
            self.error = (
                f"process {index} ({host}) runs {about}, process 0 ({self.hosts[0]}) runs"
                f" {self._about}"
            )
        self.hosts.setdefault(index, host)
        self._waiting.setdefault(index, connection)
        if self._waiting[index] is not connection:
            with contextlib.suppress(OSError):  # it did not wait for the answer
                connection.sendall(_line({"error": self.error}))

    def answer(self, answer: Mapping[str, Any]) -> None:
        for connection in self._waiting.values():
            with contextlib.suppress(OSError):
                connection.sendall(_line(answer))


def _listen(bind: str, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        if bind:
            return socket.create_server(
                (bind, port),
                family=socket.AF_INET6 if ":" in bind else socket.AF_INET,
                backlog=4096,
            )
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=4096,
        )
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} of {socket.gethostname()}: {error.strerror};"
            " is another run using it?"
        ) from error


def _hosts(answer: Mapping[str, Any]) -> list[str]:
    if "error" in answer:
        raise ValueError(answer["error"])
    return list(answer["hosts"])


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
