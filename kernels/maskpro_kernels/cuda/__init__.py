"""Multiplying on a CUDA GPU: sparse tensor cores, and the table that says which way is fastest where.

>>> weight = prepare(weight, torch.bfloat16, most_tokens=8192).weight  # on a GPU, once, when it is loaded
>>> y = nm_linear(x, weight)

Without :func:`prepare` a weight is multiplied as well, but not on the sparse tensor cores: they need metadata of their
own, which is made there.
"""

from maskpro_kernels.cuda.device import Device, device_of
from maskpro_kernels.cuda.dispatch import remember
from maskpro_kernels.cuda.preparation import Prepared, prepare

__all__ = ["Device", "Prepared", "device_of", "prepare", "remember"]
