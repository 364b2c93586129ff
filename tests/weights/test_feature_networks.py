"""The tensor names of feature networks: which tensors a file may have besides the network's."""

import pytest

from tests.evals.networks import tiny


@pytest.mark.parametrize(
    ("name", "ignored", "refused"),
    [
        (
            "inception",
            ("fc.weight", "fc.bias", "Mixed_5b.branch1x1.bn.num_batches_tracked"),
            ("AuxLogits.fc.weight", "Mixed_5b.branch1x1.conv.bias"),
        ),
        ("dinov2", ("embeddings.mask_token",), ("embeddings.register_tokens", "pooler.weight")),
        (
            "efficientnet_lite",
            ("_fc.weight", "_fc.bias", "_bn0.num_batches_tracked"),
            ("_blocks.0._se_reduce.weight", "_conv_head.bias"),
        ),
    ],
)
def test_tensors_that_are_not_read(name, ignored, refused):
    """Catches an official file that is refused, and a variant of a network (auxiliary head,
    registers, squeeze-and-excitation) that is accepted.
    """
    network, size, name_map = tiny.NETWORKS[name]
    names = name_map(tiny.image_shapes(network, size))
    assert all(names.covers(tensor) for tensor in names.slots)
    assert not any(names.covers(tensor) for tensor in ignored)
    assert all(names.covers(tensor) and tensor not in names.slots for tensor in refused)
