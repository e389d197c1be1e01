"""Which GPUs torch finds and how many of them a model needs; ``gpus.ask_need`` starts it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from mini_sglang.backend.gpus import Need
from mini_sglang.config import Settings
from mini_sglang.errors import MiniSglangError


def need(path: Path, settings: Settings) -> Need:
    """Look at the devices here and at the model's header.

    Raises:
        MiniSglangError: as ``load_backend``, where the header alone says so.
    """
    import torch

    from mini_sglang.backend.device import choose_device, choose_dtype
    from mini_sglang.backend.loading.checkpoint import Checkpoint, open_checkpoint
    from mini_sglang.backend.models.config import ModelConfig
    from mini_sglang.backend.models.dummy import open_dummy
    from mini_sglang.backend.models.loader import check_tensors, expected_tensors
    from mini_sglang.backend.models.quantization import block_formats
    from mini_sglang.backend.parallel.choice import Divisible, choose_size, weight_bytes
    from mini_sglang.backend.parallel.shards import Division
    from mini_sglang.backend.transformers_models.division import TransformersDivision
    from mini_sglang.backend.transformers_models.kinds import choose_kind

    device = choose_device(settings.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    checkpoint: Checkpoint
    if settings.load_format == "dummy":
        checkpoint = open_dummy(path, settings, device)
    else:
        checkpoint = open_checkpoint(path, dequantize=settings.gguf_dequantize != "0")
    try:
        kind = choose_kind(path, checkpoint.config, settings.trust_remote_code)
        division: Divisible
        if kind == "native" and not settings.engine_fast_decode:
            config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
            parameters = check_tensors(checkpoint, config)
            formats = block_formats(checkpoint, expected_tensors(config), settings.quantization)
            division, in_blocks = Division.of(config, checkpoint, formats), bool(formats)
        else:
            division = TransformersDivision.of(path, checkpoint.config, settings, device)
            parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
            in_blocks = settings.quantization != "none"
        stored = weight_bytes(checkpoint, parameters, choose_dtype(settings.dtype, device), in_blocks)
        return Need(gpus, choose_size(settings, device, division, stored))
    finally:
        checkpoint.close()


def main() -> int:
    asked = json.load(sys.stdin)
    try:
        found = need(Path(asked["path"]), Settings.resolve(asked["settings"], {}))
        print(json.dumps({"gpus": found.gpus, "size": found.size}))
    except MiniSglangError as error:
        print(json.dumps({"refused": str(error)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
