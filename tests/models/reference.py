"""The networks in NumPy float64, written from their formulas, as a reference for the tests."""

import numpy as np


def swish(x):
    return x / (1 + np.exp(-x))


def group_norm(x, groups, scale, bias, eps=1e-5):
    b, h, w, c = x.shape
    g = x.reshape(b, h * w, groups, c // groups)
    mean, var = g.mean(axis=(1, 3), keepdims=True), g.var(axis=(1, 3), keepdims=True)
    return ((g - mean) / np.sqrt(var + eps)).reshape(x.shape) * scale + bias


def layer_norm(x, scale, bias, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def conv3x3(x, kernel, bias, stride=1):
    b, h, w, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((b, h, w, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + h, j : j + w] @ kernel[i, j]
    return out[:, ::stride, ::stride] + bias


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def pool(x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def up(x):
    return x.repeat(2, axis=1).repeat(2, axis=2)


RESAMPLE = {"none": lambda x: x, "down": pool, "up": up}


def res_block(p, h, emb, resample, residual_scale, scale_shift, groups):
    shortcut = RESAMPLE[resample](h)
    if "shortcut" in p:
        shortcut = dense(shortcut, p["shortcut"])
    out = RESAMPLE[resample](
        swish(group_norm(h, groups(h.shape[-1]), p["norm_0"]["scale"], p["norm_0"]["bias"]))
    )
    out = conv3x3(out, p["conv_0"]["kernel"], p["conv_0"]["bias"])
    film = dense(swish(emb), p["film"])[:, None, None, :]
    norm = lambda x: group_norm(x, groups(x.shape[-1]), p["norm_1"]["scale"], p["norm_1"]["bias"])
    if scale_shift:
        scale, shift = np.split(film, 2, axis=-1)
        out = norm(out) * (1 + scale) + shift
    else:
        out = norm(out + film)
    out = conv3x3(swish(out), p["conv_1"]["kernel"], p["conv_1"]["bias"])
    return (shortcut + out) * residual_scale


def attend(q, k, v, valid, heads):
    """Attention of one sample: q [n c], k and v [m c], valid [m]."""
    d = q.shape[-1] // heads
    out = np.zeros_like(q)
    for i in range(heads):
        s = slice(i * d, (i + 1) * d)
        logits = q[:, s] @ k[:, s].T / np.sqrt(d)
        logits = np.where(valid[None], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, s] = weights / weights.sum(-1, keepdims=True) @ v[:, s]
    return out


def attention(p, h, text, mask, heads, kind, groups):
    b, _height, _width, c = h.shape
    pixels = group_norm(h, groups(c), p["norm"]["scale"], p["norm"]["bias"]).reshape(b, -1, c)
    out = np.zeros_like(pixels)
    for i in range(b):
        keys, values, valid = [], [], []
        if kind == "cross":
            q = dense(pixels[i], p["q"])
        else:
            q, k, v = np.split(dense(pixels[i], p["qkv"]), 3, axis=-1)
            keys, values, valid = [k], [v], [np.ones(len(k), bool)]
        if kind != "self":
            context = layer_norm(text[i], p["text_norm"]["scale"], p["text_norm"]["bias"])
            k, v = np.split(dense(context, p["text_kv"]), 2, axis=-1)
            keys, values, valid = keys + [k], values + [v], valid + [mask[i]]
        out[i] = attend(
            q, np.concatenate(keys), np.concatenate(values), np.concatenate(valid), heads
        )
    return h + dense(out, p["out"]).reshape(h.shape)


def text_pool(p, text, mask, heads):
    text = layer_norm(text, p["norm"]["scale"], p["norm"]["bias"])
    out = []
    for tokens, valid in zip(text, mask):
        query = tokens[valid].mean(0) + p["query"]
        q = dense(query[None], p["q"])
        k, v = np.split(dense(tokens, p["kv"]), 2, axis=-1)
        out.append(attend(q, k, v, valid, heads)[0])
    return dense(np.stack(out), p["out"])


def conv_half_stride(x, kernel, bias):
    """Transposed 3x3 convolution: each input pixel adds its kernel to the nine outputs around 2 (i,
    j).
    """
    b, h, w, _ = x.shape
    out = np.zeros((b, 2 * h + 2, 2 * w + 2, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            out[:, i : i + 2 * h : 2, j : j + 2 * w : 2] += x @ kernel[i, j]
    return out[:, 1:-1, 1:-1] + bias


def noise_level(p, logsnr):
    n = p["dense_0"]["kernel"].shape[0] // 2
    angle = (
        1000
        * np.arctan(np.exp(-logsnr / 2))[:, None]
        / (np.pi / 2)
        * 10_000.0 ** (-np.arange(n) / n)
    )
    return dense(
        swish(dense(np.concatenate([np.sin(angle), np.cos(angle)], -1), p["dense_0"])), p["dense_1"]
    )


def conditioning(p, logsnr, cond, pool_heads):
    emb = noise_level(p["time"], logsnr) + noise_level(p["lowres_noise"], cond["lowres_logsnr"])
    text = dense(
        layer_norm(cond["text"], p["text_norm"]["scale"], p["text_norm"]["bias"]), p["text_proj"]
    )
    return emb + text_pool(p["text_pool"], text, cond["text_mask"], pool_heads), text


def unet(p, x, logsnr, cond, *, blocks, kinds, head_channels, pool_heads, groups):
    """The base U-Net on its concatenated input; `kinds` has a kind of attention or None for each
    level.
    """
    emb, text = conditioning(p["conditioning"], logsnr, cond, pool_heads)

    def block(h, level, name, resample="none"):
        return res_block(p[level][name], h, emb, resample, 1.0, True, groups)

    def attend_to(h, level, i, kind):
        heads = h.shape[-1] // head_channels
        return (
            attention(p[level][f"attn_{i}"], h, text, cond["text_mask"], heads, kind, groups)
            if kind
            else h
        )

    h = conv3x3(x, p["stem"]["kernel"], p["stem"]["bias"])
    skips = [h]
    for level, kind in enumerate(kinds):
        for i in range(blocks):
            h = attend_to(block(h, f"down_{level}", f"block_{i}"), f"down_{level}", i, kind)
            skips.append(h)
        if level < len(kinds) - 1:
            h = block(h, f"down_{level}", "resample", "down")
            skips.append(h)
    h = block(attend_to(block(h, "mid", "block_0"), "mid", 0, kinds[-1]), "mid", "block_1")
    for level in reversed(range(len(kinds))):
        for i in range(blocks + 1):
            h = block(np.concatenate([h, skips.pop()], -1), f"up_{level}", f"block_{i}")
            h = attend_to(h, f"up_{level}", i, kinds[level])
        if level:
            h = block(h, f"up_{level}", "resample", "up")
    h = swish(group_norm(h, groups(h.shape[-1]), p["out_norm"]["scale"], p["out_norm"]["bias"]))
    return conv3x3(h, p["out"]["kernel"], p["out"]["bias"])


def efficient_unet(p, x, logsnr, cond, *, blocks, kinds, heads, pool_heads, residual_scale, groups):
    """The Efficient U-Net on its concatenated input; `kinds` as for `unet`."""
    emb, text = conditioning(p["conditioning"], logsnr, cond, pool_heads)

    def body(h, q, level):
        for i in range(blocks[level]):
            h = res_block(q[f"block_{i}"], h, emb, "none", residual_scale, True, groups)
        if kinds[level]:
            h = attention(q["attn"], h, text, cond["text_mask"], heads, kinds[level], groups)
            normed = group_norm(
                h, groups(h.shape[-1]), q["mlp"]["norm"]["scale"], q["mlp"]["norm"]["bias"]
            )
            h = h + dense(swish(dense(normed, q["mlp"]["dense_0"])), q["mlp"]["dense_1"])
        return h

    h = conv3x3(x, p["stem"]["kernel"], p["stem"]["bias"])
    skips = []
    for level in range(len(blocks)):
        q = p[f"down_{level}"]
        h = body(conv3x3(h, q["resample"]["kernel"], q["resample"]["bias"], stride=2), q, level)
        skips.append(h)
    for level in reversed(range(len(blocks))):
        q = p[f"up_{level}"]
        h = conv_half_stride(body(h, q, level), q["upsample"]["kernel"], q["upsample"]["bias"])
        h = h + skips[level - 1] if level else h
    return dense(h, p["out"])
