"""BERT and CLIP's text tower in torch, by transformers, with the weights of `random_encoders`.

Used by the parity tests and by tools/make_text_encoder_goldens.py.
"""

import numpy as np
import torch
import transformers

from imagen_jax.text.bert_network import BertConfig
from imagen_jax.text.clip import CLIPTextConfig
from tests.text.random_encoders import bert_json, clip_json, random_weights


def model(config: BertConfig | CLIPTextConfig, seed: int, **fields):
    """The model of transformers. fields: replace those of its config."""
    weights = {name: torch.tensor(value) for name, value in random_weights(config, seed).items()}
    if isinstance(config, BertConfig):
        made = transformers.BertModel(
            transformers.BertConfig(**bert_json(config) | fields), add_pooling_layer=False
        )
    else:
        ends = {"eos_token_id": config.vocab_size - 1, "bos_token_id": 0, "pad_token_id": 1}
        made = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**clip_json(config) | ends | fields)
        )
    made.load_state_dict(weights)
    return made.eval()


def run(made, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """{"states": of all layers [l+1 b n d], "last": the final features} and, of CLIP, "pooled"."""
    with torch.no_grad():
        out = made(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            output_hidden_states=True,
        )
    states = np.stack([state.numpy() for state in out.hidden_states])
    found = {"states": states, "last": out.last_hidden_state.numpy()}
    return found | ({"pooled": out.text_embeds.numpy()} if "text_embeds" in out else {})
