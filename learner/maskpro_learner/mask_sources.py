"""Masks made elsewhere, for ``--init``: those of :mod:`maskpro_kernels.mask_sources`, for the selected layers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_kernels.mask_sources import MaskSource
from maskpro_learner.errors import LearnerError
from maskpro_learner.initial_masks import InitialMasks
from maskpro_learner.layers import select_layers
from maskpro_learner.packed_masks import PackedMasks


def masks_from_source(
    source: MaskSource,
    model: PreTrainedModel,
    pattern: NMPattern,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> InitialMasks:
    """Reads masks for the selected layers of a model; there must be no others.

    Args:
        source: from :func:`maskpro_kernels.mask_sources.open_masks`.
        model: the dense model that the masks are for; not changed.
        pattern: the pattern every mask must obey.
        include: globs of module names.
        exclude: globs of module names to leave dense.

    Raises:
        MaskFileError, CheckpointError: the source cannot be used; names the file, the layer, expected and found.
        LearnerError: it has a mask for a layer that is not selected.
    """
    layers = select_layers(model, pattern, include=include, exclude=exclude)
    linears = {f"{name}.weight": linear for name, linear in layers.linears.items()}
    if others := sorted((source.names or frozenset()) - linears.keys()):
        raise LearnerError(f"{source.path}: {others[0]}: a mask for no selected layer: is it of another model?")
    for name, linear in linears.items():
        source.check(name, (linear.out_features, linear.in_features))
    masks = ((name, source.read(name, linear.weight)) for name, linear in linears.items())
    return InitialMasks(PackedMasks(masks), layers.dense)
