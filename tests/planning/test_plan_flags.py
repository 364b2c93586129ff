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
        (["--text_encoder=xl", "--price=2"], "--price with --text_encoder needs --captions"),
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


GIVEN = {
    "sample": False,
    "text_encoder": "",
    "config": {},
    "topology": "v5e-4",
    "price": 0.0,
    "captions": [],
    "tokens": ["8"],
}
ENCODING = GIVEN | {"text_encoder": "xl", "config": None}


@pytest.mark.parametrize("name", ["exact", "search", "sampler", "captions", "caption_tokens"])
def test_flags_of_a_training_are_refused_with_sample(name):
    """Catches --search that is accepted with --sample and not used."""
    plan.check_flags(Flags(**GIVEN | {"sample": True}, there=()))
    plan.check_flags(Flags(**GIVEN | {"captions": ["9"]}, there=(name,)))
    with pytest.raises(ValueError, match=f"--{name} is for the plan of a training; leave it out"):
        plan.check_flags(Flags(**GIVEN | {"sample": True}, there=(name,)))


@pytest.mark.parametrize("name", ["tokens", "encode_batch"])
@pytest.mark.parametrize("sample", [True, False])
def test_flags_of_an_encoding_are_refused_with_a_config(name, sample):
    """Catches --tokens that is accepted with --config and not used."""
    plan.check_flags(Flags(**GIVEN, there=()))
    plan.check_flags(Flags(**ENCODING, there=(name,)))
    with pytest.raises(ValueError, match=f"--{name} is for --text_encoder without --config"):
        plan.check_flags(Flags(**GIVEN | {"sample": sample}, there=(name,)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (GIVEN | {"text_encoder": "xl"}, "add --captions to compare"),
        (GIVEN | {"captions": ["1e8"]}, "--captions is '1e8'; it must be numbers"),
        (ENCODING | {"captions": ["1", "2"]}, "--text_encoder alone is one number"),
    ],
)
def test_numbers_of_captions(flags, message):
    """Catches an encoder beside a config that is not used, and a number that is no number."""
    plan.check_flags(Flags(**GIVEN | {"text_encoder": "xl", "captions": ["5", "6"]}, there=()))
    plan.check_flags(Flags(**ENCODING | {"captions": ["5"]}, there=()))
    with pytest.raises(ValueError, match=message):
        plan.check_flags(Flags(**flags, there=()))


def test_a_length_of_captions_without_captions():
    """Catches --caption_tokens that is accepted and not used."""
    with pytest.raises(ValueError, match="--caption_tokens is for --config with --captions"):
        plan.check_flags(Flags(**GIVEN, there=("caption_tokens",)))
