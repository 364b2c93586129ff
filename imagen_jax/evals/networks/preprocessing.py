"""The preprocessing of an image for its feature network, on the host, one image at a time.

Metrics depend on the filter, on its antialiasing and on the rounding between two steps, so each
network has the preprocessing of the code that published numbers come from. Each function takes a
uint8 image and gives float32 [size, size, 3].
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Picture = UInt8[np.ndarray, "h w 3"]
Prepared = Float32[np.ndarray, "s s 3"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def inception_graph(image: Picture, size: int = 299) -> Prepared:
    """The preprocessing inside TensorFlow's graph: TF1 bilinear, then (x - 128) / 128."""
    return (bilinear_tf1(image, size) - 128) / 128


def inception_clean(image: Picture, size: int = 299) -> Prepared:
    """clean-fid: PIL's bicubic filter on each channel in float, clipped and not rounded.

    Parmar et al. 2022, section 3. PIL antialiases when it shrinks an image.
    """
    planes = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
        for plane in np.moveaxis(image.astype(np.float32), -1, 0)
    ]
    return (np.clip(np.stack(planes, axis=-1), 0, 255) - 128) / 128


def clip(image: Picture, size: int) -> Prepared:
    """OpenAI's: short side to `size` (PIL bicubic), centre crop, CLIP's mean and deviation."""
    return _normalise(centre_crop(image, size), CLIP_MEAN, CLIP_STD)


def dinov2(image: Picture, size: int = 224) -> Prepared:
    """dgm-eval's: squeezed to a square (PIL bicubic), ImageNet's mean and deviation."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return _normalise(np.asarray(resized), IMAGENET_MEAN, IMAGENET_STD)


def efficientnet_lite(image: Picture, size: int = 224) -> Prepared:
    """Short side to `size` (PIL bicubic), centre crop, (x - 127) / 128."""
    return (centre_crop(image, size).astype(np.float32) - 127) / 128


def bilinear_tf1(image: Picture, size: int) -> Prepared:
    """`tf.image.resize_bilinear` of TensorFlow 1: pixel i is at i x scale, without antialiasing.

    In float32 and in the graph's order, columns first, so that results are equal bit for bit.
    """

    def neighbours(pixels):
        at = np.arange(size, dtype=np.float32) * np.float32(pixels / size)
        low = at.astype(np.int64)
        return low, np.minimum(low + 1, pixels - 1), at - low.astype(np.float32)

    x = image.astype(np.float32)
    left, right, across = neighbours(x.shape[1])
    top, bottom, down = neighbours(x.shape[0])
    x = x[:, left] + (x[:, right] - x[:, left]) * across[None, :, None]
    return x[top] + (x[bottom] - x[top]) * down[:, None, None]


def centre_crop(image: Picture, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """The centre square after the short side is resized to `size` by PIL's bicubic filter.

    Sizes and offsets are rounded as torchvision rounds them.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    shape = (int(size * width / short), int(size * height / short))
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    left, top = (round((n - size) / 2) for n in shape)
    return resized[top : top + size, left : left + size]


def _normalise(
    image: Picture, mean: tuple[float, float, float], deviation: tuple[float, float, float]
) -> Prepared:
    x = image.astype(np.float32) / 255
    return (x - np.float32(mean)[None, None]) / np.float32(deviation)[None, None]
