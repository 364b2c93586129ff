"""Sources are found by name; an unknown name is one clear line."""

import pytest

from imagen_jax.data.sources import source
from imagen_jax.data.sources.folder import FolderSource
from tests.data.sources.layouts import opened


def test_heldout_fraction_is_by_id():
    """Catches a split that depends on order or run, or with a wrong fraction."""
    ids = [f"{i}.png" for i in range(4000)]
    small, large = (
        {i for i in ids if source.hashed_split(i, fraction) == "heldout"}
        for fraction in (0.1, 0.25)
    )
    assert (
        abs(len(small) / 4000 - 0.1) < 0.02
        and abs(len(large) / 4000 - 0.25) < 0.03
        and small < large
    )
    assert not any(source.hashed_split(i, 0.0) == "heldout" for i in ids)


def test_open_source_by_name(tmp_path):
    """Catches a name of another kind, and --heldout over the emoji's own split."""
    (tmp_path / "a.png").write_bytes(b"")
    assert isinstance(opened(f"folder:{tmp_path}", "--heldout=0.1"), FolderSource)
    assert opened("emoji").describe()["name"] == "emoji"
    for spec, message in [
        ("emoji:x", "is not emoji, folder:DIR"),
        ("folder:", "is not emoji"),
        ("source", "is not emoji"),
        ("emoji", "leave --heldout at 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            opened(spec, "--heldout=0.1")


def test_a_kind_of_source_has_its_own_flags(monkeypatch):
    """Catches flags of a kind that are not defined, or that do not reach its module."""

    def note(*args):
        raise LookupError(*args)

    monkeypatch.setattr(source.kinds()["tfds"], "TfdsSource", note)
    with pytest.raises(LookupError) as noted:
        opened("tfds:coco", "--tfds_split=val", "--tfds_caption", "a/b", "--heldout=0.1")
    assert noted.value.args == ("coco", None, "val", "image", "a/b", 0.1)


def test_a_condition_needs_metadata(tmp_path):
    """Catches a condition that a source ignores, so that nothing is left out."""
    for spec in ("emoji", f"folder:{tmp_path}"):
        with pytest.raises(ValueError, match="--where needs metadata, which a .* leave it out"):
            opened(spec, "--where=width > 3")


def test_every_module_of_the_folder_is_a_kind():
    """Catches a kind of source that must be entered somewhere besides its own file."""
    assert {"emoji", "folder", "tfds"} <= source.kinds().keys() and "source" not in source.kinds()
