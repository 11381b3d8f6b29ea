"""(N:M)-sparse weights: the packed format, the reference, and kernels for it.

>>> pattern = NMPattern.parse("2:4")
>>> weight = pack(dense, pattern)
>>> y = nm_linear(x, weight)
"""

from maskpro_kernels.errors import NativeLibraryError, UnsupportedKernelError
from maskpro_kernels.masks import MaskFileError, read_masks, write_masks
from maskpro_kernels.ops import nm_linear
from maskpro_kernels.packing import NMWeight, pack, unpack
from maskpro_kernels.pattern import NMPattern

__all__ = [
    "MaskFileError",
    "NMPattern",
    "NMWeight",
    "NativeLibraryError",
    "UnsupportedKernelError",
    "nm_linear",
    "pack",
    "read_masks",
    "unpack",
    "write_masks",
]
