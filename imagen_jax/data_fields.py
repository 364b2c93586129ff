"""The fields of the config sections `text` and `data`, for imagen_jax/schema.py."""

from collections.abc import Sequence

from imagen_jax.field import Field, Need
from imagen_jax.network_fields import NAMED_TEXT, WITH_TEXT

# Limits that no use comes near; a larger number is a mistake, and too large for an array.
LARGEST = "2^16"  # side of an image in pixels
LONGEST = "2^16"  # tokens of a text
WIDEST = "2^20"  # features
Mixture = Sequence[tuple[str, float]]


def only_paths_differ(before: Mixture, after: Mixture) -> bool:
    """Whether two mixtures have the same weights; the hash of the data says if the sets moved."""
    return [weight for _, weight in before] == [weight for _, weight in after]


TEXT = {
    "dim": Field(
        "Width of the features of a single, unnamed text encoder; 0: none.",
        int,
        "section 2.1",
        interval=f"[0, {WIDEST}]",
    ),
    "encoders": Field(
        "Names of several text encoders in the prepared data, instead of text.dim.",
        tuple[str, ...],
        "eDiff-I: Balaji et al. 2022",
        older=(),
    ),
    "dims": Field(
        "Width of the token features of each encoder.",
        tuple[int, ...],
        older=(),
        interval=f"[1, {WIDEST}]",
        needs=(NAMED_TEXT,),
    ),
    "lengths": Field(
        "Tokens per caption of each encoder, including padding.",
        tuple[int, ...],
        older=(),
        interval=f"[1, {LONGEST}]",
        needs=(NAMED_TEXT,),
    ),
    "pooled_dims": Field(
        "Width of the pooled vector of each encoder; 0: not used.",
        tuple[int, ...],
        older=(),
        interval=f"[0, {WIDEST}]",
        needs=(NAMED_TEXT,),
    ),
    "drops": Field(
        "Probability of dropping each encoder alone, besides diffusion.text_drop.",
        tuple[float, ...],
        "eDiff-I: Balaji et al. 2022",
        older=(),
        interval="[0, 1]",
        needs=(NAMED_TEXT,),
    ),
    "online": Field(
        "Whether training encodes the captions itself, instead of reading stored features.",
        bool,
        older=False,
        needs=(WITH_TEXT,),
    ),
    "online_encoder": Field(
        "online only: the text encoder, as --encoder of prepare_data.",
        str,
        older="",
        resume=True,
        needs=(Need("text.online", (True,)),),
    ),
}

DATA = {
    "path": Field("Directory made by prepare_data.", str, resume=True),
    "image_size": Field(
        "Side of the images in pixels.", int, "section 2.5", interval=f"[1, {LARGEST}]"
    ),
    "lowres_size": Field(
        "Low-res input size in pixels; 0 for a base model.",
        int,
        "section 2.5",
        interval=f"[0, {LARGEST}]",
    ),
    "crop_size": Field(
        "Training crop size in pixels; 0 for whole images.",
        int,
        "section 2.5",
        interval=f"[0, {LARGEST}]",
    ),
    "text_length": Field(
        "Tokens per caption, including padding, of the encoder of text.dim.",
        int,
        interval=f"[1, {LONGEST}]",
    ),
    "batch_size": Field(
        "Images per training step, over all devices.", int, "section 4.1", interval="[1, inf)"
    ),
    "caption": Field(
        "Caption used: a random one or the first.",
        str,
        choices=("random", "first"),
        needs=(WITH_TEXT,),
        idle=("random",),
    ),
    "flip": Field("Whether images are mirrored at random.", bool),
    "workers": Field(
        "Worker processes reading data; 0: trainer threads.", int, resume=True, interval="[0, inf)"
    ),
    "cache_mib": Field(
        "Decoded-image cache in MiB; no effect on batches.", int, resume=True, interval="[0, inf)"
    ),
    "shard_cache_dir": Field(
        "Local directory for copies of shards of data in a bucket; empty: a directory of this user"
        " in that for temporary files.",
        str,
        older="",
        resume=True,
    ),
    "shard_cache_gib": Field(
        "Bound of data.shard_cache_dir in GiB, for all processes of a host together; no effect on"
        " batches.",
        float,
        older=64.0,
        resume=True,
        interval="(0, inf)",
    ),
    "decode": Field(
        "JPEG decoding: at full size (exact), or scaled to 1/2, 1/4 or 1/8 by libjpeg (draft).",
        str,
        choices=("exact", "draft"),
        older="exact",
    ),
    "mixture": Field(
        "Prepared directories to mix, with weights, instead of data.path: ((path, weight), ...).",
        tuple[tuple[str, float], ...],
        older=(),
        resume=only_paths_differ,
    ),
    "view": Field(
        "Part of the image that is read in training: the largest window in the centre (centre) or"
        " at a random position (short_side), or a random window of data.view_scale (random_crop).",
        str,
        choices=("centre", "short_side", "random_crop"),
        older="centre",
    ),
    "view_scale": Field(
        "random_crop only: range of the window's side, as a fraction of the largest window's.",
        tuple[float, float],
        older=(0.8, 1.0),
        interval="(0, 1]",
        needs=(Need("data.view", ("random_crop",)),),
    ),
    "buckets": Field(
        "Sizes (height, width) in pixels of the training images; (): squares of data.image_size.",
        tuple[tuple[int, int], ...],
        "SDXL: Podell et al. 2023",
        older=(),
        interval=f"[1, {LARGEST}]",
    ),
}
