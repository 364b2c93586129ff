"""Features of many texts in a temporary file."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from imagen_jax.text.feature_file import FeatureFile


def test_several_threads_read_one_file_of_features(tmp_path):
    """Catches a position in the file that threads share."""
    file = FeatureFile(tmp_path, 1000, 2)
    value = lambda i, shape: np.full(shape, i, ml_dtypes.bfloat16)
    for i in range(40):
        file.add(str(i), value(i, (1 + i % 3, 1000)), value(-i, 2))

    def read(i):
        features = file[str(i % 40)]
        return set(np.unique(features.embedding)), set(features.pooled), len(features.embedding)

    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(read, range(2000))):
            assert found == ({i % 40}, {-(i % 40)}, 1 + i % 40 % 3)
