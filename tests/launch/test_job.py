"""The description of a run, and how the command line makes it."""

import dataclasses
import re
import subprocess

import pytest

from imagen_jax.hardware.topology import parse
from launch import __main__ as command_line
from launch import job as jobs
from launch import machines, slurm, tpu_pod
from tests import tiny

CONFIG = f"{tiny.ROOT}/configs/base_64.py:tiny"
LOCAL = ("--where", "local", "--config", CONFIG, "--config.data.path=/data")


NEEDED = {"tpu": ["--zone=z"], "gke": ["--image=i"]}


def read(*argv):
    return command_line.read(argv)


@pytest.mark.parametrize(
    "workdir",
    ["/runs/a", "gs://bucket/team/base 64 (new)", "/" + "long/" * 30 + "Name_" * 20, "/1/2"],
)
def test_a_name_is_a_label_of_its_workdir_alone(workdir):
    """Catches a name that Kubernetes or Google Cloud refuses, or that two workdirs share.

    Also catches a name that depends on the spelling of the path.
    """
    name = jobs.name_of(workdir)
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) and len(name) <= jobs.NAME_LENGTH
    assert name == jobs.name_of(workdir + "/") != jobs.name_of(workdir + "x")
    # Pods of a JobSet: <name>-slice-<two digits>-<four>-<five characters>; labels have at most 63.
    assert len(f"{name}-slice-63-2047-abcde") <= 63


def test_names_differ_where_only_the_hash_can_tell():
    """Catches one job name for two runs whose last directories are equal."""
    assert jobs.name_of("/a/runs/base") != jobs.name_of("/b/runs/base")


def test_a_bucket_is_a_directory_on_the_machines():
    """Catches a local directory named gs:, whose checkpoints are lost with the machine."""
    job = jobs.Job(
        "n",
        (
            "-m",
            "x",
            "--workdir=gs://b/r",
            "gs://c",
            "--config.data.path=gs://b/d",
            "--prompt=a gs://not",
        ),
        "gs://b/r",
    )
    assert job.command("p") == (
        "p",
        "-m",
        "x",
        "--workdir=/mnt/gs/b/r",
        "/mnt/gs/c",
        "--config.data.path=/mnt/gs/b/d",
        "--prompt=a gs://not",
    )
    assert job.buckets == ("b", "c")


@pytest.mark.parametrize(
    "command, given, expected, buckets",
    [
        ("train", ["--workdir=gs://b/r"], ["--workdir=gs://b/r"], ()),
        ("train", ["--workdir", "gs://b/r"], ["--workdir", "gs://b/r"], ()),
        ("train", ["-fork=gs://b/r", "gs://c"], ["-fork=gs://b/r", "/mnt/gs/c"], ("c",)),
        ("train", ["--init_from=/mnt/gs/b/r"], ["--init_from=/mnt/gs/b/r"], ("b",)),
        ("train", ["--workdirs=gs://b/r"], ["--workdirs=/mnt/gs/b/r"], ("b",)),
        ("evaluate", ["--checkpoint=gs://b/r"], ["--checkpoint=gs://b/r"], ()),
        (
            "train",
            ["--config.data.path", "gs://b/d", "--config.train.fast_dir=gs://f"],
            ["--config.data.path", "gs://b/d", "--config.train.fast_dir=/mnt/gs/f"],
            ("f",),
        ),
        ("train", ["--config.data.paths=gs://b/d"], ["--config.data.paths=/mnt/gs/b/d"], ("b",)),
        ("train", ["--config.data.path=/mnt/gs/b/d"], ["--config.data.path=/mnt/gs/b/d"], ("b",)),
        (
            "train",
            ["--config.data.mixture=(('gs://b/d', 1.0), ('/mnt/gs/c/d', 2.0))"],
            ["--config.data.mixture=(('gs://b/d', 1.0), ('/mnt/gs/c/d', 2.0))"],
            ("c",),
        ),
        (
            "evaluate",
            ["--output=gs://b/r", "--data=gs://d"],
            ["--output=gs://b/r", "--data=gs://d"],
            (),
        ),
        (
            "evaluate",
            ["--cascade.sr_1.checkpoint=gs://b/r"],
            ["--cascade.sr_1.checkpoint=gs://b/r"],
            (),
        ),
        ("evaluate", ["--images=gs://b/r"], ["--images=/mnt/gs/b/r"], ("b",)),
        (
            "sample",
            ["--config.base.checkpoint=gs://b/r"],
            ["--config.base.checkpoint=gs://b/r"],
            (),
        ),
        ("sample", ["--output", "gs://b/r"], ["--output", "gs://b/r"], ()),
        ("export", ["--output=gs://b/r"], ["--output=gs://b/r"], ()),
        ("prepare_data", ["--output=gs://b/r"], ["--output=gs://b/r"], ()),
        (
            "prepare_data",
            ["--source=parquet:gs://b/*", "--encoder=gs://c/e"],
            ["--source=parquet:gs://b/*", "--encoder=/mnt/gs/c/e"],
            ("c",),
        ),
    ],
)
def test_only_what_needs_a_mount_is_mounted(command, given, expected, buckets):
    """Catches a run on a mount although the command reads buckets itself, a path that the command
    refuses because it is not mounted, and machines without the package that reads buckets.
    """
    job = jobs.Job("n", ("-m", f"imagen_jax.{command}", *given), "gs://b/r")
    assert list(job.command("p"))[3:] == expected and job.buckets == buckets
    assert job.opens_buckets == any("gs://" in text for text in expected)
    assert bool(job.unmounted) == (expected != given)
    job = dataclasses.replace(job, topology=parse("v5e:2x4"))
    assert (",gcs]" in job.install) == job.opens_buckets


