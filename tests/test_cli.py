"""Each command: quick --help, and one clear line for invalid input."""

import os
import pathlib
import resource
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, output_paths
from tests import command_process, tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = (
    "imagen_jax.prepare_data",
    "imagen_jax.train",
    "imagen_jax.sample",
    "imagen_jax.evaluate",
    "imagen_jax.export",
    "imagen_jax.demo",
    "imagen_jax.plan",
    "imagen_jax.rate",
    "launch.sweep",
)
# Flags that the module of a command does not define itself.
FROM_OTHER_MODULES = {
    "imagen_jax.prepare_data": ["--source", "--heldout", "--tfds_split"],
    "imagen_jax.train": ["--compile_cache", "--config"],
    "imagen_jax.evaluate": ["--compile_cache"],
}
CASCADE = "--cascade=configs/cascade.py:demo"
TINY = "--config=configs/base_64.py:tiny"
MISTAKES = {
    "no arguments": ("imagen_jax.train", [], "--config FILE and --workdir DIR"),
    "no config file": (
        "imagen_jax.train",
        ["--config=configs/base_65.py", "--workdir=w"],
        "base_65.py",
    ),
    "unknown variant": (
        "imagen_jax.train",
        ["--config=configs/base_64.py:tinny", "--workdir=w"],
        "error: base_64 has no variant 'tinny'; use",
    ),
    "unknown field": (
        "imagen_jax.train",
        [TINY, "--config.optim.lrr=1", "--workdir=w"],
        "no field 'lrr'; did you mean 'lr'?",
    ),
    "not a number": (
        "imagen_jax.train",
        [TINY, "--config.optim.lr=fast", "--workdir=w"],
        "could not convert string to float: 'fast'",
    ),
    "unknown option": ("imagen_jax.train", [TINY, "--wokdir=w"], "wokdir"),
    "no such verb": ("imagen_jax.rate", ["analyze"], "'analyze' is none of make, analyse, export"),
    "stray word": (
        "imagen_jax.train",
        [TINY, "--workdir=w", "resume"],
        "unexpected argument 'resume'",
    ),
    "no data": (
        "imagen_jax.train",
        [TINY, "--workdir=w"],
        "data.path and data.mixture are both empty",
    ),
    "data not prepared": (
        "imagen_jax.train",
        [TINY, "--config.data.path=nowhere", "--workdir=w"],
        "nowhere does not exist",
    ),
    "mesh that does not fit": (
        "imagen_jax.train",
        [TINY, "--config.mesh.data=3", "--config.data.path=gone", "--workdir=w"],
        "does not fit",
    ),
    "no prompt": (
        "imagen_jax.sample",
        ["--config=configs/cascade.py:demo", "--output=o"],
        "--prompt",
    ),
    "empty prompt": (
        "imagen_jax.sample",
        ["--config=configs/cascade.py:demo", "--output=o", "--prompt= "],
        "prompt ' ' is empty",
    ),
    "too many pictures": (
        "imagen_jax.sample",
        ["--config=configs/cascade.py:demo", "--output=o", "--prompt=a", "--count=10000001"],
        "10,000,001 pictures are more than one command can list in memory",
    ),
    "no such stage": (
        "imagen_jax.sample",
        ["--config=configs/cascade.py:demo", "--output=o", "--prompt=a", "--stages=sr_3"],
        "--stages sr_3",
    ),
    "no such sampler": (
        "imagen_jax.sample",
        [
            "--config=configs/cascade.py:demo",
            "--config.base.sampling.method=heun",
            "--output=o",
            "--prompt=a",
        ],
        "'heun'",
    ),
    "empty prompt of the demo": (
        "imagen_jax.demo",
        ["--output=o", "--prompt= "],
        "prompt ' ' is empty",
    ),
    "no time to train": ("imagen_jax.demo", ["--output=o", "--minutes=0"], "0.1"),
    "profile of no steps": (
        "imagen_jax.train",
        [TINY, "--config.data.path=gone", "--workdir=w", "--profile=20"],
        "FIRST:COUNT",
    ),
    "config of a cascade": (
        "imagen_jax.train",
        ["--config=configs/cascade.py:demo", "--workdir=w"],
        "not the config of a stage",
    ),
    "config of a stage": (
        "imagen_jax.sample",
        [TINY, "--output=o", "--prompt=a"],
        "not the config of a cascade",
    ),
    "no picture's record": (
        "imagen_jax.sample",
        ["--output=o", "--reproduce=configs/base_64.py"],
        "configs/base_64.py is not valid JSON",
    ),
    "directory that is a file": (
        "imagen_jax.sample",
        ["--config=configs/cascade.py:demo", "--output=configs/base_64.py", "--prompt=a"],
        "is a file; give a directory",
    ),
    "other ending": (
        "imagen_jax.export",
        ["--checkpoint=gone", "--output=base.bin"],
        "must end in .safetensors",
    ),
    "nothing to reproduce": (
        "imagen_jax.sample",
        ["--output=o", "--reproduce=gone.json"],
        "gone.json",
    ),
    "no checkpoint": (
        "imagen_jax.evaluate",
        ["--checkpoint=gone", "--data=gone", "--output=o"],
        "gone",
    ),
    "checkpoint and cascade": (
        "imagen_jax.evaluate",
        [CASCADE, "--checkpoint=gone", "--output=o"],
        "either --cascade CONFIG (with --suite) or --checkpoint (with --data)",
    ),
    "flag of the other evaluation": (
        "imagen_jax.evaluate",
        [CASCADE, "--suite=embedded", "--network=efficientnet-lite0", "--output=o", "--w=2"],
        "--w is for --checkpoint; leave it out; set fields with --cascade.STAGE.sampling.FIELD",
    ),
    "no suite": ("imagen_jax.evaluate", [CASCADE, "--output=o"], "--cascade needs --suite NAME"),
    "no network": (
        "imagen_jax.evaluate",
        [CASCADE, "--suite=embedded", "--output=o"],
        "--network is needed",
    ),
    "captions of no data": (
        "imagen_jax.evaluate",
        [CASCADE, "--suite=data", "--output=o"],
        "--suite data needs --data",
    ),
    "no source": (
        "imagen_jax.prepare_data",
        ["--source=folder:gone", "--output=o", "--encoder=t5_tiny"],
        "gone is not a directory",
    ),
    "no encoder": (
        "imagen_jax.prepare_data",
        ["--source=emoji", "--output=o", "--encoder=./gone"],
        "gone",
    ),
    "no topology": ("imagen_jax.plan", [TINY], "--topology NAME"),
    "no such topology": (
        "imagen_jax.plan",
        [TINY, "--topology=v5e-17"],
        "there is no slice of 17 v5e chips",
    ),
    "nowhere to write": (
        "imagen_jax.plan",
        [TINY, "--topology=v5e-4", "--output=/proc/plan"],
        "--output /proc/plan cannot be written to",
    ),
    "no such chip": ("imagen_jax.plan", [TINY, "--topology=v9-8"], "use one of v4, v5e"),
    "argument forgotten": (
        "imagen_jax.prepare_data",
        ["--source=emoji", "--output=o"],
        "give one of --encoder NAME, --images_only and --text_only",
    ),
    "option misspelt": (
        "imagen_jax.prepare_data",
        ["--source=emoji", "--output=o", "--encodr=t5_tiny"],
        "Unknown command line flag 'encodr'. Did you mean: encoder ?",
    ),
    "no ablation": (
        "launch.sweep",
        ["--config=configs/sr_256.py:tiny", "--workdir=w"],
        "has no sweep",
    ),
}


