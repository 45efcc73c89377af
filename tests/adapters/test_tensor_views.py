"""What lies in a safetensors file is what the library would read of it, without a copy."""

from __future__ import annotations

import json

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
    found, expected = tensors_in(memoryview(bytearray(content))), load(content)
    assert found.keys() == expected.keys() == OF_EVERY_SIZE.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_views_lie_in_the_file_itself() -> None:
    content = bytearray(save({"lone": torch.tensor([1, 2], dtype=torch.int8)}))
    found = tensors_in(memoryview(content))["lone"]
    content[-1] = 7
    assert found.tolist() == [1, 7]


def test_numbers_at_odd_places_are_read_where_numbers_may_lie() -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    entries = {
        "is": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
        "values": {"dtype": "F32", "shape": [2, 3], "data_offsets": [3, 27]},
    }
    header = json.dumps(entries).encode().ljust(256)
    content = len(header).to_bytes(8, "little") + header + b"\1\0\1" + values.numpy().tobytes()
    found = tensors_in(memoryview(bytearray(content)))
    assert found["is"].tolist() == [True, False, True]
    assert torch.equal(found["values"], values)
    assert found["values"].data_ptr() % values.itemsize == 0
