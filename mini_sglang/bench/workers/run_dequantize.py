"""A GGUF's weights as a Hugging Face folder, made by transformers' own reader. Options: model (a .gguf file).

Needs the package gguf beside transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from worker_protocol import serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Dequantizer:
    def __init__(self, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.path = Path(options["model"])
        self.about = {"versions": {"transformers": transformers.__version__}}

    def write(self, folder: str, dtype: str) -> None:
        place: dict[str, Any] = {"gguf_file": self.path.name}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            self.path.parent, dtype=torch.float32, **place
        )
        config = loaded.config.to_dict()
        # What came from quantised blocks counts as quantised, and is not saved.
        config.pop("quantization_config", None)
        model: Any = type(loaded)(type(loaded.config)(**config))
        model.load_state_dict(loaded.state_dict())
        model.to(DTYPES[dtype]).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(self.path.parent, **place).save_pretrained(folder)


if __name__ == "__main__":
    serve(Dequantizer)
