"""Other programs on the layers of benchmarks/gpu.py: accelerate's CPU offload of transformers' model, kt-kernel."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

import torch


def accelerate_offload(config: dict[str, Any], vram: int, steps: int, device: str) -> dict[str, Any]:
    """transformers' DeepseekV3 in bf16, what exceeds `vram` bytes offloaded to RAM by accelerate."""
    import psutil
    from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
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
    """KTransformers' CPU expert kernels, if they are installed here."""
    name = "kt-kernel"
    if importlib.util.find_spec("kt_kernel") is None:
        return {"baseline": name, "not_run": "the package kt-kernel is not installed"}
    from kt_kernel import KTMoEWrapper

    experts, hidden = config["n_routed_experts"], config["hidden_size"]
    inner, k = config["moe_intermediate_size"], config["num_experts_per_tok"]
    try:
        wrapper = KTMoEWrapper(
            layer_idx=0,
            num_experts=experts,
            num_experts_per_tok=k,
            hidden_size=hidden,
            moe_intermediate_size=inner,
            num_gpu_experts=0,
            cpuinfer_threads=torch.get_num_threads(),
            threadpool_count=1,
            weight_path="",
            chunked_prefill_size=512,
            method="AMXINT4",
        )
        shape = (experts, inner, hidden)
        gate, up, down = (torch.randn(shape, dtype=torch.bfloat16) * 0.02 for _ in range(3))
        wrapper.load_weights_from_tensors(gate, up, down.transpose(1, 2).contiguous(), torch.arange(experts))
        x = torch.randn(1, hidden, dtype=torch.bfloat16, device=device)
        ids = torch.arange(k, device=device).view(1, k)
        weights = torch.full((1, k), 1 / k, device=device)
        times = []
        for _ in range(2 + steps):
            begun = time.perf_counter()
            wrapper.forward(x, ids, weights, torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    except Exception as fault:  # whatever another program's set-up does, the row says so
        return {"baseline": name, "not_run": f"{type(fault).__name__}: {fault}"[:300]}
    return {"baseline": name, "layer_s": statistics.median(times[2:])}
