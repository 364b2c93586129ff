"""Builds a Stage from a config: one diffusion model, for training, sampling and evaluation.

Input: configs completed by imagen_jax/schema.py, with valid types and choices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Num, PyTree, Shaped, UInt8

from imagen_jax import schema, sharding, stage_sizes
from imagen_jax.data.transforms import check_sizes
from imagen_jax.diffusion import conditioning, loss, sampler
from imagen_jax.diffusion.density import DENSITIES, Density
from imagen_jax.diffusion.grid import GRIDS, TimeGrid, check_levels
from imagen_jax.diffusion.guidance import Guidance, Threshold
from imagen_jax.diffusion.process import GaussianProcess, Process
from imagen_jax.diffusion.sampler import SAMPLERS
from imagen_jax.diffusion.schedule import SCHEDULES, Schedule
from imagen_jax.diffusion.weighting import WEIGHTS, Weight
from imagen_jax.models.efficient_unet import EfficientUNet
from imagen_jax.models.layers import TEXT, identity
from imagen_jax.models.unet import UNet
from imagen_jax.sharded_attention import attention_on
from imagen_jax.stage_sizes import Size, size_text
from imagen_jax.text_inputs import MASK, POOLED, TextInput, field_name, text_inputs
from imagen_jax.text_inputs import TEXT as TEXT_FIELD

NETWORKS = {"unet": UNet, "efficient_unet": EfficientUNet}
# Generator of all keys, independent of jax's default; checkpoints store its name.
RNG = "threefry2x32"
# Makes random numbers independent of the flag `jax_threefry_partitionable`.
PINNED = functools.partial(jax.threefry_partitionable, True)
TEXT_VALUES = "text_values"  # the entry of `cond` with the network's values of the text
Batch = PyTree[Shaped[Array, "b ..."]]  # a dict, see `Stage.batch_shapes`
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A network with its diffusion process, training distribution and image sizes.

    Batches hold uint8 images; the methods convert them to fp32 in [-1, 1].

    name: name of the stage in logs and messages.
    model: the network.
    process: forward process and prediction target.
    density: distribution of log-SNR in training.
    weight: weight of the squared error as a function of log-SNR; None for weight 1.
    schedule: name of the noise schedule of the sampling grid.
    aug_schedule: noise schedule of the low-res augmentation.
    text_drop: probability of dropping a caption in training.
    aug_max: largest augmentation level of the low-res image in training, 0 to 1.
    image_size: side of the images in pixels.
    lowres_size: side of the low-res input in pixels; 0 in a base stage.
    crop_size: side of the training crops in pixels; 0 for whole images.
    buckets: sizes (height, width) of the training images; one size per batch.
    texts: the text inputs, one per text encoder; none for a model without text.
    sampling: the section `sampling` of the config.
    """

    name: str
    model: UNet | EfficientUNet
    process: Process
    density: Density
    weight: Weight | None
    schedule: str
    aug_schedule: Schedule
    text_drop: float
    aug_max: float
    image_size: int
    lowres_size: int
    crop_size: int
    buckets: tuple[Size, ...]
    texts: tuple[TextInput, ...]
    sampling: Mapping[str, Any]

    @property
    def reads_text(self) -> bool:
        """Whether the model is conditioned on text."""
        return bool(self.texts)

    @property
    def train_size(self) -> int:
        """Side in pixels of square training images: of the crops, or of whole images.

        Validation and sample grids have this size in a stage with other buckets, too.
        """
        return self.crop_size or self.image_size

    @property
    def largest_bucket(self) -> Size:
        """The size of training images with the most pixels."""
        return max(self.buckets, key=math.prod)

    def lowres_of(self, size: Size) -> Size:
        """The size of the low-res input of images of `size`; (0, 0) in a base stage."""
        return stage_sizes.scaled(size, self.lowres_size, self.image_size)

    def batch_shapes(self, b: int, size: Size) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{field: (shape, dtype)} of a batch of `b` images of `size`."""
        shapes = {"image": ((b, *size, 3), jnp.uint8)} | self.text_shapes(b)
        if self.lowres_size:
            shapes["lowres"] = (b, *self.lowres_of(size), 3), jnp.uint8
        return shapes

    def text_shapes(self, b: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The fields of `batch_shapes` that are texts."""
        shapes = {}
        for text in self.texts:
            shapes[field_name(TEXT_FIELD, text.name)] = (b, text.length, text.dim), jnp.bfloat16
            shapes[field_name(MASK, text.name)] = (b, text.length), jnp.bool_
            if text.pooled_dim:
                shapes[field_name(POOLED, text.name)] = (b, text.pooled_dim), jnp.bfloat16
        return shapes

    def cond(self, batch: Batch) -> conditioning.Cond:
        """The conditioning of the network.

        batch: the fields of the texts (`batch_shapes`) and, in super-resolution, clean uint8
            `lowres` [b h' w' 3].

        Raises ValueError for a batch without one of them.
        """
        fields = list(self.text_shapes(1))
        if missing := [field for field in fields if field not in batch]:
            raise ValueError(f"{self.name} reads {', '.join(missing)}, which the batch lacks")
        cond = {field: batch[field] for field in fields}
        return cond | ({"lowres": to_unit(batch["lowres"])} if self.lowres_size else {})

    def init(self, key: Key[Array, ""]) -> Params:
        """Initial fp32 parameters. Call it under `jax.eval_shape`, or jit with output shardings."""
        shapes = self.batch_shapes(1, stage_sizes.square(self.train_size))
        batch = {name: jnp.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        cond = self.cond(batch) | ({"lowres_logsnr": jnp.zeros(1)} if self.lowres_size else {})
        with PINNED():
            return self.model.init(key, to_unit(batch["image"]), jnp.zeros(1), cond)["params"]

    def draw(self, key: Key[Array, ""], b: int, size: Size) -> loss.Draws:
        """The random numbers of a training step for `b` images of `size` (see `loss.draw`)."""
        with PINNED():
            return loss.draw(
                key,
                (b, *size, 3),
                (b, *self.lowres_of(size), 3) if self.lowres_size else None,
                self.text_drop,
                self.aug_max,
                {text.name: text.drop for text in self.texts if text.name},
            )

    def noise_quartile(self, draws: loss.Draws) -> Int[Array, "b"]:
        """The quartile of the density that each row's log-SNR is in: 0 (lowest, noisiest) to 3.

        A log-SNR equal to an edge is in the upper quartile; a density that is clipped at an edge
        leaves a quartile empty.
        """
        return jnp.searchsorted(self.quartile_edges, self.density(draws["u"]), side="right")

    @functools.cached_property
    def quartile_edges(self) -> Float[np.ndarray, "3"]:
        """The log-SNRs between the quartiles of the density, ascending."""
        with jax.ensure_compile_time_eval():
            return np.asarray(self.density(jnp.array([0.75, 0.5, 0.25])))

    def denoiser(self, params: Params, dropout_key: Key[Array, ""] | None = None) -> loss.DenoiseFn:
        """Returns denoise_fn(z, logsnr, cond).

        With a `dropout_key`, the network runs in training mode. `cond` may have an entry
        TEXT_VALUES, see `layers.from_text`.
        """
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None

        def denoise_fn(z, logsnr, cond):
            given = {TEXT: cond[TEXT_VALUES]} if TEXT_VALUES in cond else {}
            cond = {name: value for name, value in cond.items() if name != TEXT_VALUES}
            return self.model.apply({"params": params, **given}, z, logsnr, cond, train, rngs=rngs)

        return denoise_fn

    def per_sample_loss(
        self,
        params: Params,
        batch: Batch,
        draws: loss.Draws,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b"]:
        """The denoising loss of each row of a batch (Appendix A) with random numbers `draws`."""
        logsnr = self.density(draws["u"])
        x, _, output = self._noised_output(params, batch, draws, logsnr, dropout_key)
        return loss.per_sample_loss(output, x, draws["eps"], logsnr, self.process, self.weight)

    def x_error(
        self, params: Params, batch: Batch, draws: loss.Draws, logsnr: Float[Array, "b"]
    ) -> Float[Array, "b"]:
        """The squared error of x-hat of each row at its log-SNR (see `loss.x_error`)."""
        x, z, output = self._noised_output(params, batch, draws, logsnr)
        return loss.x_error(output, z, x, logsnr, self.process)

    def _noised_output(
        self,
        params: Params,
        batch: Batch,
        draws: loss.Draws,
        logsnr: Float[Array, "b"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w 3"], Float[Array, "b h w 3"]]:
        """(clean image x, noisy image z, output of the network for z)."""
        x = to_unit(batch["image"])
        z, cond = loss.noised(x, self.cond(batch), draws, logsnr, self.process, self.aug_schedule)
        return x, z, self.denoiser(params, dropout_key)(z, logsnr, cond)

    def sample(
        self,
        params: Params,
        keys: Key[Array, "b"],
        batch: Batch,
        sampling: Mapping[str, Any],
        size: Size,
    ) -> Float[Array, "b h w 3"]:
        """Draws one image per row of `batch`, with values in about [-1, 1].

        The low-res image is noised to `sampling["aug_level"]` (section 2.4). A sample depends only
        on its own key and its own row of the batch.

        batch: as for `cond`.
        sampling: a complete section `sampling`.
        size: of the images.
        """
        with PINNED():
            return self._sample(params, keys, batch, sampling, size)

    def _sample(
        self,
        params: Params,
        keys: Key[Array, "b"],
        batch: Batch,
        sampling: Mapping[str, Any],
        size: Size,
    ) -> Float[Array, "b h w 3"]:
        cond = self.cond(batch)
        if "lowres" in cond:
            if cond["lowres"].shape[1:3] != self.lowres_of(size):
                needed, found = self.lowres_of(size), cond["lowres"].shape[1:3]
                raise ValueError(
                    f"{self.name} needs low-res images of {size_text(needed)} for images of"
                    f" {size_text(size)}, not of {size_text(found)}"
                )
            aug_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
            noise = sampler.sample_noise(aug_keys, cond["lowres"].shape[1:])
            level = jnp.full(keys.shape, sampling["aug_level"], jnp.float32)
            cond = conditioning.augment_lowres(cond, noise, level, self.aug_schedule)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        components = sampling_rules(sampling, self.schedule)
        levels = components.pop("grid")(sampling["steps"])
        return sampler.sample(
            self.denoiser(params),
            keys,
            (*size, 3),
            cond,
            process=self.process,
            levels=levels,
            prepare=functools.partial(self.with_text_values, params, size=size),
            **components,
        )

    def with_text_values(
        self, params: Params, cond: conditioning.Cond, size: Size
    ) -> conditioning.Cond:
        """`cond` with TEXT_VALUES, for images of this size."""
        if not self.reads_text:
            return cond
        b = cond[field_name(MASK, self.texts[0].name)].shape[0]
        # The values need no z. The compiler removes the rest of the network.
        inputs = jnp.zeros((b, *size, 3)), jnp.zeros(b), cond
        _, values = self.model.apply({"params": params}, *inputs, mutable=[TEXT])
        return cond | {TEXT_VALUES: values[TEXT]}


def random_key(seed: Any) -> Key[Array, ""]:
    """The key of a seed, an integer in [0, 2^32) or a traced uint32.

    The generator is Threefry, because the numbers of "rbg" depend on the position in a batch.
    Raises ValueError for an integer outside the interval, which would wrap.
    """
    if isinstance(seed, int):
        schema.check_seed(seed, "the seed")
    return jax.random.key(seed, impl=RNG)


def to_unit(image: Num[Array, "*d"]) -> Float[Array, "*d"]:
    """Maps uint8 values 0..255 to fp32 values -1..1."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: Float[Array, "*d"]) -> UInt8[Array, "*d"]:
    """Clips to [-1, 1] and maps to uint8 values 0..255."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def images_and_finite(
    x: Float[Array, "b *d"],
) -> tuple[UInt8[Array, "b *d"], Bool[Array, "b"]]:
    """(samples as uint8, whether all values of each sample are finite).

    The flags are needed because NaN becomes 0 in uint8.
    """
    return to_uint8(x), jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def check_finite(finite: Bool[np.ndarray, "b"], name: str) -> None:
    """Raises FloatingPointError if a sample of stage `name` holds values that are not finite."""
    if not finite.all():
        raise FloatingPointError(
            f"{name} drew {np.sum(~finite)} of {len(finite)} images with values that are not"
            " finite: lower sampling.w, use sampling.threshold, or check the weights"
        )


def create_stage(config: Mapping[str, Any], mesh: Mesh | None = None) -> Stage:
    """Builds the stage of a complete config, for one device or for `mesh`.

    Raises ValueError that names the field if sizes or settings do not fit together.
    """
    model, diffusion, data, text = (
        dict(config[part]) for part in ("model", "diffusion", "data", "text")
    )
    check_sizes(data)
    texts = text_inputs(config)
    if bool(texts) != bool(model["cond_dim"]):
        features = f"text.dim={text['dim']}"
        if text["encoders"]:
            features = f"text.encoders={tuple(text['encoders'])}"
        raise ValueError(
            f"{features} and model.cond_dim={model['cond_dim']}: set both (text) or neither (no"
            " text)"
        )
    check_sampling(config["sampling"])
    family = model.pop("family")
    model = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value
        for name, value in model.items()
    }
    model["dtype"] = jnp.dtype(model["dtype"])
    stage = Stage(
        name=config["name"],
        model=NETWORKS[family](
            **model,
            lowres=bool(data["lowres_size"]),
            constrain=sharding.constrain_activations(mesh) if mesh else identity,
            gather=sharding.gather_kernels(mesh) if mesh else identity,
            attend=attention_on(mesh, model["remat"]),
            encoders=tuple(text.name for text in texts),
            pooled=tuple(text.name for text in texts if text.pooled_dim),
        ),
        process=build(GaussianProcess, diffusion),
        density=build(DENSITIES[diffusion["density"]], diffusion),
        weight=WEIGHTS[diffusion["weight"]],
        schedule=diffusion["schedule"],
        aug_schedule=SCHEDULES[diffusion["aug_schedule"]],
        text_drop=diffusion["text_drop"],
        aug_max=diffusion["aug_max"],
        image_size=data["image_size"],
        lowres_size=data["lowres_size"],
        crop_size=data["crop_size"],
        buckets=stage_sizes.of_training(data),
        texts=texts,
        sampling=dict(config["sampling"]),
    )
    if data["buckets"]:
        stage_sizes.check_buckets(stage)
    return stage


def build(kind: Callable[..., Any], section: Mapping[str, Any]) -> Any:
    """Creates an instance of dataclass `kind`; its fields have the names of config fields."""
    value = lambda name: tuple(section[name]) if isinstance(section[name], list) else section[name]
    return kind(**{field.name: value(field.name) for field in dataclasses.fields(kind)})


def sampling_rules(sampling: Mapping[str, Any], schedule: str) -> dict[str, Any]:
    """{grid, sampler, guidance, threshold} from a complete section `sampling`. Computes no array.

    schedule: name of the noise schedule, used by the grid of uniform times. Raises ValueError that
    names the field for an invalid number.
    """
    section = {**sampling, "schedule": schedule}
    if section["steps"] < 1:
        raise ValueError(f"sampling.steps is {section['steps']}; at least one step is needed")
    return {
        "grid": build(GRIDS[section["grid"]], section),
        "sampler": build(SAMPLERS[section["method"]], section),
        "guidance": build(Guidance, section),
        "threshold": build(Threshold, section),
    }


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises ValueError if `Stage.sample` cannot draw with `sampling`, a complete section."""
    if not 0.0 <= sampling["aug_level"] <= 1.0:
        raise ValueError(f"sampling.aug_level is {sampling['aug_level']}; it must be from 0 to 1")
    # The schedule matters only for the grid of uniform times, which is not checked here.
    grid = sampling_rules(sampling, schedule="cosine")["grid"]
    if not isinstance(grid, TimeGrid):
        check_levels(grid, sampling["steps"])


def check_interval(sampling: Mapping[str, Any], schedule: str) -> None:
    """Raises ValueError if `w_interval` contains no log-SNR of the sampling grid, or all of them.

    Then it disables guidance, or has no effect. The default interval contains all.
    """
    components = sampling_rules(sampling, schedule)
    guidance, steps = components["guidance"], sampling["steps"]
    if guidance.w == 1.0 or guidance.everywhere:
        return
    levels = components["grid"](steps)
    inside = int(guidance.inside(levels).sum())
    if inside in (0, steps):
        contains = "none" if inside == 0 else "all"
        advice = "set sampling.w = 1" if inside == 0 else "omit it"
        raise ValueError(
            f"sampling.w_interval = {tuple(guidance.w_interval)} contains {contains} of the"
            f" {steps} log-SNRs of the sampling grid, {levels[0]:.4g} to {levels[-1]:.4g}: give an"
            f" interval that contains some of them, or {advice}"
        )
