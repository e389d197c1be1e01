"""Which GPUs torch finds and how many of them a model needs; ``gpus.ask_need`` starts it."""

from __future__ import annotations

import json
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
    from mini_sglang.backend.parallel.choice import choose_size, refuse_other_models, weight_bytes
    from mini_sglang.backend.parallel.shards import Division
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
        if kind != "native" or settings.engine_fast_decode:
            refuse_other_models(settings)
            return Need(gpus, 1)
        config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
        parameters = check_tensors(checkpoint, config)
        formats = block_formats(checkpoint, expected_tensors(config), settings.quantization)
        division = Division.of(config, checkpoint, formats)
        stored = weight_bytes(checkpoint, parameters, choose_dtype(settings.dtype, device), bool(formats))
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
