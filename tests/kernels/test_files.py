"""Files are written whole or not at all, and a safetensors file is what the library itself reads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from maskpro_kernels.files import atomic_file, read_safetensors, write_safetensors

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {str(dtype): torch.arange(-3, 12).reshape(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).view(2, 3).T}
    path = tmp_path / "t.safetensors"
    write_safetensors(path, tensors, {"who": "é", "a": "1"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert read_safetensors(path, "file", ValueError)[0] == {"who": "é", "a": "1"}


def test_equal_content_is_an_equal_file(tmp_path):
    a, b = torch.ones(3), torch.zeros(2, dtype=torch.int8)
    write_safetensors(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    write_safetensors(tmp_path / "2", {"b": b, "a": a}, {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"old")

    def half() -> None:
        with atomic_file(path) as file:
            file.write(b"ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
