"""The fields of the config section `model`, for imagen_jax/schema.py."""

from imagen_jax.field import Field, Need

NAMED_TEXT = Need("text.encoders", unless=((),))
WITH_TEXT = (Need("text.dim", unless=(0,)), NAMED_TEXT)

MODEL = {
    "family": Field("Network architecture.", str, "F.1, B.1", choices=("unet", "efficient_unet")),
    "cond_dim": Field("Width of the projected text features; 0 for a model without text.", int),
    "pooling": Field(
        "Pooling of the text tokens into one vector.",
        str,
        "F.1",
        choices=("attention", "mean"),
        needs=(WITH_TEXT,),
        idle=("attention",),
    ),
    "pool_heads": Field(
        "Number of heads of attention pooling.",
        int,
        needs=(WITH_TEXT, Need("model.pooling", ("attention",))),
    ),
    "scale_shift": Field("Whether the embedding scales and shifts features.", bool, "F.1"),
    "dropout": Field("Dropout rate in residual blocks.", float, "F.1", interval="[0, 1)"),
    "dtype": Field("Floating-point type of activations.", str, choices=("bfloat16", "float32")),
    "remat": Field(
        "Rematerialization: none, all but matrix products (matrix), or whole blocks (block).",
        str,
        choices=("none", "matrix", "block"),
        resume=True,
    ),
}

FAMILY_FIELDS = {
    "unet": {
        "channels": Field("Width of the first level.", int, "F.1"),
        "multipliers": Field("Level widths as multiples of `channels`.", tuple[int, ...], "F.1"),
        "blocks": Field("Residual blocks per level.", int, "F.1"),
        "attention": Field("Whether each level has self-attention.", tuple[bool, ...], "F.1"),
        "text_attention": Field(
            "Whether each level has cross-attention to the text.", tuple[bool, ...], "F.1"
        ),
        "head_channels": Field("Channels per attention head.", int, "F.1"),
        "res_block": Field(
            "Resampling: inside a residual block (biggan) or by a convolution (plain).",
            str,
            "F.1",
            choices=("biggan", "plain"),
        ),
        "patch": Field("Side of the input patches folded into channels; 1: none.", int),
    },
    "efficient_unet": {
        "widths": Field("Width of each level.", tuple[int, ...], "F.2, F.3"),
        "blocks": Field("Residual blocks of each level.", tuple[int, ...], "F.2, F.3"),
        "attention": Field(
            "Attention per level: none, to pixels (self), to text (cross), or to both (fused).",
            tuple[str, ...],
            "F.2, F.3",
            choices=("none", "self", "cross", "fused"),
        ),
        "heads": Field("Number of attention heads.", int, "F.2, F.3"),
        "residual_scale": Field("Factor of the sum of shortcut and residual branch.", float, "B.1"),
    },
}
