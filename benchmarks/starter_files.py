"""The starter model in the other forms that the CPU's table needs, made from its Q4_1 GGUF.

    python benchmarks/starter_files.py FOLDER [--model FILE.gguf]

Writes FOLDER/Q8_0.gguf, every matrix in Q8_0 and all of the rest as it was, and FOLDER/bf16, a Hugging Face
folder of the same weights in bfloat16. Needs transformers and gguf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
from gguf.quants import dequantize, quantize

from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.bench.process import Process
from mini_sglang.config import Settings

Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def write_q8_0(source: Path, target: Path) -> None:
    """The GGUF with its metadata, matrices dequantised and rounded to Q8_0."""
    reader = gguf.GGUFReader(source)
    architecture = "general.architecture"
    writer = gguf.GGUFWriter(target, reader.fields[architecture].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == architecture:
            continue
        kept = field.contents()
        value = int(gguf.LlamaFileType.MOSTLY_Q8_0) if name == "general.file_type" else kept
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if tensor.tensor_type in (Q8_0, F32):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            plain = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(plain, Q8_0), raw_dtype=Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_bf16(source: Path, target: Path) -> None:
    process = Process("dequantize", sys.executable, {"model": str(source)})
    try:
        process.ask(do="write", folder=str(target), dtype="bf16")
    finally:
        process.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="a .gguf file; by default what the engine would take")
    args = parser.parse_args()
    source = resolve_model(Settings.resolve({"model": args.model}), notify=print).path
    args.folder.mkdir(parents=True, exist_ok=True)
    write_q8_0(source, args.folder / "Q8_0.gguf")
    write_bf16(source, args.folder / "bf16")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