def test_a_config_elsewhere_is_not_promised_to_other_machines(tmp_path, capsys):
    """Catches machines that start without a config that only this machine has."""
    (tmp_path / "c.py").write_text((tiny.ROOT / "configs" / "base_64.py").read_text())
    argv = (
        "--where=tpu",
        "--topology=v5e:2x4",
        "--zone=z",
        "--workdir=gs://b/r",
        f"--config={tmp_path}/c.py:tiny",
        "--config.data.path=gs://b/d",
    )
    assert command_line.main(argv) == 2
    assert "other machines do not have it" in capsys.readouterr().err
    (job,), _ = read(*argv[:4], f"--config={CONFIG}", argv[5])
    assert "--config=configs/base_64.py:tiny" in job.arguments


def test_what_is_not_in_the_commit_is_not_promised_to_other_machines(tmp_path, monkeypatch, capsys):
    """Catches workers that get the commit's config instead of the changed one."""
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", *words],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    (tmp_path / "kept.py").write_text("1")
    (tmp_path / ".gitignore").write_text("ignored.py")
    git("init")
    git("add", ".")
    git("commit", "-m", "m")
    (tmp_path / "ignored.py").write_text("2")
    with monkeypatch.context() as there:
        there.setattr(jobs, "ROOT", tmp_path)
        assert not jobs.uncommitted("kept.py") and jobs.uncommitted("ignored.py")
        (tmp_path / "kept.py").write_text("3")
        assert jobs.uncommitted("kept.py")
    monkeypatch.setattr(tpu_pod, "uncommitted", lambda path: path == "configs/base_64.py")
    argv = (
        "--where=tpu",
        "--topology=v5e:2x4",
        "--zone=z",
        "--workdir=gs://b/r",
        f"--config={CONFIG}",
        "--config.data.path=gs://b/d",
    )
    assert command_line.main(argv) == 2
    assert "configs/base_64.py has uncommitted changes" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["tpu", "gke", "sky"])
def test_data_of_this_machine_is_not_promised_to_others(where, capsys):
    """Catches machines that start without the data or the initial weights."""
    argv = (
        "--dry-run",
        f"--where={where}",
        "--topology=v5e:2x4",
        *NEEDED.get(where, []),
        "--workdir=gs://b/r",
        f"--config={CONFIG}",
    )
    good = ["gs://B/d", "/mnt/gs/c/d", *["/app/data/emoji"] * (where == "gke")]
    bad = [
        "/data",
        "data",
        "/mnt/gs",
        "/mnt/gs/../data",
        "/application",
        "/app",
        "gs:///d",
        *["/app/data/emoji"] * (where != "gke"),
    ]
    for path in good + bad:
        assert command_line.main([*argv, f"--config.data.path={path}"]) == (
            0 if path in good else 2
        ), path
        _out, error = capsys.readouterr()
        assert path in good or (
            (f"--config.data.path={path} " in error or "has no bucket name" in error)
            and "give gs://BUCKET/PATH" in error
        )
    for flag in ("--init_from", "--fork"):
        for more in ([f"{flag}=/old"], [f"{flag}=gs://b/o", flag, "old"]):
            assert command_line.main([*argv, "--config.data.path=gs://b/d", "--", *more]) == 2
            shown = f"{flag}={more[-1].removeprefix(f'{flag}=')} exists only on this machine"
            assert shown in capsys.readouterr().err
    for more in (["--init_from=embedded:base_16"], ["--init_from", "gs://b/o"]):
        assert command_line.main([*argv, "--config.data.path=gs://b/d", "--", *more]) == 0


