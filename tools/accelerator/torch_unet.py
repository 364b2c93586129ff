"""DeepFloyd IF's stage I U-Net in plain PyTorch, for timings without diffusers.

The architecture of diffusers' UNet2DConditionModel with IF's config: residual blocks that resample
inside, attention of 64 channels a head over the text's and the pixels' keys at once. The names of
its parameters are shorter; their number is the same.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

TEXT_DIM, GROUPS, HEAD = 4096, 32, 64
IF_I_M = dict(widths=(192, 384, 576, 768), blocks=3)


class ResBlock(nn.Module):
    """GroupNorm, gelu, [resample], convolution, GroupNorm with scale and shift, the same again."""

    def __init__(self, c_in: int, c_out: int, time: int, resample: str = "none"):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time, 2 * c_out)
        self.norm2 = nn.GroupNorm(GROUPS, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def _resampled(self, h: torch.Tensor) -> torch.Tensor:
        if self.resample == "down":
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2.0) if self.resample == "up" else h

    def forward(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        out = self.conv1(self._resampled(F.gelu(self.norm1(h))))
        scale, shift = self.time(F.gelu(emb))[:, :, None, None].chunk(2, dim=1)
        out = self.conv2(F.gelu(self.norm2(out) * (1 + scale) + shift))
        return self.shortcut(self._resampled(h)) + out


class Attention(nn.Module):
    """Joint attention of the pixels to text and pixels, added to the feature map."""

    def __init__(self, c: int, text: int):
        super().__init__()
        self.heads = c // HEAD
        self.norm = nn.GroupNorm(GROUPS, c)
        self.norm_text = nn.GroupNorm(GROUPS, text, eps=1e-5)
        self.q, self.k, self.v = (nn.Linear(c, c) for _ in range(3))
        self.text_k, self.text_v = nn.Linear(text, c), nn.Linear(text, c)
        self.out = nn.Linear(c, c)

    def _split(self, a: torch.Tensor) -> torch.Tensor:
        return a.unflatten(-1, (self.heads, HEAD)).transpose(1, 2)

    def forward(self, h: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        b, c, height, width = h.shape
        pixels = self.norm(h.flatten(2)).transpose(1, 2)
        text = self.norm_text(text.transpose(1, 2)).transpose(1, 2)
        k = torch.cat([self.text_k(text), self.k(pixels)], dim=1)
        v = torch.cat([self.text_v(text), self.v(pixels)], dim=1)
        out = F.scaled_dot_product_attention(*map(self._split, (self.q(pixels), k, v)))
        out = self.out(out.transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).reshape(b, c, height, width)


class TextPool(nn.Module):
    """Pools the tokens to a vector: their mean attends to the mean and the tokens."""

    def __init__(self, text: int, time: int, heads: int = 64):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(text), nn.LayerNorm(time)
        self.position = nn.Parameter(torch.randn(1, text) / math.sqrt(text))
        self.q, self.k, self.v = (nn.Linear(text, text) for _ in range(3))
        self.proj = nn.Linear(text, time)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        text = self.norm1(text)
        first = text.mean(dim=1, keepdim=True) + self.position
        text = torch.cat([first, text], dim=1)
        split = lambda a: a.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = split(self.q(first)), split(self.k(text)), split(self.v(text))
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]
        return self.norm2(self.proj(pooled))


class Level(nn.Module):
    """The blocks of one resolution, with attention if the level has it, then resampling."""

    def __init__(
        self, inputs: list[int], c: int, time: int, text: int, attend: bool, resample: str
    ):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_in, c, time) for c_in in inputs)
        self.attention = nn.ModuleList(Attention(c, text) for _ in inputs if attend)
        self.resample = ResBlock(c, c, time, resample) if resample != "none" else None

    def forward(self, h, skips, emb, text):
        outputs = []
        for i, block in enumerate(self.blocks):
            if skips is not None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)
            if self.attention:
                h = self.attention[i](h, text)
            outputs.append(h)
        if self.resample is not None:
            h = self.resample(h, emb)
            outputs.append(h)
        return h, outputs


class UNet(nn.Module):
    """(z [b 3 s s], time [b], text [b l 4096]) -> [b 6 s s], the noise and its variance."""

    def __init__(self, widths: tuple[int, ...], blocks: int, text_dim: int = TEXT_DIM):
        super().__init__()
        c, context, last = widths[0], widths[-1], len(widths) - 1
        time = 4 * c
        self.features = c
        self.time = nn.Sequential(nn.Linear(c, time), nn.GELU(), nn.Linear(time, time))
        self.pool = TextPool(text_dim, time)
        self.context = nn.Linear(text_dim, context)
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        skips, self.down = [c], nn.ModuleList()
        for i, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (blocks - 1)
            resample = "down" if i < last else "none"
            self.down.append(Level(inputs, width, time, context, i > 0, resample))
            skips += [width] * (blocks + (i < last))
        self.mid = nn.ModuleList([
            ResBlock(context, context, time),
            Attention(context, context),
            ResBlock(context, context, time),
        ])  # fmt: skip
        self.up, h = nn.ModuleList(), context
        for i, width in reversed(list(enumerate(widths))):
            inputs = [(h if j == 0 else width) + skips.pop() for j in range(blocks + 1)]
            self.up.append(Level(inputs, width, time, context, i > 0, "up" if i else "none"))
            h = width
        self.norm_out = nn.GroupNorm(GROUPS, c)
        self.conv_out = nn.Conv2d(c, 6, 3, padding=1)

    def forward(self, z: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        half = self.features // 2
        steps = torch.arange(half, device=z.device, dtype=torch.float32) / half
        angle = time.float()[:, None] * torch.exp(-math.log(10_000.0) * steps)
        emb = self.time(torch.cat([angle.cos(), angle.sin()], dim=1).to(z.dtype)) + self.pool(text)
        text = self.context(text)
        h = self.conv_in(z)
        skips = [h]
        for level in self.down:
            h, outputs = level(h, None, emb, text)
            skips += outputs
        h = self.mid[2](self.mid[1](self.mid[0](h, emb), text), emb)
        for level in self.up:
            h, _ = level(h, skips, emb, text)
        return self.conv_out(F.gelu(self.norm_out(h)))
