"""The feature networks in torch: torch-fidelity's Inception, transformers' CLIP and DINOv2, and an
EfficientNet-Lite written for this comparison. Used by the parity tests and by
`tools/make_feature_goldens.py`.
"""

import importlib
import importlib.util
import sys
import types
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tests.evals.networks import tiny


def fidelity(module: str):
    """A module of torch-fidelity, without its `__init__`, which imports torchvision."""
    if "torch_fidelity" not in sys.modules:
        package = types.ModuleType("torch_fidelity")
        spec = importlib.util.find_spec("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    return importlib.import_module(f"torch_fidelity.{module}")


def load(model: nn.Module) -> nn.Module:
    """The model with the weights of tiny.random_tensor."""
    state = {
        name: torch.tensor(tiny.random_tensor(name, tuple(value.shape)))
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval()


def inception(thin: int = 1) -> nn.Module:
    """torch-fidelity's network, from uint8 images, with channel counts divided by `thin`."""
    source = fidelity("feature_extractor_inceptionv3")
    kind = source.FeatureExtractorInceptionV3
    with mock.patch.object(kind, "load_state_dict"), mock.patch.object(torch, "load"):
        model = kind("random", ["2048"], feature_extractor_weights_path="random")
    for module in model.modules():
        if isinstance(module, source.BasicConv2d) and thin > 1:
            conv = module.conv
            inputs = conv.in_channels if conv.in_channels == 3 else conv.in_channels // thin
            geometry = conv.kernel_size, conv.stride, conv.padding
            module.conv = nn.Conv2d(inputs, conv.out_channels // thin, *geometry, bias=False)
            module.bn = nn.BatchNorm2d(conv.out_channels // thin, module.bn.eps)
    model.fc = nn.Linear(2048 // thin, 1008)
    return load(model)


def inception_features(model: nn.Module, prepared: np.ndarray) -> np.ndarray:
    """Features of prepared images of any size: the network without its resize."""
    source = fidelity("feature_extractor_inceptionv3")
    resized = channels_first(prepared * 128 + 128)
    ignored = torch.zeros(len(prepared), 3, 8, 8, dtype=torch.uint8)
    resize = mock.patch.object(
        source, "interpolate_bilinear_2d_like_tensorflow1x", lambda *args, **kwargs: resized
    )
    with resize, torch.no_grad():
        return model(ignored)[0].numpy()


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def clip(image: tiny.CLIPImageConfig, text: tiny.CLIPTextConfig):
    """transformers' CLIPModel with random weights."""
    import transformers

    common = dict(hidden_act="quick_gelu")
    config = transformers.CLIPConfig(
        vision_config=dict(
            image_size=image.size,
            patch_size=image.patch,
            hidden_size=image.width,
            intermediate_size=4 * image.width,
            num_hidden_layers=image.layers,
            num_attention_heads=image.heads,
            **common,
        ),
        text_config=dict(
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_length,
            eos_token_id=text.vocab_size - 1,
            bos_token_id=0,
            **common,
        ),
        projection_dim=image.dim,
    )
    return load(transformers.CLIPModel(config))


def clip_image_features(model, prepared: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model.vision_model(channels_first(prepared)).pooler_output
        return model.visual_projection(out).numpy()


def clip_text_features(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(features per token, projected vector)."""
    with torch.no_grad():
        out = model.text_model(torch.tensor(ids).long())
        return out.last_hidden_state.numpy(), model.text_projection(out.pooler_output).numpy()


def dinov2(config: tiny.DINOv2Config):
    """transformers' Dinov2Model; random_tensor gets the names of its files."""
    import transformers

    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            patch_size=config.patch,
            image_size=config.patch * config.grid,
        )
    ).eval()
    stored = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
    }

    def in_file(name):
        for new, old in stored.items():
            name = name.replace(new, old)
        return name

    model.load_state_dict(
        {
            name: torch.tensor(tiny.random_tensor(in_file(name), tuple(value.shape)))
            for name, value in model.state_dict().items()
        }
    )
    return model


def dinov2_features(model, prepared: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(channels_first(prepared)).pooler_output.numpy()


def efficientnet_lite_features(
    state: dict[str, np.ndarray], prepared: np.ndarray, stages
) -> np.ndarray:
    """Features of EfficientNet-Lite, from the tensors of its file."""
    state = {name: torch.tensor(value) for name, value in state.items()}

    def conv(x, name, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        before = total // 2
        x = functional.pad(x, [before, total - before] * 2)
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var")]
        affine = [state[f"{name}.{part}"] for part in ("weight", "bias")]
        return functional.batch_norm(x, *parts, *affine, eps=1e-3)

    with torch.no_grad():
        x = functional.relu6(norm(conv(channels_first(prepared), "_conv_stem", 2), "_bn0"))
        block = 0
        for repeats, _, first, expansion, _ in stages:
            for i in range(repeats):
                name, y = f"_blocks.{block}", x
                if expansion > 1:
                    y = functional.relu6(norm(conv(y, f"{name}._expand_conv"), f"{name}._bn0"))
                stride = first if i == 0 else 1
                y = conv(y, f"{name}._depthwise_conv", stride, groups=y.shape[1])
                y = functional.relu6(norm(y, f"{name}._bn1"))
                y = norm(conv(y, f"{name}._project_conv"), f"{name}._bn2")
                x = x + y if x.shape == y.shape else y
                block += 1
        x = functional.relu6(norm(conv(x, "_conv_head"), "_bn1"))
        return x.mean((2, 3)).numpy()
