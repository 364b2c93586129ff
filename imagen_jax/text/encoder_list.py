"""Several text encoders in one text: t5=google/t5-v1_1-xxl+clip=openai/clip-vit-large-patch14.

Each is a name, `=` and what is given for one encoder, with its choice of features
(`text/choice.py`). The features of named encoders are stored, read and used by their names.
"""

import pathlib
import re

from imagen_jax.text_inputs import NAME, UNNAMED

PLUS = "+"
FORM = "t5=google/t5-v1_1-xxl+clip=DIR@layer=-2"


def parse_encoders(text: str) -> dict[str, str]:
    """{name: encoder} of "NAME=ENCODER+NAME=ENCODER"; {"": text} of a single encoder without name.

    A plus sign separates only before `NAME=`. A directory whose name has that form is a directory.

    Raises ValueError for a name that is not valid or is given twice, or a name without an encoder.
    """
    parts = re.split(rf"\{PLUS}(?={NAME}=)", text)
    named = re.match(r"[\w.-]+=", text)
    if pathlib.Path(text).is_dir() or (len(parts) == 1 and not named):
        return {UNNAMED: text}
    encoders: dict[str, str] = {}
    for part in parts:
        name, sign, encoder = part.partition("=")
        if not sign or not re.fullmatch(NAME, name):
            fault = f"{part!r} needs a name of lower-case letters and digits"
        elif not encoder:
            fault = f"there is no encoder after {name}="
        elif name in encoders:
            fault = f"the name {name} is given twice"
        else:
            encoders[name] = encoder
            continue
        raise ValueError(f"text encoders {text!r}: {fault}; write them as in {FORM}")
    return encoders
