"""The rules for text from users: captions and prompts are cleaned in the same way.

`prepare_data` and `sample` both call `clean`, so a caption and a prompt that look the same reach
the text encoder as the same string. The rules:

- Every run of white space, no-break spaces and line separators included, becomes one space.
- Invisible characters are removed: byte-order marks, zero-width spaces, soft hyphens, directional
  marks, tag characters outside a flag. So are control characters.
- Zero-width joiners stay where they shape text: in emoji and in scripts that use them. After a
  Latin letter, a digit or a space they are removed.

Variation selectors, combining marks and characters that Python does not know yet stay.
"""

import codecs
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MARK = "\ufeff"  # the byte-order mark, as decoded

# A flag of a region, such as that of Wales: a black flag spelled out in tag characters.
_FLAG = "(\U0001f3f4[\U000e0030-\U000e007a]+\U000e007f)"
_INVISIBLE = re.compile(
    _FLAG + "|[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"  # control characters that are not white space
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
_LOOSE_JOINER = re.compile("(?<![\u0300-\U0010ffff])[\u200c\u200d]+")
_LISTED = 5  # distinct removed characters that a note names


def clean(text: str) -> tuple[str, str]:
    """Applies the rules above. Returns the text and a note on removed characters.

    The note is "" if none was removed; white space is never noted. `clean` is idempotent.
    """
    visible = _one_space(_INVISIBLE.sub(lambda match: match[1] or "", text))
    cleaned = _one_space(_LOOSE_JOINER.sub("", visible))
    if cleaned == _one_space(text):
        return cleaned, ""
    lost = Counter(text) - Counter(cleaned)
    removed = {c: count for c, count in lost.items() if not c.isspace()}
    return cleaned, _note(removed)


def _one_space(text: str) -> str:
    return " ".join(text.split())


def _note(removed: dict[str, int]) -> str:
    names = [f"U+{ord(c):04X}" for c in sorted(removed)]
    more = ", ..." if len(names) > _LISTED else ""
    return f"{sum(removed.values())} x {', '.join(names[:_LISTED])}{more}"


def is_text(text: str) -> bool:
    """Whether UTF-8 can encode the text; a lone surrogate, as from "\\ud83d" in JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | os.PathLike) -> str:
    """Reads a UTF-8 file without its byte-order mark, if it has one.

    Raises:
      ValueError: the file is not UTF-8; the message names the file and the line.
      OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16 text: save it as UTF-8")
    try:
        return data.decode().removeprefix(MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(
            f"{path}:{line} is not UTF-8 text (byte 0x{byte:02x}): save the file as UTF-8"
        ) from error


def lines(text: str) -> Iterator[str]:
    """Yields the lines of a file, without their ends.

    A line ends at a line feed, a carriage return or both. `str.splitlines` also ends one at form
    feeds and at U+2028, which occur inside captions.
    """
    for line in io.StringIO(text, newline=None):
        yield line.removesuffix("\n")
