"""BERT in the Hugging Face layout: config.json, tensor names, the tokenizer.

A file of BertModel and one of BertForPreTraining serve; heads and pooler are not read.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from imagen_jax.storage import read_json
from imagen_jax.text import tokenizer as tokenizers
from imagen_jax.text.bert_network import Bert, BertConfig
from imagen_jax.text.program import parameter_shapes
from imagen_jax.weights.name_map import NameMap, map_tree, tensor_name

TOKENIZERS = {"tokenizer.json": "PreTrainedTokenizerFast", "vocab.txt": "BertTokenizer"}
CASE = "do_lower_case"
UNKNOWN = "[UNK]"
PREFIX = "bert."  # of all tensors, in files of BertForPreTraining and the like
PARTS = ("embeddings.", "encoder.")
# The names that TensorFlow's layer norm has, in files of 2018.
OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
EMBEDDINGS = {
    "token_embedding": "embeddings.word_embeddings.weight",
    "position_embedding": "embeddings.position_embeddings.weight",
    "type_embedding": "embeddings.token_type_embeddings.weight",
    "embedding_norm/scale": "embeddings.LayerNorm.weight",
    "embedding_norm/bias": "embeddings.LayerNorm.bias",
}
BLOCK = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def is_bert(config: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json describes a BERT; without model_type, its fields decide."""
    if "model_type" in config:
        return config["model_type"] == "bert"
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0]).startswith("Bert")
    return "type_vocab_size" in config


def name_map(config: BertConfig) -> NameMap:
    """The map from Hugging Face tensor names to the parameters of Bert."""
    rename = lambda path: tensor_name(path, EMBEDDINGS, "encoder.layer", BLOCK)

    def covers(name: str) -> bool:
        """Older files also store `position_ids`, which are 0, 1, 2 ..."""
        part = name.removeprefix(PREFIX)
        return part.startswith(PARTS) and not part.endswith("position_ids")

    names = map_tree(parameter_shapes(Bert(config), "float32"), rename, covers)
    aliases = {}
    for name in names.slots:
        ending = next((new for new in OLD if name.endswith(new)), None)
        older = [name.removesuffix(ending) + OLD[ending]] if ending else []
        aliases |= dict.fromkeys([PREFIX + name, *older, *(PREFIX + old for old in older)], name)
    return NameMap(names.slots, covers, aliases)


def load_tokenizer(directory: pathlib.Path) -> tuple[Any, str]:
    """(tokenizer of a directory, SHA-256 of its file).

    tokenizer.json says whether texts are put in lower case. For vocab.txt tokenizer_config.json
    says it; where that does not, a vocabulary without capital letters decides. (transformers would
    put them in lower case, so that a cased BERT reads other words.)

    Raises:
        FileNotFoundError: the directory has none.
        ValueError: it cannot be read, or does not put each text between a start and an end token.
    """
    tokenizer, file, sha256 = tokenizers.load_tokenizer(directory, TOKENIZERS, _case)
    tokenizers.set_end_token(tokenizer, file, "BERT")
    if UNKNOWN in tokenizer.get_vocab():
        tokenizer.unk_token = UNKNOWN
    return tokenizer, sha256


def _case(file: pathlib.Path) -> dict[str, bool]:
    """{CASE: whether vocab.txt is of lower case} where no other file says it."""
    settings = file.with_name("tokenizer_config.json")
    stated = read_json(settings) if settings.is_file() else {}
    if file.suffix != ".txt" or (isinstance(stated, dict) and CASE in stated):
        return {}
    try:
        pieces = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): download it again") from error
    words = [piece for piece in pieces if not re.fullmatch(r"\[.*\]", piece)]
    return {CASE: all(word == word.lower() for word in words)}
