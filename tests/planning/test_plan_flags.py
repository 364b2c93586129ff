"""The command line of plan: config files that fail, and flags that contradict each other."""

import re
import subprocess
import sys
import types

import pytest
from ml_collections import config_flags

from imagen_jax import plan
from tests import tiny

WRONG = {  # the text of a config file: the error
    "def get_config(arg=''):\n    return 1 / 0\n": ":2: ZeroDivisionError: division by zero",
    "def get_config(arg=''):\n    return int('x')\n": ":2: invalid literal for int",
    "import no_such_module\n": ":1: ModuleNotFoundError: No module named 'no_such_module'",
    "def get_config(arg=''):\n    return {}['b']\n": ":2: KeyError: 'b'",
}


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize("text", WRONG)
def test_a_config_that_raises_is_named(text, tmp_path):
    """Catches "division by zero" without the file and the line."""
    (tmp_path / "wrong.py").write_text(text)
    read = plan.named(config_flags.config_flags.ConfigFileFlagParser("config").parse)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/wrong.py{WRONG[text]}")):
        read(f"{tmp_path}/wrong.py:arg")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config=nope.py"], "the file nope.py does not exist"),
        (
            ["--config=configs/base_64.py:tiny", "--text_encoder=xl"],
            "--config and --text_encoder are both given; use one of them",
        ),
    ],
)
def test_flags_that_contradict_are_refused(options, message):
    """Catches a missing file reported as "an earlier failure to load", and two things to plan
    accepted.
    """
    done = subprocess.run(
        [sys.executable, "-m", "imagen_jax.plan", "--topology=v5e-4", *options],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )


class Flags(types.SimpleNamespace):
    """The flags of plan; `there`: those of the command line."""

    __getitem__ = lambda self, flag: types.SimpleNamespace(present=flag in self.there)


@pytest.mark.parametrize("name", ["exact", "search", "sampler"])
def test_flags_of_a_training_are_refused_with_sample(name):
    """Catches --search that is accepted with --sample and not used."""
    given = {"sample": True, "text_encoder": "", "config": {}, "topology": "v5e-4", "price": 0.0}

    plan.check_flags(Flags(**given, there=()))
    plan.check_flags(Flags(**given | {"sample": False}, there=(name,)))
    with pytest.raises(ValueError, match=f"--{name} is for the plan of a training; leave it out"):
        plan.check_flags(Flags(**given, there=(name,)))


@pytest.mark.parametrize("name", ["tokens", "encode_batch", "captions"])
@pytest.mark.parametrize("sample", [True, False])
def test_flags_of_an_encoding_are_refused_with_a_config(name, sample):
    """Catches --captions that is accepted without --text_encoder and not used."""
    given = {"sample": sample, "text_encoder": "", "config": {}, "topology": "v5e-4", "price": 0.0}
    plan.check_flags(Flags(**given | {"sample": False}, there=()))
    encoding = {"sample": False, "text_encoder": "xl", "config": None, "tokens": ["8"]}
    plan.check_flags(Flags(**given | encoding, there=(name,)))
    with pytest.raises(ValueError, match=f"--{name} is for --text_encoder; leave it out"):
        plan.check_flags(Flags(**given, there=(name,)))