def test_buckets_that_a_training_reads(tmp_path, monkeypatch):
    """Catches data of a config file that are not opened where they are, or not mounted where the
    config names the mount point.
    """
    config = {"data": {"path": "gs://c/d", "mixture": []}}
    monkeypatch.setattr(jobs, "read_config", lambda *_: config)
    one_job = jobs.training("", "configs/base_64.py", ["--config.seed=1"], "gs://b/r", "tpu")
    assert one_job.command()[-1] == "--config.data.path=gs://c/d" and not one_job.buckets
    assert one_job.opens_buckets and "--workdir=gs://b/r" in one_job.command()
    config["data"]["path"] = "/mnt/gs/e/d"
    one_job = jobs.training("", "configs/base_64.py", [], "gs://b/r", "tpu")
    assert one_job.command()[-1] == "--config.data.path=/mnt/gs/e/d" and one_job.buckets == ("e",)

    config["data"] = {"path": "", "mixture": [["gs://c/d", 0.7], ["/mnt/gs/f/d", 0.3]]}
    one_job = jobs.training("", "configs/base_64.py", [], "gs://b/r", "tpu")
    given = "--config.data.mixture=(('gs://c/d', 0.7), ('/mnt/gs/f/d', 0.3))"
    assert one_job.command()[-1] == given and one_job.buckets == ("f",)


@pytest.mark.parametrize("where", ["tpu", "gke", "sky", "slurm"])
def test_a_mixture_is_launched(where, tmp_path, capsys):
    """Catches a mixture that is refused, a bucket of it that is mounted, and a set that exists
    only on this machine.
    """
    on_disk = where == "slurm"
    workdir = str(tmp_path / "r") if on_disk else "gs://b/r"
    argv = [
        f"--where={where}",
        f"--workdir={workdir}",
        "--topology=h100:8" if on_disk else "--topology=v5e:2x4",
        *NEEDED.get(where, []),
        f"--config={CONFIG}",
        "--dry-run",
    ]
    one, two = ("/d/one", "/d/two") if on_disk else ("gs://c/one", "gs://d/two")
    field = "--config.data.mixture"
    assert command_line.main([*argv, field, f"(('{one}', 0.7), ('{two}', 0.3))"]) == 0
    out = capsys.readouterr().out
    assert "data.mixture" in out and one in out and two in out
    (job,), _ = read(*argv, f'{field}=(("{one}", 0.7), ("{two}", 0.3))')
    assert job.buckets == ()
    if on_disk:
        assert command_line.main([*argv, f"{field}=(('gs://c/one', 1.0), ('/d/two', 1.0))"]) == 0
    else:
        assert command_line.main([*argv, f"{field}=(('{one}', 1.0), ('/d/two', 1.0))"]) == 2
        assert f"/d/two in {field} exists only on this machine" in capsys.readouterr().err


def test_stages_have_their_own_fields_and_topologies():
    """Catches a stage that lacks a shared field, gets another stage's, or loses its own."""
    stages = (f"--stage=base={CONFIG}", f"--stage=sr={CONFIG.replace('base_64', 'sr_256')}")
    fields = (
        "--sr.config.data.path=gs://b/sr",
        "--config.data.path=gs://b/d",
        "--config.train.steps=7",
        "--base.config.train.steps=9",
    )
    places_ = ("--topology=v5e:2x4", "--sr.topology=v5e:2x2", "--env=A=1", "--sr.env", "A=2")
    (base, sr), _options = read(
        "--where=tpu", "--zone=z", "--workdir=gs://b/r", *stages, *fields, *places_
    )
    assert (base.workdir, sr.workdir) == ("gs://b/r/base", "gs://b/r/sr") and base.name != sr.name
    assert (base.steps, sr.steps) == (9, 7)
    assert base.arguments[4:] == (
        "--config.data.path=gs://b/d",
        "--config.train.steps=7",
        "--config.train.steps=9",
    )
    assert sr.arguments[-1] == "--config.data.path=gs://b/sr"
    assert (str(base.topology), str(sr.topology)) == ("v5e:2x4", "v5e:2x2")
    assert (base.environment, sr.environment) == ({"A": "1"}, {"A": "2"})


def test_any_command_can_be_launched():
    """Catches options of the command taken for options of launch, or the reverse."""
    command = ("prepare_data", "--source=emoji", "--encoder=t5_tiny", "--output=a b", "--dry_run")
    (job,), options = read("--where=local", "--workdir=/r", "--dry-run", "--", *command)
    assert job.arguments == ("-m", f"imagen_jax.{command[0]}", *command[1:]) and options.dry_run
    (job,), _ = read(*LOCAL, "--workdir=/r", "--", "--init_from=embedded:base_16")
    assert (
        job.arguments[-1] == "--init_from=embedded:base_16"
        and job.arguments[1] == "imagen_jax.train"
    )


