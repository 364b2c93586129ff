"""A cascade 8 -> 16 with random weights and the embedded text encoder, for tests that start
commands: its programs compile in a fraction of the time of the embedded cascade's.
"""

from pathlib import Path

from imagen_jax import cascade
from imagen_jax.weights import checkpoint, exports
from tests import tiny

STAGES = {"base": ("base_64", tiny.ONE_LEVEL_UNET), "sr_1": ("sr_256", tiny.ONE_LEVEL_FIELDS)}


def write(root: Path) -> dict[str, Path]:
    """Exports the stages into `root`; returns {stage: file}."""
    _, embedded = checkpoint.load_params(cascade.resolve("embedded:base_16"))
    encoder, files = embedded["encoder"], {}
    for name, (config_name, changes) in STAGES.items():
        config = tiny.config(config_name, **changes)
        config["text"]["dim"] = encoder["dim"]
        config["data"]["text_length"] = encoder["max_length"]
        stage, _, _ = tiny.stage_and_step(config)
        meta = {"config": config, "encoder": encoder, "manifest_hash": "m", "step": 1}
        files[name] = root / f"{name}.safetensors"
        exports.export_params(tiny.random_params(stage.init), meta, files[name])
    return files


def options(files: dict[str, Path], config: str = "config", steps: int = 2) -> list[str]:
    """The command line that runs these stages; config: "config" or "cascade"."""
    given = [f"--{config}={tiny.ROOT}/configs/cascade.py:demo", f"--stages={','.join(files)}"]
    for name, file in files.items():
        given += [f"--{config}.{name}.checkpoint={file}"]
        given += [f"--{config}.{name}.sampling.steps={steps}"]
    return given