def run(command, *options, cwd):
    """The finished process of a command, run as a user would run it, in the directory `cwd`."""
    (cwd / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", command, *options],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick(command, tmp_path):
    """Catches jax, flax or transformers imported before the command line is read: 3 s of processor
    time; and flags of other modules that --help does not list.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(command, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert f"python -m {command}" in done.stdout
    for flag in FROM_OTHER_MODULES.get(command, ["--"]):
        assert flag in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, tmp_path, tmp_path_factory):
    """Catches a traceback, exit code 0, a line that does not name the mistake, and a file written
    before the mistake was found.
    """
    command, options, message = MISTAKES[mistake]
    log = tmp_path_factory.mktemp("log") / "stderr"
    done = command_process.run(command, *options, cwd=tmp_path, log=log)
    assert done.returncode == 2
    (line,) = tiny.said(done.stderr)
    assert line.startswith("error: ") and message in line, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"configs"}


def test_traceback_on_request(tmp_path, monkeypatch):
    """Catches IMAGEN_JAX_TRACEBACK=1 without a traceback."""
    monkeypatch.setenv("IMAGEN_JAX_TRACEBACK", "1")
    assert "Traceback" in run("imagen_jax.train", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    "platforms, expected", [("cuda", "cuda,cpu"), ("tpu,cpu", "tpu,cpu"), ("", "")]
)
def test_the_cpu_stays_beside_the_accelerator(platforms, expected):
    """Catches JAX_PLATFORMS=cuda that leaves no CPU to count a step's FLOPs."""
    code = (
        "import jax; from absl import flags; from imagen_jax import cli;"
        " cli.define_compile_cache(); flags.FLAGS(['x']); "
    )
    code += "cli.set_up_jax(); print(jax.config.jax_platforms)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platforms},
    )
    assert ran.stdout.strip() == expected, ran.stderr


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize(
    ("name", "message"),
    [("", " is a directory; give a file, such as"), ("gone.py", "gone.py")],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, name, message):
    """Catches "Configuration is not available", and a config that is read after other checks."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    with pytest.raises(SystemExit):
        cli.parse(["command", f"--config={tmp_path / name}"])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_directory_in_place_of_a_file_is_explained(tmp_path):
    """Catches "Is a directory" without the flag, or without advice."""
    with pytest.raises(ValueError, match=r"^--prompts .* is a directory; give a file$"):
        output_paths.check_file("prompts", str(tmp_path))
    output_paths.check_file("prompts", "")
    with pytest.raises(IsADirectoryError) as error:
        tmp_path.read_bytes()
    assert cli.describe(error.value) == f"{tmp_path}: Is a directory; give a file"


def test_a_list_of_pictures_that_does_not_fit_is_refused():
    """Catches --count=1000000000 that fills the memory of the host."""
    cli.check_count(1_000_000, 10, "")
    message = "10,000,001 pictures are more than one .* [(]10,000,000[)]: give a smaller --count"
    with pytest.raises(ValueError, match=message):
        cli.check_count(1, 10_000_001, "give a smaller --count")
