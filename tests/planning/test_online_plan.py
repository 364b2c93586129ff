"""Text encoders that run in the training: memory, time, and the comparison with a store."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from imagen_jax import sharding
from imagen_jax.data.prepare.caption_estimate import StoreEstimate
from imagen_jax.hardware import topology
from imagen_jax.planning import encoder_plan, online_plan, plan_report, text_costs, train_plan
from imagen_jax.text import sizes
from imagen_jax.text.t5_network import T5Encoder
from imagen_jax.text_inputs import TextInput
from tests import tiny
from tests.planning.test_plan_report import FITS, GIB, TIMES

V5E = topology.parse("v5e:2x4")
H100 = topology.parse("h100-8")
OPTIONS = train_plan.Options(Path(), 1, False, False, False, False, 0.0)
COMPARED = dataclasses.replace(OPTIONS, captions=(10,), caption_tokens=32.0)
COSTS = {"peak": 9 * GIB, "compute": 0.25, "overlapped": 0.5, "exposed": 0.125}


def stage(online: bool = True, **text):
    """The config of a stage with T5 base and CLIP L/14, or with other inputs."""
    config = dict(tiny.config("base_64"))
    inputs = {
        "dim": 0,
        "encoders": ("t5", "clip"),
        "dims": (768, 768),
        "lengths": (128, 77),
        "pooled_dims": (0, 768),
        "drops": (0.0, 0.0),
        "online": online,
        "online_encoder": "t5=base+clip=openai/clip-vit-large-patch14@layer=-2",
    }
    return config | {"text": dict(config["text"]) | inputs | text}


def mesh(fsdp: int = 4) -> Mesh:
    shape = dict.fromkeys(sharding.AXES, 1) | {"data": -1, "fsdp": fsdp}
    return sharding.make_mesh(shape)


def test_encoders_are_found_by_the_names_of_the_inputs():
    """Catches encoders in the order of text.encoder, a lost choice of features, and a directory
    that is not known.
    """
    config = stage()
    config["text"]["online_encoder"] = "clip=clip-l14@layer=-1+t5=google/t5-v1_1-base"
    t5, clip = online_plan.find_encoders(config, config["text"]["online_encoder"])
    assert (t5.input.name, t5.network.config) == ("t5", sizes.T5_V11["base"])
    assert (clip.input.name, clip.network.config.layer) == ("clip", 12)
    assets = str(tiny.ROOT / "imagen_jax/assets/t5_tiny")
    small = stage(encoders=(), dims=(), lengths=(), pooled_dims=(), drops=(), dim=256)
    (one,) = online_plan.find_encoders(small, assets)
    assert one.network.config.dim == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"online_encoder": "t5=base"}, "but the stage reads t5, clip"),
        ({"dims": (1024, 768)}, "base has features of width 768, but text.dims has 1024"),
        ({"lengths": (128, 78)}, "reads at most 77 tokens, not 78: set text.lengths to 77"),
        ({"online_encoder": ""}, "set text.online_encoder=NAME"),
    ],
)
def test_encoders_that_a_training_would_refuse(changes, message):
    """Catches a plan of a run that fails at its start."""
    config = stage(**changes)
    with pytest.raises(ValueError, match=message):
        online_plan.find_encoders(config, config["text"]["online_encoder"])


def test_an_unknown_encoder_is_left_out_and_named(caplog):
    """Catches memory without one of two encoders reported as that of both."""
    config = stage(online_encoder="t5=someone/encoder+clip=clip-l14")
    encoders = online_plan.find_encoders(config, config["text"]["online_encoder"])
    assert encoders[0].network is None and "someone/encoder are unknown" in caplog.text
    found = online_plan.plan_online(encoders[:1], V5E, mesh(), 8, "")
    assert (found["unknown"], found["weights"], found["seconds"]) == (["someone/encoder"], 0, 0)
    assert "sizes of someone/encoder are unknown" in plan_report.text(FITS | {"online": found})
    with pytest.raises(ValueError, match="sizes of the text encoder someone/encoder are unknown"):
        train_plan.text_encoders(config, COMPARED)


def test_a_comparison_needs_text_and_its_encoder():
    """Catches a comparison that fails after the step was compiled."""
    with pytest.raises(ValueError, match="give --text_encoder NAME"):
        train_plan.text_encoders(stage(False, online_encoder=""), COMPARED)
    none = stage(False, encoders=(), dims=(), lengths=(), pooled_dims=(), drops=())
    with pytest.raises(ValueError, match="--captions is for a stage with text"):
        train_plan.text_encoders(none, COMPARED)
    assert train_plan.text_encoders(stage(False), OPTIONS) == []
    assert len(train_plan.text_encoders(stage(), OPTIONS)) == 2


def one_layer():
    """T5 small with one of its layers."""
    config = dataclasses.replace(sizes.T5_V11["small"], num_layers=1)
    return T5Encoder(config, jnp.dtype("bfloat16"))


def test_weights_are_sharded_over_the_mesh(monkeypatch):
    """Catches whole weights on every chip, one of two encoders left out, and weights of a run
    without text.online.
    """
    whole, quarter = (encoder_plan.sharded_bytes(one_layer(), mesh(fsdp)) for fsdp in (1, 4))
    # Four products of 512 x 384, three of 512 x 1024, and the token embedding.
    assert whole == pytest.approx(2 * (4 * 512 * 384 + 3 * 512 * 1024 + 32_128 * 512), rel=1e-3)
    assert quarter == pytest.approx(whole / 4, rel=1e-2)
    text_input = TextInput("", 512, 32)
    both = [online_plan.Encoder(text_input, name, one_layer()) for name in ("t5", "clip")]
    monkeypatch.setattr(online_plan, "find_encoders", lambda config, given: both)
    assert online_plan.weights_on_a_chip(stage(), mesh(4)) == 2 * quarter
    assert online_plan.weights_on_a_chip(stage(False), mesh(4)) == 0


@pytest.mark.parametrize(("hardware", "seconds"), [(V5E, 0.625), (H100, 0.625), (None, 0.0)])
def test_time_of_an_encoding(monkeypatch, hardware, seconds):
    """Catches collectives left out, FLOPs of all chips instead of one, and a bound of a GPU below
    its FLOPs at peak.
    """
    costs = COSTS if hardware else COSTS | {"overlapped": 0.0, "exposed": 0.0}
    monkeypatch.setattr(encoder_plan, "_compiled_cost", lambda *args: costs)
    where = hardware or H100
    found = encoder_plan.encoding(one_layer(), "bfloat16", where, mesh(4), 64, 32, "")
    # 8 rows of 32 tokens on a chip; the token embedding has no FLOPs.
    flops = 2 * 8 * 32 * (4 * 512 * 384 + 3 * 512 * 1024)
    assert found["flops"] == pytest.approx(flops, rel=0.1)
    weights = 2 * (4 * 512 * 384 + 3 * 512 * 1024 + 32_128 * 512)
    bound = max(found["flops"] / where.chip.peak_flops, weights / where.chip.memory_bandwidth)
    assert found["seconds"] == pytest.approx(seconds or bound, rel=1e-2)
    assert found["fits"]


def online(**changes):
    row = {
        "name": "t5",
        "tokens": 128,
        "weights": 2 * GIB,
        "peak": 5 * GIB,
        "fits": True,
        "seconds": 0.25,
    }
    return {
        "encoders": [row, row | {"name": "clip", "weights": GIB, "peak": 2 * GIB}],
        "unknown": [],
        "weights": 3 * GIB,
        "seconds": 0.5,
        "is_bound": False,
        "shards": 4,
    } | changes


@pytest.mark.parametrize(
    ("step", "peak", "fits"), [(10, 13, True), (14, 17, False), (2.5, 8, True)]
)
def test_memory_with_encoders(step, peak, fits):
    """Catches the weights of one of two encoders left out, and an encoding that needs more than the
    step while the training state is in memory.
    """
    parts = {"parameters": GIB, "EMA": GIB, "gradients": GIB // 2, "temporaries": 0}
    memory = {"fits": True, "peak": int(step * GIB), "limit": 16 * GIB, "parts": parts}
    found = online_plan.with_encoders(memory, online())
    # Encoding: 2 of the state, 1 of the other encoder's weights, 5 of the encoder.
    assert (found["peak"], found["fits"]) == (peak * GIB, fits)
    assert found["parts"]["text encoders"] == 3 * GIB
    if step == 2.5:
        assert sum(found["parts"].values()) - sum(parts.values()) == found["peak"] - step * GIB
    assert not online_plan.with_encoders(memory | {"fits": False}, online())["fits"]


def test_the_time_of_a_step_includes_encoding():
    """Catches encoding that is reported and not drawn, or drawn as 0."""
    times = TIMES | {"encode_s": 0.5, "step_s": 2.0}
    cost = {"steps": 10, "hours": 0.5, "chip_hours": 2.0}
    plan = FITS | {"time": times, "cost": cost, "online": online()}
    text = plan_report.text(plan)
    assert "text encoding             500.00 ms   before the step" in text
    assert "t5, 128 tokens: 2 GiB of weights per chip, 5 GiB while it encodes, 250.00 ms" in text
    assert "in 4 shards" in text and "BOUND" not in text
    assert sum(plan_report._step_parts(times).values()) == pytest.approx(2000)
    bound = plan_report.text(FITS | {"online": online(is_bound=True)})
    assert ">250.00 ms per step" in bound and "ROOFLINE BOUNDS" in bound


def compared(monkeypatch, is_bound=False, tokens=20.0, price=0.0):
    """The comparison of `stage` at 800 and 8,000 captions, with rates of 10 and 40 captions/s."""
    asked = []

    def passes(network, hardware, lengths, batch_size, captions, cache):
        asked.append((network.config.dim, lengths))
        rate = 10.0 if len(asked) == 1 else 40.0
        row = {"captions_per_s_per_chip": rate, "tokens": lengths[0], "fits": True}
        return {"passes": [row]}

    monkeypatch.setattr(text_costs.encoder_plan, "plan_encoder", passes)
    config = stage()
    encoders = online_plan.find_encoders(config, config["text"]["online_encoder"])
    config["train"] = dict(config["train"]) | {"steps": 1000}
    config["data"] = dict(config["data"]) | {"batch_size": 16}
    found = text_costs.compare(
        config, V5E, encoders, online(is_bound=is_bound), [800, 8000], tokens, 2.0, "", price
    )
    return asked, found


def test_stored_features_against_encoding_online(monkeypatch):
    """Catches an encoder left out, chip-hours of one chip or of one step, and the break-even of
    other captions.
    """
    asked, found = compared(monkeypatch)
    assert asked == [(768, [32]), (768, [32])]
    few, many = found["rows"]
    # 800 captions take 800 / 10 + 800 / 40 = 100 chip-seconds; a step takes 8 x 0.5.
    assert few["once_chip_hours"] * 3600 == pytest.approx(100)
    assert few["once_hours"] == pytest.approx(few["once_chip_hours"] / 8)
    assert few["break_even_steps"] == pytest.approx(25)
    assert few["break_even_epochs"] == pytest.approx(25 * 16 / 800)
    assert few["epochs"] == 20 and many["break_even_steps"] == pytest.approx(250)
    run = found["online"]
    assert run["chip_hours"] * 3600 == pytest.approx(4000) and run["share"] == 0.25
    text = plan_report.text(FITS | {"text_costs": found})
    assert "(+25.0 %), 3 GiB of weights" in text and "1.11 chip-hours in 1,000" in text
    assert "BOUND" not in text and ">" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_comparison_has_a_price(monkeypatch):
    """Catches a price that is ignored, and the cost of other captions."""
    found = compared(monkeypatch, price=36.0)[1]
    text = plan_report.text(FITS | {"text_costs": found})
    assert "1.11 chip-hours in 1,000 steps, 40.00 at the given price" in text
    assert "Encoding 800 captions once: 1.00 at the given price" in text
    assert "Encoding 8,000 captions once: 10.00 at" in text


def test_the_table_of_an_encoder_has_small_numbers_and_a_price():
    """Catches "0.00" for a small encoder, and a price that is ignored."""
    row = {"tokens": 16, "rows": 4, "peak": 2**20, "flops": 2e9, "fits": True, "hours": 1.5e-3}
    row |= {"captions_per_s_per_chip": 1234.5, "chip_hours": 6e-3, "money": 0.018}
    about = dict(name="x", topology="t", chips=4, weights=2**20, parts=1, limit=2**30)
    plan = about | {"platform": "tpu", "passes": [row]}
    *_, heading, line = encoder_plan.text(plan)
    assert heading.split()[-2:] == ["chip-hours", "cost"]
    assert line.split() == ["16", "4", "0.000977", "0.002", "1,234", "0.0015", "0.006", "0.018"]
    without = {key: value for key, value in row.items() if key != "money"}
    assert len([*encoder_plan.text(plan | {"passes": [without]})][-1].split()) == 7


def test_a_store_has_the_features_of_all_encoders(monkeypatch):
    """Catches features longer than the input, the pooled vector left out, and int8 of the same
    size.
    """
    found = compared(monkeypatch, tokens=100.0)[1]
    few, many = (row["bytes"] for row in found["rows"])
    t5 = StoreEstimate(800, 100.0, 0, 768, 4096, "bfloat16")
    clip = StoreEstimate(800, 77, 0, 768, 4096, "bfloat16", 768)
    assert few["bfloat16"] == t5.bytes + clip.bytes
    assert 0.5 < many["int8"] / many["bfloat16"] < 0.7
    assert found["once"][0]["tokens"] == 128 and found["once"][1]["tokens"] == 77


def test_bounds_of_gpus_are_labelled(monkeypatch):
    """Catches a bound that reads like an estimate."""
    found = compared(monkeypatch, is_bound=True)[1]
    text = plan_report.text(FITS | {"text_costs": found})
    assert "<10 captions/s" in text and ">500.00 ms more" in text
    assert "ROOFLINE BOUNDS" in text and "neither a bound nor an estimate" in text


def test_encoders_of_the_paper_have_names():
    """Catches an encoder of the paper's ablation that `plan` does not know, or of another size."""
    widths = {
        "bert-base": 768,
        "bert-large": 1024,
        "clip-l14@layer=-2": 768,
        "small": 512,
        "base": 768,
        "large": 1024,
        "xl": 2048,
        "xxl": 4096,
    }
    found = {name: encoder_plan.find_network(name).config.dim for name in widths}
    assert found == widths
    assert all(encoder_plan.known_network(name) is not None for name in widths)
