"""PEFT's side: prompt tuning of transformers' T5 as PEFT's own guides do it, in eager PyTorch or with `torch.compile`."""

import json
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model

from benchmarks.settings import Settings
from benchmarks.worker import Clock, private_output, serve, use_cores

IGNORED = -100  # a label that cross-entropy leaves out


class Peft:
    """See `worker.Side`."""

    def __init__(self, settings: Settings, folder: Path, compiled: bool):
        torch.set_num_threads(settings.threads)
        self.settings, self.compiled = settings, compiled
        self.device = torch.device("cuda" if settings.device == "gpu" else "cpu")
        model = transformers.T5ForConditionalGeneration.from_pretrained(
            folder / "model", dtype=getattr(torch, settings.dtype), attn_implementation=settings.attention, dropout_rate=0.0
        )
        model.config.use_cache = False  # keys and values that training would keep for nothing; `decode` asks for them
        config = PromptTuningConfig(
            task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=settings.prompt, num_transformer_submodules=1
        )
        self.model = get_peft_model(model, config).to(self.device).train()
        [(_, prompt)] = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        with torch.no_grad():
            prompt.copy_(torch.from_numpy(np.load(folder / "prompt.npy")))
        self.optimizer = torch.optim.AdamW([prompt], lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.forward = torch.compile(self.model) if compiled else self.model

    def losses(self, batch: str, steps: int) -> list[float]:
        [arrays] = _load([batch])
        return [float(self._step(arrays)) for _ in range(steps)]

    def train(self, batches: list[str]) -> list[float]:
        loaded = _load(batches)
        self.model.train()
        self._step(loaded[0])
        self._wait()
        clock = Clock()
        for arrays in loaded:
            self._step(arrays)
        self._wait()
        return clock.read()

    def decode(self, batches: list[str]) -> list[float]:
        loaded = _load(batches)
        self._decode(loaded[0])
        self._wait()
        clock = Clock()
        for arrays in loaded:
            self._decode(arrays)
        self._wait()
        return clock.read()

    def decoded(self, batch: str) -> list[list[int]]:
        return self._decode(_load([batch])[0])[:, 1:].tolist()  # without the token that decoding starts with

    def about(self) -> dict[str, Any]:
        modules = {"peft": peft, "transformers": transformers, "torch": torch, "numpy": np}
        on_gpu = self.device.type == "cuda"
        return {
            "versions": {"python": platform.python_version(), **{name: module.__version__ for name, module in modules.items()}},
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "attention": self.model.base_model.config._attn_implementation,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "environment": {name: os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "GLIBC_TUNABLES")},
        }

    def _step(self, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        placed = {name: array.to(self.device) for name, array in arrays.items()}
        loss = self.forward(**placed).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.inference_mode()
    def _decode(self, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        self.model.eval()
        placed = {name: arrays[name].to(self.device) for name in ("input_ids", "attention_mask")}
        length = self.settings.targets
        # transformers compiles decoding by itself where the cache's shapes are fixed and the device is a GPU.
        cache = {"cache_implementation": "static"} if self.compiled else {}
        return self.model.generate(
            **placed, max_new_tokens=length, num_beams=1, do_sample=False, use_cache=True, decoder_start_token_id=0, **cache
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _load(batches: list[str]) -> list[dict[str, torch.Tensor]]:
    """Tensors of the names that transformers' T5 knows; it shifts the labels itself."""
    loaded = []
    for path in batches:
        arrays = np.load(path)
        tokens, targets = (torch.from_numpy(arrays[name]).long() for name in ("encoder_tokens", "decoder_target_tokens"))
        labels = targets.masked_fill(torch.from_numpy(arrays["loss_weights"]) == 0, IGNORED)
        loaded.append({"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels})
    return loaded


def main() -> None:
    answers = private_output()
    settings = Settings(**json.loads(sys.argv[1]))
    if settings.device == "cpu":
        use_cores(settings.threads)
    side = Peft(settings, Path(sys.argv[2]), compiled=sys.argv[3] == "compile")
    print("{}", file=answers, flush=True)
    serve(side, answers)


if __name__ == "__main__":
    main()
