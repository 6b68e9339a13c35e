"""What all tests share: no network, the short training budget, one thread of the CPU, no GPU test without a GPU."""

import os

import pytest

# Set before torch or transformers is imported; the kernels that nbval starts inherit them.
os.environ.setdefault("LDM_EDU_BUDGET", "check")
os.environ.setdefault("LDM_EDU_DEVICE", "cpu")  # test_gpu.py takes it away
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device, and say so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here"))
