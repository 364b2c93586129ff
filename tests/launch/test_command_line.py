"""The command line of launch: its flags, its errors and --help."""

import re

import pytest

from launch import __main__ as command_line
from launch import platforms, status, sweep
from tests.launch.test_job import CONFIG, LOCAL, NEEDED, read

FAST = "--config.train.fast_every=5"  # train.fast_dir has no effect without it


@pytest.mark.parametrize(
    "argv, message",
    [
        ((*LOCAL, "--workdir="), "--workdir is empty"),
        (
            ("--where=gke", "--image=i", "--topology=v5e:2x4", "--workdir=gs://", *LOCAL[2:]),
            "--workdir gs:// has no bucket name",
        ),
        (
            ("--where=gke", "--image=i", "--topology=v5e:2x4", "--workdir=gs:///x", *LOCAL[2:]),
            "--workdir gs:///x has no bucket name",
        ),
        ((*LOCAL, "--workdir=r", "--config.optim.lrr=1"), "lrr"),
        ((*LOCAL, "--workdir=r", "--config.optim.lr=fast"), "fast"),
        ((*LOCAL, "--workdir=r", "--proceses=2"), "'--proceses=2' is not an option"),
        ((*LOCAL, "--workdir=r", "--base.config.optim.lr=1"), "is not an option"),
        ((*LOCAL, "--workdir=r", "stray"), "'stray' is not an option"),
        ((*LOCAL, "--workdir=r", "--processes=2"), "--processes needs --devices"),
        ((*LOCAL, "--workdir=r", "--processes=0"), "give at least one process"),
        ((*LOCAL, "--workdir=r", "--retries=-1"), "--retries=-1 is negative"),
        (
            (*LOCAL, "--workdir=gs://b/r", "--config.train.fast_dir=gs://b/d", FAST),
            "--config.train.fast_dir=gs://b/d is in a bucket: mount it",
        ),
        ((*LOCAL, "--workdir=r", "--topology=v5e:2x4"), "is not for --where local"),
        ((*LOCAL, "--workdir=r", "--stage=a=b"), "give one of"),
        (("--where=local", "--workdir=r"), "give one of"),
        (("--where=local", "--workdir=r", "--config=missing.py"), "missing.py does not exist"),
        (
            ("--where=local", "--workdir=r", f"--config={CONFIG}"),
            "data.path and data.mixture are both empty",
        ),
        (
            (
                "--where=local",
                "--workdir=r",
                f"--config={CONFIG.replace('base_64.py:tiny', 'cascade.py')}",
            ),
            "not the config of a stage",
        ),
        (("--where=local", "--workdir=r", f"--stage=A={CONFIG}"), "not NAME=CONFIG"),
        ((*LOCAL, "--workdir=r", "--env=HF_TOKEN=hf_x"), "give --secret HF_TOKEN"),
        ((*LOCAL, "--workdir=r", "--env=A"), "not NAME=VALUE"),
        ((*LOCAL, "--workdir=r", "--secret=UNSET_HERE"), "set in your environment"),
        (("--where=tpu", "--workdir=gs://b/r", *LOCAL[2:]), "needs --topology"),
        (("--where=tpu", "--topology=v5e:2x4", "--workdir=gs://b/r", *LOCAL[2:]), "needs --zone"),
        (
            ("--where=tpu", "--topology=v5e:2x4", "--zone=z", "--workdir=r", *LOCAL[2:]),
            "would be lost with its machine",
        ),
        (
            ("--where=tpu", "--topology=h100:8", "--zone=z", "--workdir=gs://b/r", *LOCAL[2:]),
            "has no TPUs",
        ),
        (
            ("--where=tpu", "--topology=v5e:4x5x6", "--zone=z", "--workdir=gs://b/r", *LOCAL[2:]),
            "torus",
        ),
        (("--where=gke", "--topology=v5e:2x4", "--workdir=gs://b/r", *LOCAL[2:]), "needs --image"),
        (
            (
                "--where=gke",
                "--topology=v5e:2x4",
                "--image=i",
                "--workdir=gs://b/r",
                *LOCAL[2:-1],
                "--config.data.path=data/emoji",
            ),
            "give gs://BUCKET/PATH",
        ),
        ((*LOCAL, "--workdir=/dev/null"), "--workdir /dev/null is a file; give a directory"),
        (
            (*LOCAL, "--workdir=/dev/null", "--dry-run"),
            "--workdir /dev/null is a file; give a directory",
        ),
        (
            (*LOCAL, "--workdir=/proc/foo"),
            "--workdir: cannot create /proc/foo/launch (No such file or directory)",
        ),
        (
            (*LOCAL, "--workdir=/proc/foo", "--dry-run"),
            "--workdir: cannot create /proc/foo/launch (No such file or directory)",
        ),
        ((*LOCAL, "--workdir=r", "--zone=z"), "--zone is for --where tpu, not for local"),
        (
            ("--where=slurm", "--topology=h100:8", "--devices=2", "--workdir=r", *LOCAL[2:]),
            "--devices is for --where local, not for slurm",
        ),
        (
            ("--where=gke", "--topology=v5e:2x4", "--image=a b", "--workdir=gs://b/r", *LOCAL[2:]),
            "'a b' contains white space",
        ),
        (
            ("--where=sky", "--topology=2xv5e:2x2", "--workdir=gs://b/r", *LOCAL[2:]),
            "starts one slice",
        ),
        (
            (
                *("--where=slurm", "--topology=h100:8", "--workdir=gs://b/r", *LOCAL[2:]),
                "--config.train.fast_dir=gs://b/d",
                FAST,
            ),
            "directories that all nodes share",
        ),
        (
            ("--where=slurm", "--topology=v5e:2x4", "--workdir=r", *LOCAL[2:]),
            "SLURM clusters have GPUs",
        ),
        (
            ("--where=slurm", "--topology=h100:8", "--sbatch=Rm -rf", "--workdir=r", *LOCAL[2:]),
            "not OPTION=VALUE",
        ),
        (
            ("--where=slurm", "--topology=h100:8", "--sbatch=qos", "--workdir=r", *LOCAL[2:]),
            "--sbatch=qos is not OPTION=VALUE",
        ),
        (
            (
                "--where=slurm",
                "--topology=h100:8",
                "--sbatch=exclusive",
                "--sbatch=nodes=3",
                "--workdir=r",
                *LOCAL[2:],
            ),
            "launch sets nodes itself",
        ),
        (
            ("--where=slurm", "--topology=h100:8", "--sbatch=nodes=3", "--workdir=r", *LOCAL[2:]),
            "launch sets nodes itself",
        ),
        (
            ("--where=slurm", "--topology=h100:8", "--sbatch=time=10", "--workdir=r", *LOCAL[2:]),
            "give --time",
        ),
        (
            ("--where=slurm", "--topology=h100:8", "--time=tomorrow", "--workdir=r", *LOCAL[2:]),
            "not a time limit of sbatch",
        ),
        (
            ("--where=slurm", "--topology=h100:8", "--time=0:05:00", "--workdir=r", *LOCAL[2:]),
            "leaves no time",
        ),
        (
            ("--where=slurm", "--topology=h100:3x8", "--workdir=r", *LOCAL[2:]),
            "a batch of 8 does not divide over data x fsdp = 24",
        ),
        (
            (*LOCAL, "--workdir=r", "--processes=2", "--devices=4", "--config.mesh.fsdp=3"),
            "does not fit 8 devices",
        ),
        ((*LOCAL, "--workdir=r", "--devices=2", "--config.mesh.model=4"), "does not fit 2 devices"),
        (
            (
                "--where=gke",
                "--image=i",
                "--topology=2xv5e:2x2",
                "--config.mesh.data=1",
                "--config.mesh.fsdp=8",
                "--workdir=gs://b/r",
                *LOCAL[2:],
            ),
            "cuts through 2 slices",
        ),
        (
            (*LOCAL, "--workdir=r", "--", "--init_form=x"),
            "options of train: Unknown command line flag 'init_form'",
        ),
        (
            (*LOCAL, "--workdir=r", "--", "--workdir=x"),
            "'--workdir=x' after -- would replace what launch has checked",
        ),
        ((*LOCAL, "--workdir=r", "--", "-workdir", "x"), "'-workdir' after -- would replace"),
        ((*LOCAL, "--workdir=r", "--", "--config", CONFIG), "'--config' after -- would replace"),
        (
            (*LOCAL, "--workdir=r", "--", f"--config={CONFIG}", "--config.train.steps=3"),
            "after -- would replace",
        ),
        (
            (*LOCAL, "--workdir=r", "--", "--overfit=3", "--flagfile=f"),
            "'--flagfile=f' after -- would replace",
        ),
        (
            ("--where=local", "--workdir=r", "--", "prepare", "--output=x"),
            "unknown command 'prepare': after -- give one of demo, evaluate",
        ),
        (
            ("--where=local", "--workdir=r", "--", "prepare_data", "--output=x"),
            "options of prepare_data: --source must be given",
        ),
        (
            ("--where=local", "--workdir=r", "--", "sample", "--count=many"),
            "options of sample: flag --count=many",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(argv, message, capsys):
    """Catches an error found only after hours in a queue, and a secret in a manifest."""
    assert command_line.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "hf_x" not in error


@pytest.mark.parametrize("where", platforms.PLATFORMS)
def test_dry_run_starts_nothing_and_shows_no_secret(where, monkeypatch, capsys, tmp_path):
    """Catches --dry-run that submits, shows a secret's value or needs the cluster's tool."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    workdir = str(tmp_path / "r") if where in ("local", "slurm") else "gs://b/r"
    topology = {"local": [], "slurm": ["--topology=h100:2x4"]}.get(where, ["--topology=v5e:2x4"])
    data = "/d" if where in ("local", "slurm") else "gs://b/d"
    argv = [
        f"--where={where}",
        f"--workdir={workdir}",
        *topology,
        *NEEDED.get(where, []),
        f"--config={CONFIG}",
        f"--config.data.path={data}",
    ]
    assert command_line.main([*argv, "--secret=HF_TOKEN", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "imagen_jax.train" in out and "hf_secret" not in out and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "where, tool", [("tpu", "gcloud"), ("gke", "kubectl"), ("slurm", "squeue"), ("sky", "sky")]
)
def test_a_missing_tool_is_one_line(where, tool, capsys, tmp_path):
    """Catches a traceback, and a missing tool taken for a cluster without jobs."""
    workdir = str(tmp_path / "r") if where == "slurm" else "gs://b/r"
    topology = "--topology=h100:2x4" if where == "slurm" else "--topology=v5e:2x4"
    data = "/d" if where == "slurm" else "gs://b/d"
    argv = [
        f"--where={where}",
        f"--workdir={workdir}",
        topology,
        *NEEDED.get(where, []),
        f"--config={CONFIG}",
        f"--config.data.path={data}",
    ]
    assert command_line.main(argv) == 2
    error = capsys.readouterr().err
    assert f"error: {tool} is not on PATH: " in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("main", [command_line.main, status.main, sweep.main])
def test_help(main, flag, capsys):
    """Catches --help that asks for required flags, or does not say where launch can run."""
    with pytest.raises(SystemExit) as ended:
        main([flag])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "python -m launch" in text
    assert "not part of the installed package" in text


def test_help_has_every_option(capsys):
    """Catches help that shows the flags of the main module only."""
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    text = capsys.readouterr().out
    for option in (
        "workdir config stage where topology setup env secret retries spot dry_run processes"
        " devices zone project runtime keep image code namespace service_account partition account"
        " time sbatch infra".split()
    ):
        assert re.search(rf"--(\[no\])?{option}:", text), option


@pytest.mark.parametrize("flags", [["--retries", "5", "--dry-run"], ["--dry_run", "--retries=5"]])
def test_flags_are_read_in_every_form_and_place(flags):
    """Catches values that need "=", and flags that are lost after a config field."""
    jobs_, options = read("--workdir=/r", *LOCAL, *flags, "--config.train.steps", "7")
    assert options.dry_run and jobs_[0].retries == 5
    assert jobs_[0].arguments[-1] == "--config.train.steps=7" and jobs_[0].steps == 7


@pytest.mark.parametrize(
    "main, argv",
    [
        (command_line.main, ["--where=moon"]),
        (command_line.main, ["--where"]),
        (command_line.main, ["--where=local"]),
        (sweep.main, ["--rows=x"]),
        (sweep.main, ["--workdir=w"]),
        (status.main, []),
        (status.main, ["--watch", "w"]),
    ],
)
def test_a_mistake_is_not_hidden_below_the_usage(main, argv, capsys):
    """Catches an error message after the list of all options."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
