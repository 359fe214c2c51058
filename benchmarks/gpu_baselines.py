"""Other programs on the layers of benchmarks/gpu.py: accelerate's CPU offload of transformers' model, kt-kernel."""

from __future__ import annotations

import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

KT_LIMIT_S = 180
"""It takes about 20 seconds on 16 cores."""


def accelerate_offload(config: dict[str, Any], vram: int, steps: int, device: str) -> dict[str, Any]:
    """transformers' DeepseekV3 in bf16, what exceeds `vram` bytes offloaded to RAM by accelerate."""
    import psutil
    from accelerate import cpu_offload, dispatch_model, infer_auto_device_map, init_empty_weights
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = {key: value for key, value in config.items() if key != "model_type"}
    hf = DeepseekV3Config(**settings, rope_scaling=None)
    with init_empty_weights():
        model = DeepseekV3ForCausalLM(hf).to(torch.bfloat16)
    need = sum(parameter.nbytes for parameter in model.parameters())
    name = "accelerate CPU offload, transformers bf16"
    available = psutil.virtual_memory().available
    if need > 0.9 * available:
        return {"baseline": name, "not_run": f"needs {need} bytes of RAM, {available} are available"}
    model.to_empty(device="cpu")
    sample = (torch.randn(1_000_003) * 0.02).to(torch.bfloat16)  # drawing tens of billions would take minutes
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for part in flat.split(sample.numel()):
                part.copy_(sample[: part.numel()])
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("inv_freq"):
                dim = buffer.numel() * 2
                buffer.copy_(10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim))
            else:
                buffer.zero_()
    model.eval()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)  # its map is made for `vram`; the row says what it took
        torch.cuda.reset_peak_memory_stats()
        memory: dict[int | str, int | str] = {0: vram, "cpu": available}
        split = infer_auto_device_map(model, memory, no_split_module_classes=["DeepseekV3DecoderLayer"])
        if set(split.values()) == {"cpu"}:  # not one layer fits beside room for the largest: every module comes in turn
            model = cpu_offload(model, execution_device=torch.device(device))
        else:
            model = dispatch_model(model, split, main_device=0)
    ids = torch.ones(1, 1, dtype=torch.long, device=device)
    times = []
    with torch.no_grad():
        for _ in range(1 + min(steps, 3)):  # every step copies tens of gigabytes
            begun = time.perf_counter()
            model(ids, use_cache=False).logits.float().cpu()
            times.append(time.perf_counter() - begun)
    peak = 0 if device == "cpu" else torch.cuda.max_memory_reserved()
    return {"baseline": name, "step_s": statistics.median(times[1:]), "model_bytes": need, "peak_vram_bytes": peak}


def kt_kernel(config: dict[str, Any], vram: int, steps: int, device: str) -> dict[str, Any]:
    """KTransformers' CPU expert kernels beside ours on the same CPU, if they are installed here (kt_experts.py)."""
    name = "kt-kernel"
    if importlib.util.find_spec("kt_kernel") is None:
        return {"baseline": name, "not_run": "the package kt-kernel is not installed"}
    program = Path(__file__).with_name("kt_experts.py")
    command = [sys.executable, str(program), "--config", json.dumps(config), "--steps", str(steps)]
    settings: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": KT_LIMIT_S}
    try:  # a process of its own: where an instruction is missing, it takes no other figure with it
        done = subprocess.run(command, check=False, **settings)
    except subprocess.TimeoutExpired:
        return {"baseline": name, "not_run": f"it was not done after {KT_LIMIT_S} seconds"}
    if not done.stdout:  # a row that was printed counts, whatever happens when its threads are ended
        died = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        return {"baseline": name, "not_run": f"{died}: {done.stderr.strip()[-300:]}"}
    return {"baseline": name, **json.loads(done.stdout)}
