"""Stores large images resized: size, pixels and encoding.

Training cuts out the centre square and shrinks it with the BOX filter. The centre square of a
resized image is that of the original, shrunk in one step with the same filter. So training at the
stored size sees the same pixels as with the original, if the encoding is lossless.
"""

import dataclasses
import io

from PIL import Image

from imagen_jax.data.transforms import centre_square

FORMATS = ("jpeg", "png")
_OPTIONS = {"jpeg": {"quality": 95, "subsampling": "4:4:4"}, "png": {}}
_LARGEST_JPEG = 65_500  # pixels per side, the limit of libjpeg


@dataclasses.dataclass(frozen=True, slots=True)
class Resize:
    """How images are resized before they are stored.

    side: images whose shorter side is longer than this, in pixels, are shrunk to it; 0 for none.
    format: encoding of the resized images, one of FORMATS.
    """

    side: int = 0
    format: str = "jpeg"

    def applies(self, size: tuple[int, int]) -> bool:
        """Whether an image of this width and height is stored resized."""
        return 0 < self.side < min(size)

    def stored_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height as stored of an image of this width and height."""
        if not self.applies(size):
            return size
        width, height = (self.side + sum(self._margins(length, min(size))) for length in size)
        return width, height

    def _margins(self, length: int, square: int) -> tuple[int, int]:
        """Stored pixels before and after the centre square, rounded down."""
        before = (length - square) // 2
        after = length - square - before
        return before * self.side // square, after * self.side // square

    def shrink(self, image: Image.Image) -> Image.Image:
        """The image with `side` as its shorter side, without metadata."""
        square, size = min(image.size), self.stored_size(image.size)
        before = [self._margins(length, square)[0] for length in image.size]
        # The grid of stored pixels starts at the centre square; less than a pixel of each end of
        # the longer side is outside. In integers, so that no rounding leaves the image.
        low = [
            (length - square) // 2 * self.side - margin * square
            for length, margin in zip(image.size, before)
        ]
        high = [start + pixels * square for start, pixels in zip(low, size)]
        box = tuple(end / self.side for end in (*low, *high))
        small = Image.new("RGB", size)
        if image.width != image.height:
            small.paste(image.resize(size, Image.Resampling.BOX, box))
        # PIL rounds `box`; the square, which training sees, is made without.
        centre = centre_square(image).resize((self.side, self.side), Image.Resampling.BOX)
        small.paste(centre, tuple(before))
        return small

    def encode(self, image: Image.Image) -> bytes:
        """The bytes to store for an image to which this applies; PNG if too long for JPEG."""
        small = self.shrink(image)
        kind = "png" if max(small.size) > _LARGEST_JPEG else self.format
        buffer = io.BytesIO()
        small.save(buffer, kind, **_OPTIONS[kind])
        return buffer.getvalue()


AS_IS = Resize()
