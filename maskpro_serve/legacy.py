"""Reads what compressed-tensors says of a 2:4 checkpoint: its ``sparsity_config`` and its ``config_groups``.

Two forms are served as they are: ``sparse-24-bitmask``, whose tensors are those of FORMAT.md, and ``dense``, whose
tensors are dense ones with zeros. Either may hold int8 or fp8 values (W8A8). compressed-tensors wrote the first until
its release 0.13; vLLM served it until 0.18.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from maskpro_kernels import NMPattern
from maskpro_serve.checkpoint import CheckpointError
from maskpro_serve.scheme import LinearScheme

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
BITMASK, DENSE = "sparse-24-bitmask", "dense"

_UNREADABLE = {"kv_cache_scheme": "a quantized KV cache", "transform_config": "transformed weights"}

_LINEAR_CLASSES = ("Linear", "Module")
"""Names of a torch.nn.Linear's classes: a target that is one of them is every linear layer."""

_QUANTIZED_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
"""Those that store a weight as int8 or fp8 numbers of its own shape; others pack several into an integer."""

_VALUES = {"int": torch.int8, "float": torch.float8_e4m3fn}


@dataclass(frozen=True)
class LegacyFormat:
    """What compressed-tensors' configuration of a 2:4 checkpoint says.

    Attributes:
        compressed: sparse layers are stored as ``compressed``, ``bitmask``, ``shape``; else dense with zeros.
        targets: names, ``re:`` patterns or class names of the layers that are sparse.
        ignore: those that are not.
        groups: targets of quantized layers, and how they are.
        unquantized: what the groups leave out.
    """

    compressed: bool
    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    groups: tuple[tuple[tuple[str, ...], LinearScheme], ...] = ()
    unquantized: tuple[str, ...] = ()
    pattern: ClassVar[NMPattern] = NMPattern(2, 4)

    def scheme(self, name: str) -> LinearScheme | None:
        """How the linear of this checkpoint name is stored; None for a dense weight in the model's own dtype."""
        sparse = _matches(name, self.targets) and not _matches(name, self.ignore)
        quantized = None if _matches(name, self.unquantized) else self._quantized(name)
        if quantized is None:
            return LinearScheme(self.compressed) if sparse else None
        return replace(quantized, compressed=sparse and self.compressed)

    def _quantized(self, name: str) -> LinearScheme | None:
        """The group of a layer: one that has its name, else one with a pattern of it, else one of its class."""
        for kind in (_is_name, _is_pattern, _is_class):
            for targets, scheme in self.groups:
                if any(kind(name, target) for target in targets):
                    return scheme
        return None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> LegacyFormat:
        """Parses a ``quantization_config``.

        Args:
            config: of config.json; :func:`has_sparsity` is true of it.
            where: the file, for messages.

        Raises:
            CheckpointError: something in it is wrong, or is nothing we can serve; one sentence.
        """
        sparsity = config["sparsity_config"]
        here = f"{where}: sparsity_config"
        kind, structure = sparsity.get("format"), sparsity.get("sparsity_structure")
        if kind not in (BITMASK, DENSE):
            raise CheckpointError(f"{here}: format: expected {BITMASK!r} or {DENSE!r}, found {kind!r}")
        if structure != "2:4":
            raise CheckpointError(f"{here}: sparsity_structure: expected '2:4', found {structure!r}")
        for key, what in _UNREADABLE.items():
            if config.get(key):
                raise CheckpointError(f"{where}: {key}: {what} cannot be served with 2:4 weights, expected none")
        targets = sparsity.get("targets")
        return cls(
            compressed=kind == BITMASK,
            targets=_LINEAR_CLASSES[:1] if targets is None else _names(targets, f"{here}: targets"),
            ignore=_names(sparsity.get("ignore"), f"{here}: ignore"),
            groups=_groups(config, where),
            unquantized=_names(config.get("ignore"), f"{where}: ignore"),
        )


