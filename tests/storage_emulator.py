"""Cloud Storage on this machine: gcp-storage-emulator behind a proxy on loopback.

The emulator ignores preconditions and never fails. The proxy enforces `ifGenerationMatch` and
`ifGenerationNotMatch`, reports the generation of an object that is read, limits listings as asked,
and answers a share of the requests with 503 or late.

    python -m tests.storage_emulator --port 9000 --failing 0.05 --delay 0.2

serves the bucket BUCKET until it is stopped.
"""

import argparse
import contextlib
import http.client
import http.server
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUCKET = "imagen-jax-test"
START_S = 30.0
SET_FAILING = "/failing/"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}
OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
LISTING = re.compile(r"/storage/v1/b/[^/]+/o/?")
UPLOAD = re.compile(r"/upload/(?:resumable/)?(?:storage/v1/)?b/([^/]+)/o")


def environment(port):
    """The variables with which TensorStore, gcsfs and google-cloud-storage use a server here."""
    url = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google for the kind of bucket, by gRPC
        "NO_PROXY": "localhost",
    }


@contextlib.contextmanager
def served(failing=0.0, delay=0.0, seed=0):
    """A server in a process of its own, with one empty bucket; yields its `environment`.

    failing: the share of requests that are answered with 503. delay: the longest delay of an answer
    in seconds.
    """
    port = free_port()
    command = [sys.executable, "-m", "tests.storage_emulator", f"--port={port}", f"--seed={seed}"]
    command += [f"--failing={failing}", f"--delay={delay}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout.readline().startswith("serving"), "the emulator did not start"
            yield environment(port)
        finally:
            process.kill()


@contextlib.contextmanager
def used(failing=0.0, delay=0.0, seed=0):
    """`served`; sets the variables in this process too, while the context lasts."""
    import pytest  # not in the process of the server

    with served(failing, delay, seed) as env, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        yield env


def directory_of(request):
    """An empty directory of the bucket, for one test. request: that of pytest."""
    from imagen_jax import storage  # not in the process of the server

    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return storage.as_path("the directory", f"gs://{BUCKET}/{name}")


def set_failing(env, share):
    """Changes the share of requests that a server fails. env: its `environment`."""
    urllib.request.urlopen(f"{env['STORAGE_EMULATOR_HOST']}{SET_FAILING}{share}").close()


def free_port():
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards requests to the emulator on the port `behind`."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port, behind, failing, delay, seed):
        super().__init__(("localhost", port), Handler)
        self.behind, self.failing, self.delay = behind, failing, delay
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.conditions = {}  # of resumable uploads, by their identifier


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Prints nothing."""

    def do_GET(self):
        if self.path.startswith(SET_FAILING):
            self.server.failing = float(self.path.removeprefix(SET_FAILING))
            return self.answer(200, {}, b"")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        with self.server.lock:
            fails = self.server.random.random() < self.server.failing
            delay = self.server.random.random() * self.server.delay
        time.sleep(delay)
        if fails:
            return self.answer(503, {}, b'{"error": {"code": 503, "message": "injected"}}')
        if self.command == "GET":
            return self.answer(*self.read_object(body))
        # One write at a time: between the check of a precondition and the write nothing happens.
        with self.server.lock:
            if (status := self.refused()) is not None:
                return self.answer(status, {}, b'{"error": {"code": %d}}' % status)
            status, headers, content = self.forward(body)
            self.remember(headers)
        self.answer(status, headers, content)

    do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = do_GET

    def read_chunks(self):
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def query(self):
        query = urllib.parse.urlsplit(self.path).query
        return {name: values[0] for name, values in urllib.parse.parse_qs(query).items()}

    def read_object(self, body):
        """The answer to a GET; that of an object has its generation."""
        path = urllib.parse.urlsplit(self.path).path
        if LISTING.fullmatch(path):
            return self.list_objects(body)
        match = OBJECT.fullmatch(path)
        if not match or self.query.get("alt") != "media":
            return self.forward(body)
        with self.server.lock:
            now = self.generation(match[1], match[2])
            if (status := self.refused()) is not None:
                return status, {"x-goog-generation": now}, b""
            status, headers, content = self.forward(body)
        return status, headers | {"x-goog-generation": now}, content

    def list_objects(self, body):
        """A listing; the emulator ignores `startOffset` and `endOffset`."""
        status, headers, content = self.forward(body)
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        if status == 200 and (first or end):
            listing = json.loads(content)
            inside = lambda item: item["name"] >= first and (not end or item["name"] < end)
            listing["items"] = [item for item in listing.get("items", []) if inside(item)]
            content = json.dumps(listing).encode()
        return status, headers, content

    def target(self):
        """(bucket, quoted object) of this request; None if it is about no object."""
        path = urllib.parse.urlsplit(self.path).path
        if match := OBJECT.fullmatch(path):
            return match[1], match[2]
        if (match := UPLOAD.fullmatch(path)) and "name" in self.query:
            return match[1], urllib.parse.quote(self.query["name"], safe="")
        return None

    def refused(self):
        """The status of a request whose preconditions do not hold; None if they do."""
        conditions, target = self.query, self.target()
        if "upload_id" in conditions:
            conditions, target = self.server.conditions.get(conditions["upload_id"], ({}, target))
        names = ("ifGenerationMatch", "ifGenerationNotMatch")
        if target is None or not any(name in conditions for name in names):
            return None
        now = self.generation(*target)
        if conditions.get(names[0], now) != now:
            return 412
        if conditions.get(names[1]) == now:
            return 304 if self.command == "GET" else 412
        return None

    def remember(self, headers):
        """Keeps the conditions of a resumable upload for the requests that bring its content."""
        location = next((v for k, v in headers.items() if k.lower() == "location"), "")
        started = urllib.parse.parse_qs(urllib.parse.urlsplit(location).query).get("upload_id")
        if started:
            self.server.conditions[started[0]] = (self.query, self.target())

    def generation(self, bucket, name):
        """The generation of an object as text, "0" if there is none."""
        path = f"/storage/v1/b/{bucket}/o/{name}"
        status, _, content = self.ask("GET", path, {}, b"")
        return json.loads(content)["generation"] if status == 200 else "0"

    def forward(self, body):
        kept = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
        return self.ask(self.command, self.path, kept, body)

    def ask(self, method, path, headers, body):
        connection = http.client.HTTPConnection("localhost", self.server.behind)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_BY_HOP}
        return answer.status, kept, content

    def answer(self, status, headers, content):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # the client no longer wants the answer
            if self.command != "HEAD":
                self.wfile.write(content)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--failing", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from gcp_storage_emulator import server

    behind = free_port()
    # The emulator writes its own address into the locations of uploads.
    os.environ["STORAGE_EMULATOR_HOST"] = f"http://localhost:{args.port}"
    emulator = server.create_server("localhost", behind, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    proxy = Proxy(args.port, behind, args.failing, args.delay, args.seed)
    print(f"serving gs://{BUCKET} on port {args.port}", flush=True)
    proxy.serve_forever()


if __name__ == "__main__":
    main()
