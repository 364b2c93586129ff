"""Makes tests/goldens/feature_networks.npz: features of the small networks of
tests/evals/networks/tiny.py, computed by torch, and preprocessed pictures.

    make parity && .venv/bin/python -m tools.make_feature_goldens
"""

import numpy as np

from tests.evals.networks import tiny


def features() -> dict[str, np.ndarray]:
    from tests.evals.networks import torch_references as references

    inception = references.inception(tiny.THIN)
    prepared = {name: tiny.images(size) for name, (_, size, _) in tiny.NETWORKS.items()}
    clip = references.clip(tiny.CLIP_IMAGE, tiny.CLIP_TEXT)
    ids, _ = tiny.tokens()
    per_token, pooled = references.clip_text_features(clip, ids)
    network, size, name_map = tiny.NETWORKS["efficientnet_lite"]
    lite = tiny.random_weights(name_map(tiny.image_shapes(network, size)))
    return {
        "inception": references.inception_features(inception, prepared["inception"]),
        "clip_image": references.clip_image_features(clip, prepared["clip_image"]),
        "clip_text": per_token,
        "clip_text_pooled": pooled,
        "dinov2": references.dinov2_features(references.dinov2(tiny.DINOV2), prepared["dinov2"]),
        "efficientnet_lite": references.efficientnet_lite_features(
            lite, prepared["efficientnet_lite"], tiny.STAGES
        ),
    }


def resized() -> dict[str, np.ndarray]:
    """TF1's resize, by torch-fidelity, of pictures that shrink and grow; torch's bicubic matrix."""
    import torch

    from tests.evals.networks import torch_references as references

    resize = references.fidelity("interpolate_compat_tensorflow")
    out = {}
    for size in tiny.SIZES:
        x = references.channels_first(tiny.picture(20, 31)[None].astype(np.float32))
        y = resize.interpolate_bilinear_2d_like_tensorflow1x(x, (size, size), align_corners=False)
        out[f"bilinear_tf1_{size}"] = y[0].permute(1, 2, 0).numpy()
    eye = torch.eye(37)[None, :, :, None]
    y = torch.nn.functional.interpolate(eye, scale_factor=(16.1 / 37, 1.0), mode="bicubic")
    return out | {"bicubic_37_16": y[0, :, :, 0].T.numpy()}


if __name__ == "__main__":
    np.savez_compressed(tiny.GOLDENS, **features(), **resized())
    print(f"{tiny.GOLDENS}: {tiny.GOLDENS.stat().st_size} bytes")
