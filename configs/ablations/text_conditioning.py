r"""Text conditioning: attention over tokens, one pooled vector, or no text (section 2.5, D.3.1).

    python -m launch.sweep --config configs/ablations/text_conditioning.py \
        --config.data.path=PREPARED --workdir DIR
    python -m launch.sweep --config configs/ablations/text_conditioning.py:tiny \
        --config.data.path=data/emoji --workdir runs/text

CPU: the second command runs all 4 arms with `:tiny`, about two minutes for each training with its
evaluation. Expect a table of all arms; after 8 steps its numbers mean nothing. `:demo` trains.

One training for each arm. The paper: attention over the sequence is clearly better than a pooled
vector of either kind. The variants are those of base_64.py; without one, the 300M model of the
paper's text ablations.

Hardware: `:demo` two CPU cores, `:tiny` minutes on a CPU; the 300M model was not planned.
Expect: not run yet, so no result or time is known.
Recorded: nowhere yet; launch.sweep writes DIR/sweep.json.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import base_64

# The table of launch.sweep: how well the text steers samples, and what the loss gains by it.
COLUMNS = ("retrieval", "loss rise, text shuffled", "loss")


def get_config(arg: str = "") -> ConfigDict:
    return base_64.get_config(arg or "width=192")


def sweep(arg: str = "") -> Iterator[dict[str, Any]]:
    """The paper's choice first. Pixels attend to one another in every arm."""
    nowhere = (False,) * len(get_config(arg).model.text_attention)
    yield {"name": "tokens"}
    yield {"name": "attention_pooled", "config.model.text_attention": nowhere}
    yield {
        "name": "mean_pooled",
        "config.model.text_attention": nowhere,
        "config.model.pooling": "mean",
    }
    yield {
        "name": "no_text",
        "config.model.text_attention": nowhere,
        "config.model.cond_dim": 0,
        "config.text.dim": 0,
    }
