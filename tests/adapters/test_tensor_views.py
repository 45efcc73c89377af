"""What lies in a safetensors file is what the library would read of it, without a copy."""

from __future__ import annotations

import torch
from safetensors.torch import load, save

from timbre_server.adapters.tensor_views import tensors_in

OF_EVERY_SIZE = {
    "half": torch.tensor([[1.5, -2.0, 0.25]], dtype=torch.float16),
    "index": torch.tensor([3, -1]),
    "brain": torch.tensor([1.0, 3e38], dtype=torch.bfloat16),
    "scalar": torch.tensor(7.0),
    "is": torch.tensor([True, False, True]),
    "last": torch.arange(6, dtype=torch.float32).view(3, 2),
}


def test_views_are_what_the_library_reads() -> None:
    content = save(OF_EVERY_SIZE, metadata={"format": "pt"})
    found, expected = tensors_in(bytearray(content)), load(content)
    assert found.keys() == expected.keys() == OF_EVERY_SIZE.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_views_lie_in_the_file_itself() -> None:
    content = bytearray(save({"lone": torch.tensor([1, 2], dtype=torch.int8)}))
    found = tensors_in(content)["lone"]
    content[-1] = 7
    assert found.tolist() == [1, 7]
