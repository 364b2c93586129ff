"""The fields of the config sections `mesh`, for imagen_jax/schema.py."""

from imagen_jax.field import Field

MESH = {
    "data": Field("Devices along `data`; -1: all remaining ones.", int, resume=True),
    "fsdp": Field("Devices along `fsdp`, which splits batch and training state.", int, resume=True),
    "model": Field("Devices along `model`, which splits features by `rules`.", int, resume=True),
    "spatial": Field("Devices along `spatial`, which splits image height.", int, resume=True),
    "fsdp_min_elements": Field("Smallest array split over `fsdp`, in elements.", int, resume=True),
    "rules": Field(
        "Rules (regular expression for a parameter path, placement); the first match applies.",
        tuple,
        resume=True,
    ),
}

# Of a cascade; the rules are those of each stage's training.
CASCADE_MESH = {
    "data": Field("Devices along `data`; -1: all remaining ones.", int, older=-1),
    "fsdp": Field("Devices along `fsdp`, which splits batch and parameters.", int, older=1),
    "model": Field("Devices along `model`, which splits features by the rules.", int, older=1),
    "spatial": Field("Devices along `spatial`, which splits image height.", int, older=1),
}
