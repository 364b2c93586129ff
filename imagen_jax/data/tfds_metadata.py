"""The files with which TFDS opens a store of prepared data."""

from collections.abc import Mapping
from pathlib import Path

from imagen_jax.data import records

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def write_tfds_metadata(root: Path, store: str, features, shards: Mapping[str, Mapping]) -> None:
    """Writes the metadata with which `tfds.builder_from_directory(root/store)` opens the shards."""
    import tensorflow_datasets as tfds

    directory = root / store
    infos = []
    for split in records.SPLITS:
        entries = [
            entry
            for name, entry in sorted(shards.items())
            if name.startswith(f"{store}/{store}-{split}.")
        ]
        if entries:
            template = tfds.core.ShardedFileTemplate(
                dataset_name=store,
                split=split,
                data_dir=directory,
                filetype_suffix="array_record",
                template=_TEMPLATE,
            )
            lengths = [entry["rows"] for entry in entries]
            size = sum(entry["bytes"] for entry in entries)
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=infos,
        check_data=False,
        filename_template=_TEMPLATE,
    )
