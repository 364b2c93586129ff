"""Options of a command line that set fields of a config."""

import pytest
from absl import flags
from ml_collections import config_flags

from imagen_jax import cli, config_options
from launch import job
from tests import tiny

FILE = f"{tiny.ROOT}/configs/base_64.py:tiny"
FIRST = ["--config.data.buckets=((8, 16),)", "--config.seed=1"]
LAST = ["--config.data.buckets", "((8, 8), (16, 8))", "-config.seed=2"]


@pytest.mark.parametrize(
    ("argv", "kept"),
    [
        (["t", "--config.a=1", "--b=2", "--config.a=3", "--b=4"], [0, 2, 3, 4]),
        (["t", "--config.a", "1", "--config.a", "-1", "--config.a", "2", "--c"], [0, 5, 6, 7]),
        (["t", "--config.a", "--config.b=1", "--config.a=2", "x"], [0, 2, 3, 4]),
        (["t", "--cascade.base.w=1", "--config.base.w=2", "--config=f"], [0, 1, 2, 3]),
        (["t", "config.a=1", "--config.a=2", "--config=f", "--config=g"], [0, 1, 2, 3, 4]),
        ([], []),
    ],
)
def test_earlier_values_of_a_field_are_left_out(argv, kept):
    """Catches a value that stays without its option, and an option of no config that is lost."""
    expected = [argv[i] for i in kept]
    assert config_options.last_values(argv, cli.CONFIGS) == expected


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_the_last_value_of_a_tuple_wins(monkeypatch):
    """Catches buckets of an earlier option that are appended silently."""
    argv = ["train", f"--config={FILE}", *FIRST, *LAST]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    cli.parse(argv)
    for config in (values.config, job.read_config(FILE, [*FIRST, *LAST, "--config.data.path=d"])):
        assert [*map(tuple, config["data"]["buckets"])] == [(8, 8), (16, 8)] and config["seed"] == 2
