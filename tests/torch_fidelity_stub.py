"""Imports torch-fidelity without torchvision, which does not run with the CPU build of torch.

torch-fidelity imports torchvision for data sets and transforms that no comparison needs.
"""

import importlib
import sys
import types

import pytest

# {module: the classes that torch-fidelity imports from it}
STUBS = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "STL10"),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": (),
}


def import_torch_fidelity(module: str):
    """A module of torch_fidelity. Skips the test where the package is not installed."""
    pytest.importorskip("torch")
    if "torch_fidelity" in sys.modules:
        return importlib.import_module(f"torch_fidelity.{module}")
    for name, classes in STUBS.items():
        stub = types.ModuleType(name)
        vars(stub).update({missing: type(missing, (), {}) for missing in classes})
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
        sys.modules[name] = stub
    try:
        return pytest.importorskip(f"torch_fidelity.{module}")
    finally:
        # transformers asks whether torchvision is there, and must not find this.
        for name in STUBS:
            del sys.modules[name]