def find_quantization(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The key of config.json that says how weights are stored, and what it says; compressed-tensors has used two."""
    return next(((key, config[key]) for key in QUANTIZATION_KEYS if config.get(key)), None)


def sparsity_of(quantization: Any) -> Mapping[str, Any] | None:
    """The ``sparsity_config`` of a compressed-tensors configuration; None where there is none, or it is another's."""
    if not isinstance(quantization, Mapping):
        return None
    # The first compressed-tensors wrote no quant_method, of which vLLM makes ""; nobody else writes a sparsity_config.
    if str(quantization.get("quant_method") or "compressed-tensors").lower().replace("_", "-") != "compressed-tensors":
        return None
    sparsity = quantization.get("sparsity_config")
    return sparsity if isinstance(sparsity, Mapping) else None


def has_sparsity(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is one of compressed-tensors that speaks of 2:4 sparsity."""
    sparsity = sparsity_of(config)
    return sparsity is not None and (sparsity.get("format") == BITMASK or sparsity.get("sparsity_structure") == "2:4")


def pattern_of_zeros(quantization: Any, where: str) -> NMPattern | None:
    """The N:M that a ``sparsity_config`` of format ``dense`` says plain, unquantized tensors satisfy, if it says one.

    Args:
        quantization: what :func:`find_quantization` found.
        where: the file and key, for messages.

    Raises:
        CheckpointError: any other configuration.
    """
    sparsity = sparsity_of(quantization)
    if sparsity is None or sparsity.get("format") != DENSE:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        found = "" if sparsity is None else f" with a sparsity_config of format {sparsity.get('format')!r}"
        raise CheckpointError(
            f"{where}: expected none, or a sparsity_config of format {DENSE!r} (a dense model), found {method!r}{found}"
        )
    for key in ("config_groups", *_UNREADABLE):
        if quantization.get(key):
            raise CheckpointError(f"{where}: {key}: expected none, the weights are quantized")
    try:
        return NMPattern.parse(sparsity.get("sparsity_structure", ""))
    except ValueError:  # "unstructured" and "0:0" are others
        return None


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is ours: to serve, or to refuse as nobody else can read it.

    A dense checkpoint that we cannot serve sparse (int4 values, or no layer named) is not: whoever reads its
    quantization may.
    """
    if not has_sparsity(config):
        return False
    if config["sparsity_config"].get("format") != DENSE:
        return True
    try:
        return bool(LegacyFormat.from_dict(config, where="quantization_config").targets)
    except CheckpointError:
        return False


def _groups(config: Mapping[str, Any], where: str) -> tuple[tuple[tuple[str, ...], LinearScheme], ...]:
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"{where}: config_groups: expected an object, found {type(groups).__name__}")
    found = []
    for name, group in groups.items():
        here = f"{where}: config_groups: {name}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{here}: expected an object, found {type(group).__name__}")
        kind = group.get("format") or config.get("format")
        if kind not in _QUANTIZED_FORMATS:
            raise CheckpointError(f"{here}: format: expected one of {', '.join(_QUANTIZED_FORMATS)}, found {kind!r}")
        found.append((_names(group.get("targets"), f"{here}: targets"), _quantization(group, here)))
    return tuple(found)


def _quantization(group: Mapping[str, Any], where: str) -> LinearScheme:
    """The scheme of one group's layers; activations with zero points, or unlike the weights, are never rounded."""
    if group.get("output_activations"):
        raise CheckpointError(f"{where}: output_activations: expected none, quantized outputs cannot be served")
    weights, inputs = group.get("weights") or {"num_bits": None}, group.get("input_activations")
    strategy = _eight_bits(weights, f"{where}: weights", ("channel", "tensor"))
    if weights.get("dynamic") or not weights.get("symmetric", True):
        raise CheckpointError(f"{where}: weights: expected symmetric values with stored scales and no zero points")
    values = _VALUES[weights.get("type", "int")]
    if not inputs:
        return LinearScheme(False, values, strategy)
    _eight_bits(inputs, f"{where}: input_activations", ("token", "tensor"))
    static, symmetric = not inputs.get("dynamic"), inputs.get("symmetric", True)
    rounded = values if symmetric and _VALUES[inputs.get("type", "int")] == values else None
    return LinearScheme(False, values, strategy, static, static and not symmetric, rounded)


def _eight_bits(arguments: Any, where: str, strategies: tuple[str, ...]) -> str:
    """Checks one set of compressed-tensors' QuantizationArgs; its strategy, which may be left to the group size."""
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"{where}: expected an object, found {arguments!r}")
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    if bits != 8 or kind not in tuple(_VALUES):
        raise CheckpointError(f"{where}: expected int or float of 8 bits, found {kind} of {bits}")
    size = arguments.get("group_size")
    strategy = arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in strategies:
        raise CheckpointError(f"{where}: strategy: expected {' or '.join(strategies)}, found {strategy!r}")
    return str(strategy)


def _names(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{where}: expected a list of names, found {value!r}")
    for name in value:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise CheckpointError(f"{where}: {name!r} is no regular expression: {error}") from error
    return tuple(value)


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return any(kind(name, target) for target in targets for kind in (_is_name, _is_pattern, _is_class))


def _is_name(name: str, target: str) -> bool:
    return target == name


def _is_pattern(name: str, target: str) -> bool:
    """As compressed-tensors has it: from the beginning of the name, not necessarily to its end."""
    return target.startswith("re:") and re.match(target[3:], name) is not None


def _is_class(name: str, target: str) -> bool:
    return target in _LINEAR_CLASSES