@pytest.mark.parametrize(
    "topology, slices, hosts, chips, cloud, sky",
    [
        ("v5e:2x2", 1, 1, 4, "v5litepod-4", "tpu-v5litepod-4:1"),
        ("v5e:2x4", 1, 1, 8, "v5litepod-8", "tpu-v5litepod-8:1"),
        ("v5e:16x16", 1, 64, 4, "v5litepod-256", "tpu-v5litepod-256:1"),
        ("v4-512", 1, 64, 4, "v4-512", "tpu-v4-512:1"),
        ("2xv5p:4x4x8", 2, 32, 4, "v5p-256", "tpu-v5p-256:1"),
        ("v6e-16", 1, 4, 4, "v6e-16", "tpu-v6e-16:1"),
        ("h100:4x8", 1, 4, 8, None, "H100:8"),
        ("a100-4", 1, 1, 4, None, "A100-80GB:4"),
    ],
)
def test_machines_of_a_topology(topology, slices, hosts, chips, cloud, sky):
    """Catches wrong counts, which make a job hang at its start.

    These are chips where v4 and v5p count cores, four-chip hosts for an eight-chip machine, and
    slices counted as hosts.
    """
    size = machines.of(parse(topology))
    assert (size.slices, size.hosts, size.chips) == (slices, hosts, chips)
    assert slices * hosts * chips == parse(topology).chips
    assert cloud is None or machines.accelerator_type(parse(topology)) == cloud
    assert machines.sky_accelerator(parse(topology)) == sky


def test_a_chip_that_topology_knows_has_names():
    """Catches a chip in hardware/chips.py for which launch has no names."""
    from imagen_jax.hardware.chips import CHIPS

    assert set(machines.NAMES) == {chip.name for chip in CHIPS}


LOGGED_OUT = """WARNING: something else
ERROR: (gcloud.storage.cat) You do not currently have an active account selected.
Please run:

  $ gcloud auth login

to obtain new credentials.

If you have already logged in with a different account, run:

  $ gcloud config set account ACCOUNT
"""
KLOG = (
    'E1125 14:02:31.000000   77 memcache.go:265] "Unhandled Error" err="couldn\'t get the list"\n'
)
SAID = [
    (
        LOGGED_OUT,
        (
            "ERROR: (gcloud.storage.cat) You do not currently have an active account selected."
            " Please run: $ gcloud auth login to obtain"
        ),
    ),
    (
        3 * KLOG + "The connection to the server localhost:8080 was refused\n",
        "The connection to the server localhost:8080 was refused",
    ),
    (KLOG, '"Unhandled Error" err="couldn\'t get the list"'),
    ("1\n2\n3\n4\n", "2 3 4"),
    ("", "no error message"),
]


@pytest.mark.parametrize("text, shown", SAID)
def test_a_tools_complaint_says_what_to_do(text, shown):
    """Catches the end of a message without its start, which has the command to run.

    Also catches a log of times and source lines instead of the message.
    """
    told = jobs.said(subprocess.CompletedProcess((), 1, stdout="", stderr=text))
    assert (
        told.startswith(shown)
        and len(told) <= jobs.LONGEST
        and (len(told) == len(shown) or text == LOGGED_OUT)
    )


def test_the_commands_are_those_there_are():
    """Catches a command that launch does not know, and a module that is not a command."""
    from tests.test_layering import COMMANDS

    assert set(jobs.COMMANDS) == COMMANDS - {"rate"}  # it runs on the machine of its user


@pytest.mark.parametrize(
    "limit, seconds",
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("1-2", 93_600),
        ("1-2:30", 95_400),
        ("1-02:30:05", 95_405),
        ("0", float("inf")),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit, seconds):
    """Catches minutes read as hours, which accepts a limit too short for training."""
    assert slurm.seconds(limit) == seconds


@pytest.mark.parametrize("chip, extra", [("v5e:2x2", "tpu"), ("h100:8", "cuda12")])
def test_machines_install_what_the_config_needs(chip, extra):
    """Catches a training with W&B whose machines have no package for it."""
    without = jobs.training("base", CONFIG, ["--config.data.path=/data"], "/runs/a", "tpu")
    fields = ["--config.data.path=/data", "--config.train.wandb=imagen"]
    with_it = jobs.training("base", CONFIG, fields, "/runs/a", "tpu")
    one, other = (dataclasses.replace(job, topology=parse(chip)) for job in (without, with_it))
    assert f"'.[{extra}]'" in one.install and f"'.[{extra},wandb]'" in other.install
