"""The records of captions: text, token features and pooled vector, as TFDS examples."""

import dataclasses
import functools

import numpy as np
from jaxtyping import BFloat16

from imagen_jax.data.quantization import dequantize, quantize
from imagen_jax.text_inputs import TextFeatures


@dataclasses.dataclass(frozen=True)
class CaptionRow:
    """One distinct caption: text and token features [length d] bfloat16, unpadded.

    embedding: None in a store of texts alone.
    """

    text: str
    embedding: BFloat16[np.ndarray, "length d"] | None = None


@functools.cache
def caption_features(dim: int, embedding: str = "bfloat16", text: bool = True, pooled_dim: int = 0):
    """The TFDS features of a store of captions.

    dim: width of the token features; 0 for none. embedding: their dtype. text: whether the texts
    are in the store. pooled_dim: width of the pooled vector; 0 for none.
    """
    import ml_dtypes
    import tensorflow_datasets as tfds

    tensor = functools.partial(tfds.features.Tensor, encoding="bytes")
    features = {"text": tfds.features.Text()} if text else {}
    if dim:
        dtype = np.dtype(embedding).type
        features |= {"embedding": tensor(shape=(None, dim), dtype=dtype), "length": np.int32}
        if embedding == "int8":
            features["scale"] = tensor(shape=(None,), dtype=np.float32)
    if pooled_dim:
        features["pooled"] = tensor(shape=(pooled_dim,), dtype=ml_dtypes.bfloat16)
    return tfds.features.FeaturesDict(features)


def serialize_caption(row: CaptionRow, embedding: str = "bfloat16") -> bytes:
    """Returns the record of a caption, with features of dtype `embedding` if it has any."""
    example, dim = {"text": row.text}, 0
    if row.embedding is not None:
        dim = row.embedding.shape[1]
        example |= _stored(row.embedding, embedding)
    return canonical(caption_features(dim, embedding).serialize_example(example))


def serialize_features(row: TextFeatures, embedding: str = "bfloat16") -> bytes:
    """Returns the record of features without the text; `embedding` is their stored dtype."""
    example, dim, pooled_dim = _stored(row.embedding, embedding), row.embedding.shape[1], 0
    if row.pooled is not None:
        example["pooled"], pooled_dim = row.pooled, len(row.pooled)
    features = caption_features(dim, embedding, False, pooled_dim)
    return canonical(features.serialize_example(example))


def _stored(features: BFloat16[np.ndarray, "length d"], embedding: str) -> dict:
    if embedding == "int8":
        q, scale = quantize(features)
        return {"embedding": q, "scale": scale, "length": len(features)}
    return {"embedding": features, "length": len(features)}


def parse_caption(record: bytes, dim: int, embedding: str = "bfloat16") -> CaptionRow:
    """Inverse of `serialize_caption`; dim 0 for a record without features."""
    example = caption_features(dim, embedding).deserialize_example_np(record)
    text = example["text"].decode()
    return CaptionRow(text, _read(example, embedding)) if dim else CaptionRow(text)


def parse_text(record: bytes) -> str:
    """The text of a record of `serialize_caption`, whatever its features."""
    return caption_features(0).deserialize_example_np(record)["text"].decode()


def parse_features(
    record: bytes, dim: int, embedding: str = "bfloat16", pooled_dim: int = 0
) -> TextFeatures:
    """Inverse of `serialize_features`; it also reads the features of `serialize_caption`."""
    features = caption_features(dim, embedding, False, pooled_dim)
    example = features.deserialize_example_np(record)
    return TextFeatures(_read(example, embedding), example.get("pooled"))


def _read(example: dict, embedding: str) -> BFloat16[np.ndarray, "length d"]:
    features = example["embedding"]
    return dequantize(features, example["scale"]) if embedding == "int8" else features


def canonical(example: bytes) -> bytes:
    """A serialised tf.Example with sorted features; protobuf's order differs between processes."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)
