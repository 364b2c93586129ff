"""A fake text encoder, folders of generated images, and a program that prepares one.

Tests run the program to kill it.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from imagen_jax import cli, storage
from imagen_jax.data.prepare import ingest, passes
from imagen_jax.data.prepare.preview import Bytes
from imagen_jax.data.sources.folder import FolderSource
from imagen_jax.distributed import startup
from imagen_jax.distributed.watch import Watch
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.object_storage import AnyPath
from tests.data import synthetic

LOST_S = 8.0  # without a heartbeat, in the program
SETTINGS = {"shard_size": 8, "min_size": 0, "batch_size": 4, "processes": 1}


class FakeEncoder:
    """A text.encoder.TextEncoder: a token is a word, the text seeds its features."""

    dim = 8
    pooled_dim = 0

    def __init__(self, max_length: int = 6, pause: float = 0.0, log: Path | None = None):
        self.max_length = max_length
        self.identity = {
            "name": "fake",
            "weights_sha256": "0",
            "max_length": max_length,
            "dtype": "bfloat16",
            "dim": self.dim,
        }
        self.encoded: list[str] = []
        self._pause, self._log = pause, log

    def tokenize(self, texts):
        words = [[5] * len(text.split()) + [1] for text in texts]
        return [row[-self.max_length :] for row in words], [
            len(row) > self.max_length for row in words
        ]

    def unknown(self, texts):
        return [""] * len(texts)

    def encode(self, texts, batch_size, fill=False):
        time.sleep(self._pause)
        self.encoded += texts
        if self._log:
            with open(self._log, "a") as file:
                file.writelines(f"{text}\n" for text in texts)
        return [self.features(text) for text in texts]

    def encode_pooled(self, texts, batch_size, fill=False):
        features = self.encode(texts, batch_size, fill)
        return features, np.empty((len(texts), 0), ml_dtypes.bfloat16)

    def features(self, text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        length = len(self.tokenize([text])[0][0])
        return (
            np.random.default_rng(seed).normal(size=(length, self.dim)).astype(ml_dtypes.bfloat16)
        )


class NamedEncoder(FakeEncoder):
    """A FakeEncoder with a width, a pooled vector and features of its own."""

    def __init__(self, name: str, dim: int, pooled_dim: int, max_length: int, pause: float = 0.0):
        self.dim, self.pooled_dim = dim, pooled_dim
        super().__init__(max_length, pause)
        self.identity |= {"name": name, "pooled_dim": pooled_dim}

    def encode_pooled(self, texts, batch_size, fill=False):
        features = self.encode(texts, batch_size, fill)
        pooled = np.array([self.pooled(text) for text in texts])
        return features, pooled.reshape(len(texts), self.pooled_dim)

    def pooled(self, text):
        numbers = np.arange(self.pooled_dim) + len(text) + int(text[-1:].isdigit())
        return (numbers / 7).astype(ml_dtypes.bfloat16)


def two_encoders(pause: float = 0.0) -> dict[str, NamedEncoder]:
    """One that truncates no caption and has a pooled vector, one that does and has not."""
    return {
        "wide": NamedEncoder("wide fake", 12, 5, 6, pause),
        "tiny": NamedEncoder("tiny fake", 4, 0, 3, pause),
    }


def named(encoders=None) -> Encoders:
    """`two_encoders` or these, for a preparation."""
    encoders = two_encoders() if encoders is None else encoders
    return Encoders({name: lambda one=one: one for name, one in encoders.items()})


def write_folder(directory: Path, images: int = 20) -> Path:
    """Writes images with two captions each, one of them shared by all, in captions.jsonl."""
    directory.mkdir(parents=True)
    lines = []
    for i in range(images):
        (directory / f"{i:03d}.png").write_bytes(synthetic.encode(synthetic.gradient(32, i)))
        lines.append({"file": f"{i:03d}.png", "captions": [f"picture number {i}", "a colour ramp"]})
    (directory / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def prepare(folder: Path, output: AnyPath, encoder=None, heldout: float = 0.2, **changes):
    """Prepares a folder with SETTINGS and these changes; returns the manifest.

    encoder: a TextEncoder without a name, or all Encoders.
    """
    settings = passes.Settings(**SETTINGS | changes)
    if not isinstance(encoder, Encoders):
        encoder = Encoders.single(encoder or FakeEncoder())
    return passes.prepare(FolderSource(folder, heldout), encoder, output, settings)


def skipped(output: Path) -> list[dict]:
    """The lines of skipped.jsonl."""
    return [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]


def tree(directory: AnyPath) -> dict[str, str]:
    """SHA-256 of every file under a directory, by relative path."""
    names = storage.file_names(directory)
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def is_complete(output: AnyPath) -> bool:
    """Whether an output has its manifest."""
    return (output / "manifest.json").exists()


def stored(output: AnyPath) -> dict[str, str]:
    """`tree` of an output without its work files and unfinished files."""
    files = tree(output).items() if output.exists() else ()
    return {
        name: digest
        for name, digest in files
        if not name.startswith("partial/") and not Path(name).name.startswith(".")
    }


def kill_at_rename(count: int) -> None:
    """Makes the `count`-th call of os.replace or os.rename kill this process.

    In a bucket, the `count`-th file that is stored. It dies before it if count is even, else after.
    """
    left = [count]

    def wrap(rename):
        def renaming(*args):
            left[0] -= 1
            if left[0] == 0 and count % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*args)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return renaming

    os.replace, os.rename = wrap(os.replace), wrap(os.rename)
    storage.copy_file = wrap(storage.copy_file)


def main(folder: str, output: str, processes: int, kill_at: int, log: Path | None = None) -> None:
    """Prepares `folder` as one process of the run that the environment describes.

    Logs the captions that are encoded, those of a preview excepted. With TWO_ENCODERS in the
    environment it prepares with `two_encoders` and logs nothing.
    """
    if kill_at:
        kill_at_rename(kill_at)
    ingest.CHUNK = 4
    if log:
        passes.preview = lambda *_: Bytes(0, 0, 0)
    settings = passes.Settings(**SETTINGS | {"processes": processes})
    cli.log_to_stderr()
    startup.start(lost_s=LOST_S)
    with Watch(LOST_S):
        one = Encoders.single(FakeEncoder(pause=0.05, log=log))
        encoders = named(two_encoders(0.05)) if "TWO_ENCODERS" in os.environ else one
        path = storage.as_path("--output", output)
        passes.prepare(FolderSource(folder, 0.2), encoders, path, settings)


if __name__ == "__main__":
    arguments = (*sys.argv[1:3], *map(int, sys.argv[3:5]))
    sys.exit(cli.guard(lambda: main(*arguments, *map(Path, sys.argv[5:6]))))
