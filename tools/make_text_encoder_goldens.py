"""Makes the goldens of BERT and of CLIP's text tower from transformers.

    pip install torch==2.13.0 transformers==5.24.0 && python tools/make_text_encoder_goldens.py

Weights and tokens come from a seed (tests/text/random_encoders.py), so only features are stored.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tests.text import torch_encoders
from tests.text.random_encoders import BERTS, CLIPS, GOLDENS, SEED, random_tokens

if __name__ == "__main__":
    arrays = {}
    for case, config in (BERTS | CLIPS).items():
        tokens, mask = random_tokens(config.vocab_size)
        found = torch_encoders.run(torch_encoders.model(config, SEED), tokens, mask)
        arrays |= {f"{case}/{name}": array for name, array in found.items()}
    np.savez_compressed(GOLDENS, **arrays)
