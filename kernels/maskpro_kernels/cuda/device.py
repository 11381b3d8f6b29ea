"""What a choice of kernels may depend on of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """A kind of GPU: two of one kind are equal.

    Attributes:
        name: as the driver gives it.
        capability: compute capability.
        processors: streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    processors: int


def device_of(tensor: Tensor) -> Device:
    """The GPU that holds a tensor."""
    return _device(tensor.device.index)


@functools.cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
