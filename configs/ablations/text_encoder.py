r"""Text encoders of the base model: BERT, CLIP and T5 of each size (section 4.4, D.1).

    python -m launch.sweep --config configs/ablations/text_encoder.py \
        --config.data.path=PREPARED --workdir DIR
    python -m launch.sweep --config configs/ablations/text_encoder.py:tiny \
        --config.data.path=data/encoders --workdir runs/encoders

CPU: the second command runs all 5 arms with `:tiny`, about two minutes for each training with its
evaluation. Expect a table of all arms; after 8 steps its numbers mean nothing. `:demo` trains.

One training for each arm; they differ in the features that they read from one prepared directory.
docs/data.md, "The data of the text-encoder ablation", has the commands that prepare it.
CLIP has the hidden states before its last block, as in the paper. The paper gives no number of
tokens: here 77 for CLIP, its longest text, and 128 for the others. The last arm reads T5-XXL and
CLIP together (eDiff-I: Balaji et al. 2022). The arms of `:demo` and `:tiny` are the embedded T5,
MiniLM, both, both with MiniLM's mean vector, and the embedded T5 with random weights.

Hardware: `:demo` two CPU cores, `:tiny` minutes on a CPU. The 300M model, planned on 64 chips of
TPU v5e: 234 to 236 ms a step for one encoder, 251 ms for T5-XXL and CLIP.
Expect: `:demo` with 1,000 steps and two seeds: held-out losses of 0.0552 (embedded T5), 0.0506
(MiniLM), 0.0703 (random weights), 0.0538 (both), 0.0498 (both, pooled). Not run at full size. The
paper: larger encoders are better; T5-XXL and CLIP are equal on COCO, people prefer T5-XXL on
DrawBench.
Recorded: BENCHMARKS.md, "Text encoders" and "Planned, not run: the arms of the text-encoder
ablation".
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import base_64

# The table of launch.sweep.
COLUMNS = ("retrieval", "loss rise, text shuffled", "loss")
# {arm: (name of the encoder in the prepared data, features per token, tokens)}
PAPER = {
    "t5_xxl": ("t5xxl", 4096, 128),
    "t5_xl": ("t5xl", 2048, 128),
    "t5_large": ("t5large", 1024, 128),
    "t5_base": ("t5base", 768, 128),
    "t5_small": ("t5small", 512, 128),
    "clip": ("clip", 768, 77),
    "bert_large": ("bertlarge", 1024, 128),
    "bert_base": ("bertbase", 768, 128),
}
EMBEDDED = {"t5": ("t5", 256, 32), "minilm": ("minilm", 384, 32), "random": ("random", 256, 32)}
DROP = 0.1  # of each of two encoders alone


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is a variant of base_64.py; "" is the 300M model of the paper's ablation."""
    c = base_64.get_config(arg or "width=192").unlock()
    c.text.update(reads(next(iter(encoders_of(arg).values()))))
    return c.lock()


def encoders_of(arg: str) -> dict[str, tuple[str, int, int]]:
    """The single encoders of a variant."""
    return EMBEDDED if arg in ("demo", "tiny") else PAPER


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """The paper's choice first, or the embedded T5."""
    single = encoders_of(arg)
    for name, encoder in single.items():
        yield {"name": name} | settings(encoder)
    if single is EMBEDDED:
        both = single["t5"], single["minilm"]
        yield {"name": "both"} | settings(*both)
        yield {"name": "both_pooled"} | settings(*both, pooled=(0, 384))
    else:
        yield {"name": "t5_xxl_clip"} | settings(single["t5_xxl"], single["clip"], pooled=(0, 768))


def settings(*encoders: tuple[str, int, int], pooled: Sequence[int] = ()) -> dict[str, Any]:
    """The config fields of an arm that reads these encoders."""
    return {f"config.text.{name}": value for name, value in reads(*encoders, pooled=pooled).items()}


def reads(*encoders: tuple[str, int, int], pooled: Sequence[int] = ()) -> dict[str, Any]:
    """The section `text` of a stage that reads these encoders.

    pooled: widths of their pooled vectors; (): none is read.
    """
    names, dims, lengths = zip(*encoders)
    return dict(
        dim=0,
        encoders=names,
        dims=dims,
        lengths=lengths,
        pooled_dims=tuple(pooled) or (0,) * len(names),
        drops=(DROP if len(names) > 1 else 0.0,) * len(names),
    )
