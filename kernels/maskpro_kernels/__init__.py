"""(N:M)-sparse weights: the packed format, the reference, and kernels for it.

>>> pattern = NMPattern.parse("2:4")
>>> weight = pack(dense, pattern)
>>> y = nm_linear(x, weight)
"""

from maskpro_kernels.errors import NativeLibraryError, UnsupportedKernelError
from maskpro_kernels.int8 import to_int8
from maskpro_kernels.masks import MaskFile, MaskFileError, read_masks, write_masks
from maskpro_kernels.ops import nm_linear
from maskpro_kernels.packing import NMWeight, pack, unpack
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.recovery import LowRank, RecoveryFile, RecoveryFileError, read_recovery, recovered, write_recovery

__all__ = [
    "LowRank",
    "MaskFile",
    "MaskFileError",
    "NMPattern",
    "NMWeight",
    "NativeLibraryError",
    "RecoveryFile",
    "RecoveryFileError",
    "UnsupportedKernelError",
    "nm_linear",
    "pack",
    "read_masks",
    "read_recovery",
    "recovered",
    "to_int8",
    "unpack",
    "write_masks",
    "write_recovery",
]
