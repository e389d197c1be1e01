"""transformers in float32, which judges answers. Options: model (a folder or a .gguf file), threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from worker_protocol import serve


class Reference:
    def __init__(self, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options["threads"])
        path = Path(options["model"])
        folder, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float32, **extra).eval()
        # None in generation_config, unlike None as an argument of generate, means that no id ends an answer.
        self.model.generation_config.eos_token_id = None
        self.about = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}

    def answer(self, prompt: list[int], new: int) -> list[int]:
        """Its own greedy ids after a prompt, end-of-text ignored."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            rows = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        answer: list[int] = rows[0, len(prompt) :].tolist()
        return answer

    def judge(self, prompt: list[int], ids: list[int]) -> list[int]:
        """What it would choose at the place of each of ``ids``, given the prompt and the ids before."""
        tokens = torch.tensor([prompt + ids[:-1]])
        with torch.inference_mode():
            logits = self.model(tokens, logits_to_keep=len(ids), use_cache=False).logits
        choices: list[int] = logits.argmax(-1)[0].tolist()
        return choices


if __name__ == "__main__":
    serve(Reference)
