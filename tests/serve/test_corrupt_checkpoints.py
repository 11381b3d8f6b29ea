"""Corrupt checkpoints, drawn: each is an error that names what is wrong, or loads exactly what its bytes say.

What the bytes say is read here without any of the project's code or the safetensors library's.
"""

from __future__ import annotations

import json
import struct
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from maskpro_kernels import NMPattern, NMWeight, pack, to_int8
from maskpro_serve import CheckpointError, load_packed
from maskpro_serve.checkpoint import check_checkpoint
from maskpro_serve.inspection import inspect
from maskpro_serve.legacy import LegacyFormat
from maskpro_serve.served import check_served

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
HOSTILE_LENGTHS = [0, 1, 7, 8, 2**20, 100_000_001, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
HOSTILE_NAMES = ["../a.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\0b", CONFIG, "x" * 5000, 7, None]
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8, "I64": torch.int64}


def build(values: str | None, shards: int) -> dict[str, bytes]:
    """A packed folder by file name: two linears of 6 x 16, one dense weight, one norm."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"norm.weight": torch.ones(4), "embed.weight": torch.randn((4, 3), generator=generator).bfloat16()}
    for name in ("a", "b.c"):
        weight = pack(torch.randn((6, 16), generator=generator).bfloat16(), NMPattern(2, 4))
        if values:
            weight = to_int8(weight)
            tensors[f"{name}.weight_scale"] = weight.scale.unsqueeze(1)
        tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"] = weight.values, weight.bitmask
        tensors[f"{name}.shape"] = torch.tensor([[6], [16]])
    names = sorted(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    folder = {file: save({name: tensors[name] for name in held}) for file, held in files.items()}
    folder[INDEX] = json.dumps({"weight_map": {n: file for file, held in files.items() for n in held}}).encode()
    packed = {"quant_method": "maskpro", "format": "nm-bitmask", "format_version": 1, "pattern": "2:4", "ignore": []}
    packed |= {"values": values} if values else {}
    folder[CONFIG] = json.dumps({"model_type": "llama", "quantization_config": packed}).encode()
    return folder


def legacy(shards: int) -> dict[str, bytes]:
    """The same as compressed-tensors wrote it."""
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    return build(None, shards) | {CONFIG: json.dumps({"model_type": "llama", "quantization_config": config}).encode()}


WHOLE = [build(None, 1), build("int8", 1), build(None, 3), build("int8", 2)]
LEGACY = [legacy(1), legacy(3)]


def pick(draw, items):
    return draw(st.sampled_from(sorted(items)))


def weights(folder) -> list[str]:
    return [name for name in folder if name.endswith(".safetensors")]


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flip(draw, folder, name, first, last) -> None:
    """Flips some bits of one file between two places."""
    content = bytearray(folder[name])
    first, last = min(first, len(content)), min(last, len(content))
    if first >= last:
        return
    for _ in range(draw(st.integers(1, 3))):
        content[draw(st.integers(first, last - 1))] ^= 1 << draw(st.integers(0, 7))
    folder[name] = bytes(content)


def flip_in_header(draw, folder):
    name = pick(draw, weights(folder))
    flip(draw, folder, name, 0, header_size(folder[name]))


def flip_in_data(draw, folder):
    name = pick(draw, weights(folder))
    flip(draw, folder, name, header_size(folder[name]), len(folder[name]))


def flip_in_json(draw, folder):
    name = pick(draw, {CONFIG, INDEX} & folder.keys())
    flip(draw, folder, name, 0, len(folder[name]))


def cut_or_lengthen(draw, folder):
    name = pick(draw, folder)
    content = folder[name]
    size = draw(st.integers(0, len(content) + 9))
    folder[name] = content[:size] + b"\0" * (size - len(content))


def hostile_length(draw, folder):
    name = pick(draw, weights(folder))
    length = draw(st.one_of(st.sampled_from(HOSTILE_LENGTHS), st.integers(0, 2**64 - 1)))
    folder[name] = struct.pack("<Q", length) + folder[name][8:]


def hostile_json(draw, folder):
    name = pick(draw, {CONFIG, INDEX} & folder.keys())
    texts = ["", "null", "[]", "3", '"x"', "{", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff"]
    folder[name] = draw(st.sampled_from(texts)).encode("latin-1")


def missing_file(draw, folder):
    del folder[pick(draw, folder)]


def edit_header(draw, folder):
    """Another dtype, shape, place or name in a header, or an entry less."""
    name = pick(draw, weights(folder))
    content = folder[name]
    try:
        header = json.loads(content[8 : header_size(content)])
        key = pick(draw, header)
        entry = header[key]
        match draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone", "extra"])):
            case "dtype":
                names = ["BF16", "F16", "F32", "F64", "U8", "I8", "I64", "BOOL", "F8_E4M3", "X"]
                entry["dtype"] = draw(st.sampled_from(names))
            case "shape":
                entry["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 6, 8, 16, -1, 2**40, 2**64]), max_size=3))
            case "data_offsets":
                places = st.sampled_from([0, 8, 16, 48, 96, 2**62, -8])
                entry["data_offsets"] = [draw(places), draw(places)]
            case "name":
                names = ["a.weight", "a.bitmask", "lm_head.compressed", "b.c.shape", ""]
                header[draw(st.sampled_from(names))] = header.pop(key)
            case "gone":
                del header[key]
            case "extra":
                header["extra"] = entry
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # what there was is no header any more
    text = json.dumps(header).encode()
    folder[name] = struct.pack("<Q", len(text)) + text + content[header_size(content) :]


def edit_tensors(draw, folder):
    """A well-formed file of wrong tensors."""
    name = pick(draw, weights(folder))
    try:
        tensors = load(folder[name])
    except Exception:
        return
    if not tensors:
        return
    key = pick(draw, tensors)
    tensor = tensors[key]
    match draw(st.sampled_from(["dtype", "shape", "missing", "extra", "twin", "nan", "fuller", "emptier", "zero"])):
        case "dtype":
            tensors[key] = tensor.to(draw(st.sampled_from(list(DTYPES.values()))))
        case "shape":
            tensors[key] = tensor.flatten() if draw(st.booleans()) else tensor[:-1].contiguous()
        case "missing":
            del tensors[key]
        case "extra":
            tensors[draw(st.sampled_from(["extra", "a.weight", "z.compressed", "a.weight_scale"]))] = torch.ones(6, 1)
        case "twin":
            tensors[draw(st.sampled_from(["a.compressed", "b.c.bitmask", "norm.weight"]))] = tensor.clone()
        case "nan" if tensor.is_floating_point():
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf]))
        case "fuller" if tensor.dtype == torch.uint8:
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] |= draw(st.integers(0, 255))
        case "emptier" if tensor.dtype == torch.uint8:
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] &= draw(st.integers(0, 255))
        case "zero":
            tensor.zero_()
    folder[name] = save(tensors)


def edit_index(draw, folder):
    """An index that names other files, other tensors, or fewer."""
    try:
        index = json.loads(folder[INDEX])
        listed = index["weight_map"]
        key = pick(draw, listed)
        match draw(st.sampled_from(["file", "other", "gone", "more"])):
            case "file":
                listed[key] = draw(st.sampled_from(HOSTILE_NAMES))
            case "other":
                listed[key] = pick(draw, weights(folder))
            case "gone":
                del listed[key]
            case "more":
                listed["more"] = listed[key]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return
    folder[INDEX] = json.dumps(index).encode()


def edit_format(draw, folder):
    """Another quantization_config."""
    try:
        config = json.loads(folder[CONFIG])
        key = draw(st.sampled_from(["pattern", "format_version", "values", "ignore", "quant_method", "format"]))
        wrong = ["1:4", "3:4", "4:8", "2:4", "0:4", 1, 2, None, "int8", ["a"], [3], {}, "maskpro"]
        config["quantization_config"][key] = draw(st.sampled_from(wrong))
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    folder[CONFIG] = json.dumps(config).encode()


DAMAGES = [
    flip_in_header, flip_in_data, flip_in_json, cut_or_lengthen, hostile_length, hostile_json, missing_file,
    edit_header, edit_tensors, edit_index, edit_format, flip_in_data, flip_in_data,
]  # fmt: skip


@st.composite
def corrupt(draw, whole) -> dict[str, bytes]:
    folder = dict(draw(st.sampled_from(whole)))
    for damage in draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=2)):
        if weights(folder) and {CONFIG, INDEX} & folder.keys():
            damage(draw, folder)
    return folder


def stored(folder: dict[str, bytes]) -> dict[str, tuple[str, list[int], bytes]]:
    """What the files of the index say: name to dtype, shape, bytes."""
    files = ["model.safetensors"]
    if INDEX in folder:
        files = sorted(set(json.loads(folder[INDEX])["weight_map"].values()))
    found = {}
    for file in files:
        content = folder[file]
        start = header_size(content)
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert name not in found
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], content[start + begin : start + end]
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def says(folder: dict[str, bytes], weights_: dict[str, torch.Tensor | NMWeight]) -> None:
    """Fails unless the weights are exactly those that the bytes say, and valid."""
    found, packed = stored(folder), json.loads(folder[CONFIG])["quantization_config"]
    n, m = map(int, packed["pattern"].split(":"))
    for name, weight in weights_.items():
        if not isinstance(weight, NMWeight):
            dtype, shape, content = found.pop(name)
            assert (list(weight.shape), raw(weight)) == (shape, content)
            assert weight.dtype == DTYPES.get(dtype, weight.dtype)
            continue
        prefix = name.removesuffix(".weight")
        values, bits, shape = (found.pop(f"{prefix}.{part}") for part in ("compressed", "bitmask", "shape"))
        assert struct.unpack("<2q", shape[2]) == weight.shape
        assert (raw(weight.values), raw(weight.bitmask)) == (values[2], bits[2])
        rows, columns = weight.shape
        assert weight.values.shape == (rows, columns // m * n)
        for row in range(rows):
            width = (columns + 7) // 8
            mask = int.from_bytes(bits[2][row * width : (row + 1) * width], "little")
            assert mask >> columns == 0
            assert all((mask >> at & (1 << m) - 1).bit_count() == n for at in range(0, columns, m))
        if weight.scale is not None:
            dtype, shape, content = found.pop(f"{prefix}.weight_scale")
            assert torch.equal(weight.scale, torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).float())
            assert torch.isfinite(weight.scale).all()
    assert not found
    if INDEX in folder:
        listed = json.loads(folder[INDEX])["weight_map"]
        assert listed.keys() == stored(folder).keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("corrupt") / "model"


def put(place, folder: dict[str, bytes]) -> None:
    place.mkdir(exist_ok=True)
    for path in place.iterdir():
        path.unlink()
    for name, content in folder.items():
        (place / name).write_bytes(content)


@settings(max_examples=2000, deadline=5000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(folder=corrupt(WHOLE))
def test_an_error_or_exactly_the_bytes(place, folder):
    put(place, folder)
    try:
        _, found = load_packed(place)
    except CheckpointError as error:
        event("refused")
        message = str(error)
        assert message.startswith(str(place)), message
        assert "\n" not in message
    else:
        event("loaded")
        says(folder, found)
        check_checkpoint(place, contents=True)


@settings(max_examples=500, deadline=5000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(folder=corrupt(LEGACY))
def test_legacy_ones_are_an_error_or_whole(place, folder):
    put(place, folder)
    for read in (inspect, partial(check_served, contents=True)):
        try:
            found = read(place)
        except CheckpointError as error:
            event(f"{read} refused")
            message = str(error)
            assert message.startswith(str(place)), message
            assert "\n" not in message
            found = None
    if isinstance(found, LegacyFormat):
        event("whole")
        tensors = stored(folder)
        for name, (_, shape, content) in tensors.items():
            if name.endswith(".bitmask"):
                assert tensors[name.replace("bitmask", "compressed")][1] == [shape[0], 4 * shape[1]]
                assert all((byte & 15).bit_count() == (byte >> 4).bit_count() == 2 for byte in content)


@pytest.mark.parametrize("folder", LEGACY)
def test_the_whole_legacy_ones_are(place, folder):
    put(place, folder)
    assert isinstance(check_served(place, contents=True), LegacyFormat)
    assert len(inspect(place).layers) == 2


@pytest.mark.parametrize("folder", WHOLE)
def test_the_whole_ones_load(place, folder):
    put(place, folder)
    says(folder, load_packed(place)[1])
