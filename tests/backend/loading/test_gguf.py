"""The GGUF container: against the reader of the gguf package, and against files that lie."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mini_sglang.backend.loading.ggml_types import GGML_TYPES, UNSUPPORTED_TYPE_NAMES
from mini_sglang.backend.loading.gguf import read_gguf
from mini_sglang.errors import ModelLoadError

UINT32, INT32, STRING, ARRAY = 4, 5, 8, 9
F32, Q8_0, IQ4_XS = 0, 8, 23


def packed_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return packed_string(name) + struct.pack("<I", kind) + value


def tensor_entry(name: str, dims: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return (
        packed_string(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def file_bytes(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: bytes = struct.pack("<I", 3),
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = struct.pack(
        "<QQ",
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header = magic + version + counts + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file by the gguf package with every kind of value and every supported tensor type."""
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -100)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -2_000_000_000)
    writer.add_uint64("t.u64", 1 << 63)
    writer.add_int64("t.i64", -(1 << 62))
    writer.add_float32("t.f32", 1e-5)
    writer.add_float64("t.f64", 1e-5)
    writer.add_bool("t.yes", True)
    writer.add_bool("t.no", False)
    writer.add_string("t.text", "añ 🦜 \n")
    writer.add_array("t.strings", ["", "Ġthe", "日本", "a" * 300])
    writer.add_array("t.ints", [-1, 5, 7])
    writer.add_array("t.floats", [0.5, -2.0])
    writer.add_array("t.bools", [True, False, True])
    rng = np.random.default_rng(0)
    for number, kind in GGML_TYPES.items():
        blocks = rng.integers(0, 256, (3, 512 // kind.block_size * kind.block_bytes), dtype=np.uint8)
        writer.add_tensor(f"w.{kind.name}", blocks, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.add_tensor("norm", rng.standard_normal(7).astype(np.float32))
    writer.add_tensor("cube", rng.standard_normal((2, 3, 5)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_the_gguf_package_reads(written: Path, version: int) -> None:
    data = bytearray(written.read_bytes())
    data[4] = version
    written.write_bytes(data)
    reference = gguf.GGUFReader(written)
    file = read_gguf(written)
    expected = {
        name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")
    }
    assert file.version == version
    assert file.metadata == expected
    assert all(type(file.metadata[name]) is type(value) for name, value in expected.items())
    assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        ours = file.tensors[tensor.name]
        assert ours.type.name == tensor.tensor_type.name
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.offset == tensor.data_offset
        assert ours.nbytes == tensor.n_bytes
        assert file.view(tensor.name).tobytes() == tensor.data.tobytes()


def test_type_table_is_that_of_the_gguf_package() -> None:
    for number, kind in GGML_TYPES.items():
        known = gguf.GGMLQuantizationType(number)
        assert (kind.name, (kind.block_size, kind.block_bytes)) == (known.name, gguf.GGML_QUANT_SIZES[known])
    for number, name in UNSUPPORTED_TYPE_NAMES.items():
        assert gguf.GGMLQuantizationType(number).name == name


def test_views_share_the_map_and_outlive_close(written: Path) -> None:
    with read_gguf(written) as file:
        first, second = file.view("norm"), file.view("norm")
        assert np.shares_memory(first, second)
        expected = first.tobytes()
    assert first.tobytes() == expected


def test_own_alignment_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    header = file_bytes(
        [key("general.alignment", UINT32, struct.pack("<I", 128))],
        [tensor_entry("a", (1,), offset=128), tensor_entry("b", (1,), offset=0)],
    )
    data = b"\0" * (-len(header) % 128) + struct.pack("<f124xf", 2.0, 1.0)
    path.write_bytes(header + data)
    file = read_gguf(path)
    assert file.view("b").view(np.float32) == [2.0]
    assert file.view("a").view(np.float32) == [1.0]


ONE = struct.pack("<f", 1.0)
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic alone": (b"GGUF", "incomplete"),
    "foreign magic": (file_bytes([], [], magic=b"PK\3\4"), "is not GGUF"),
    "old version": (file_bytes([], [], version=struct.pack("<I", 1)), "version 1"),
    "new version": (file_bytes([], [], version=struct.pack("<I", 4)), "version 4"),
    "big-endian": (file_bytes([], [], version=struct.pack(">I", 3)), "big-endian"),
    "keys beyond the end": (file_bytes([], [], num_keys=1 << 40), "metadata keys"),
    "tensors beyond the end": (file_bytes([], [], num_tensors=1 << 60), "tensors"),
    "key beyond the end": (file_bytes([struct.pack("<Q", 1000) + bytes(64)], []), "incomplete"),
    "key that is huge": (file_bytes([struct.pack("<Q", 1 << 63) + bytes(64)], []), "above the limit"),
    "key that is not text": (
        file_bytes([packed_string(b"\xff") + struct.pack("<II", UINT32, 1)], []),
        "UTF-8",
    ),
    "key twice": (file_bytes([key("a", INT32, bytes(4))] * 2, []), "occurs twice"),
    "value of an unknown type": (file_bytes([key("a", 13, bytes(8))], []), "unknown type 13"),
    "string value that is huge": (
        file_bytes([key("a", STRING, struct.pack("<Q", 1 << 62))], []),
        "above the limit",
    ),
    "array that is huge": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", UINT32, 1 << 61))], []),
        "more than fit",
    ),
    "array of strings that is huge": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", STRING, 1 << 61))], []),
        "more than fit",
    ),
    "string in an array beyond the end": (
        file_bytes([key("a", ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 63))], []),
        "incomplete",
    ),
    "string in an array that is not text": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", STRING, 1) + packed_string(b"\xc3\x28"))], []),
        "UTF-8",
    ),
    "array of arrays": (
        file_bytes([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))], []),
        "unsupported type 9",
    ),
    "alignment of 0": (
        file_bytes([key("general.alignment", UINT32, bytes(4))], []),
        "power of two",
    ),
    "alignment of 48": (
        file_bytes([key("general.alignment", UINT32, struct.pack("<I", 48))], []),
        "power of two",
    ),
    "alignment that is text": (
        file_bytes([key("general.alignment", STRING, packed_string("x"))], []),
        "power of two",
    ),
    "no dimensions": (file_bytes([], [tensor_entry("w", ())], ONE), "0 dimensions"),
    "five dimensions": (file_bytes([], [tensor_entry("w", (1,) * 5)], ONE), "5 dimensions"),
    "a billion dimensions": (
        file_bytes([], [packed_string("w") + struct.pack("<I", 1 << 30) + bytes(64)], ONE),
        "dimensions",
    ),
    "dimension of 0": (file_bytes([], [tensor_entry("w", (4, 0))], ONE), "impossible shape"),
    "broken block": (file_bytes([], [tensor_entry("w", (33,), Q8_0)], bytes(64)), "impossible shape"),
    "product that wraps in 64 bits": (
        file_bytes([], [tensor_entry("w", (1 << 32, 1 << 32))], ONE),
        "incomplete",
    ),
    "type not supported": (file_bytes([], [tensor_entry("w", (256,), IQ4_XS)], bytes(256)), "IQ4_XS"),
    "type not known": (file_bytes([], [tensor_entry("w", (256,), 999)], bytes(256)), "number 999"),
    "tensor twice": (
        file_bytes([], [tensor_entry("w", (1,)), tensor_entry("w", (1,), offset=32)], bytes(64)),
        "occurs twice",
    ),
    "tensors that overlap": (
        file_bytes([], [tensor_entry("v", (9,)), tensor_entry("w", (1,), offset=32)], bytes(64)),
        "overlap",
    ),
    "offset off the grid": (file_bytes([], [tensor_entry("w", (1,), offset=4)], bytes(64)), "multiple of 32"),
    "offset beyond the end": (
        file_bytes([], [tensor_entry("w", (1,), offset=1 << 63)], bytes(64)),
        "incomplete",
    ),
    "data cut short": (file_bytes([], [tensor_entry("w", (2,))], ONE), "incomplete"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    data, expected = BAD_FILES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError) as caught:
            read_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert expected in str(caught.value)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 600
    assert peak < 1 << 20


def test_the_unsupported_type_names_its_tensor_and_what_is_supported(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD_FILES["type not supported"][0])
    with pytest.raises(ModelLoadError, match=r"'w'.*IQ4_XS.*Q4_K"):
        read_gguf(path)


@pytest.mark.parametrize("name", ["nothing.gguf", "."])
def test_a_path_that_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_gguf(tmp_path / name)


def test_a_file_cut_anywhere_is_refused(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    # The writer pads the last tensor; only that padding may be missing.
    end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(written).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2000, 37), len(whole) // 2, end - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError):
            read_gguf(cut)
    cut.write_bytes(whole[:end])
    assert read_gguf(cut).tensors.keys() == read_gguf(written).tensors.keys()


def test_metadata_needs_neither_torch_nor_numpy(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from mini_sglang.backend.loading.gguf import read_gguf\n"
        "from mini_sglang.backend.loading.gguf_model import hf_config\n"
        "assert read_gguf(Path(sys.argv[1])).metadata['t.i8'] == -100\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    command: list[Any] = [sys.executable, "-c", code, written]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
