"""The compiled library in csrc/ and the words it is spoken to with, through ctypes.

Owns finding and opening the library, its structures and functions, and what it is told of a weight. Must not know
tensors that are computed with: `native` does.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
from collections.abc import Callable
from ctypes import Structure, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

from offload.errors import KernelError
from offload.kernels.api import RouterShape
from offload.quant import Codec
from offload.quant.fp8 import Fp8Codec
from offload.quant.grouped import GroupedIntCodec
from offload.quant.nf4 import Nf4Codec

ISAS = ("avx512", "avxvnni", "avx2", "portable")
"""Instruction sets of the library, fastest first."""

_ABI = 6
F32, BF16, _FP8, _INT4, _INT8, _NF4, _INT3, _INT2 = range(8)
_INTEGERS = {8: _INT8, 4: _INT4, 3: _INT3, 2: _INT2}


class Weight(Structure):
    _fields_ = (
        ("kind", c_int32),
        ("group", c_int32),
        ("block_rows", c_int32),
        ("block_cols", c_int32),
        ("rows", c_int64),
        ("cols", c_int64),
        ("payload", c_uint64),
        ("scale", c_uint64),
    )


class Attention(Structure):
    _fields_ = (
        *((name, Weight) for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
        *((name, c_uint64) for name in ("input_norm", "q_a_norm", "kv_a_norm")),
        *((name, c_float) for name in ("eps", "latent_eps", "scale")),
        *((name, c_int32) for name in ("heads", "nope", "rope", "value")),
    )


class Router(Structure):
    _fields_ = (
        ("experts", c_int32),
        ("groups", c_int32),
        ("top_groups", c_int32),
        ("top_k", c_int32),
        ("normalize", c_int32),
        ("scaling", c_float),
    )


class Moe(Structure):
    _fields_ = (
        ("router", Weight),
        ("shared", Weight * 3),
        ("norm", c_uint64),
        ("bias", c_uint64),
        ("config", Router),
        ("eps", c_float),
        ("has_shared", c_int32),
    )


class Layer(Structure):
    _fields_ = (("attention", c_void_p), ("block", c_void_p), ("cache", c_void_p))


class Where(Structure):
    """ep_residents"""

    _fields_ = (("layout", c_void_p), ("slots", c_void_p), ("addresses", c_void_p), ("first", c_int64))


class Token(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("layers", "cos", "sin", "hidden", "attended", "x", "weights", "ids")),
        ("start", c_int64),
        ("mark", c_uint64),
    )


_P, _N, _F = c_void_p, c_int64, c_float
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ep_abi": (c_int32, ()),
    "ep_supports": (c_int32, (c_char_p,)),
    "ep_create": (_P, (c_char_p, c_int32)),
    "ep_destroy": (None, (_P,)),
    "ep_isa": (c_char_p, (_P,)),
    "ep_reserve": (_N, (_P, _N)),
    "ep_linear": (_N, (_P, _P, _P, _N, _P)),
    "ep_experts": (_N, (_P, _P, _P, _P, _P, _N, _P, _N, _N, _P)),
    "ep_silu_mul": (None, (_P, _P, _P, _N, _P)),
    "ep_combine": (None, (_P, _P, _P, _P, _N, _N, _N, _P)),
    "ep_rms_norm": (None, (_P, _P, _P, _F, _N, _N, _P)),
    "ep_rope": (None, (_P, _P, _P, _P, _N, _N, _N, _P)),
    "ep_router_topk": (_N, (_P, _P, _P, _N, _P, _P, _P, _P)),
    "ep_mla_absorbed": (_N, (_P, _P, _P, _P, c_int32, _N, _N, _N, _N, _N, _F, _P)),
    "ep_attend": (_N, (_P, _P, _P, _P, _N, _N, _N, _N, _N, _F, _P)),
    "ep_absorb_query": (_N, (_P, _P, _P, _N, _N, _N, _N, _P)),
    "ep_expand_value": (_N, (_P, _P, _P, _N, _N, _N, _P)),
    "ep_attention": (_N, (_P, _P, _P, _P, _P, _N, _N, _P, _P)),
    "ep_moe_begin": (_N, (_P, _P, _P, _N, _P, _P, _P, _P)),
    "ep_moe_end": (_N, (_P, _P, _P, _P, _P, _N, c_uint64, _P)),
    "ep_layers": (_N, (_P, _P, _P, _N, _N, c_int32, _P)),
    "ep_embed": (None, (_P, _P, _N, _P)),
    "ep_head_begin": (_N, (_P, _P, _P, _F, _P, _P)),
    "ep_head_end": (None, (_P, _P)),
    "ep_read": (c_uint64, (_P, _P, _N)),
}


def library_path() -> Path | None:
    """Where the compiled library lies, or None when it was not built."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_native{suffix}"
        if path.is_file():
            return path
    return None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The opened library. Raises KernelError when it was not built, or not from this source."""
    path = library_path()
    if path is None:
        raise KernelError("the library was not built; install a C++17 compiler and reinstall the package")
    try:
        opened = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(opened, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"{path} cannot be loaded ({error}); reinstall the package to rebuild it") from error
    if opened.ep_abi() != _ABI:
        raise KernelError(f"{path} has interface {opened.ep_abi()}, not {_ABI}; reinstall the package to rebuild it")
    return opened


@lru_cache(maxsize=1)
def linear() -> Callable[[int, int, int, int, int], int]:
    """`ep_linear`, addresses as integers: without ctypes where the library was built with Python's headers."""
    opened, path = library(), library_path()
    spec = importlib.util.spec_from_file_location("offload.kernels._native", path)
    assert spec is not None
    try:
        function: Callable[[int, int, int, int, int], int] = importlib.util.module_from_spec(spec).linear
    except ImportError:
        return opened.ep_linear
    return function


def available() -> str | None:
    """None when the compiled kernels can be used, else why not."""
    try:
        library()
    except KernelError as error:
        return str(error)
    return None


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this processor runs, fastest first."""
    return tuple(isa for isa in ISAS if library().ep_supports(isa.encode()))


def describe(codec: Codec, shape: tuple[int, int], addresses: dict[str, int]) -> Weight:
    """What the library needs to know of a weight; `addresses` by suffix may also be offsets."""
    name = codec.name
    group = block_rows = block_cols = 0
    payload, scale = "weight", "weight_scale"
    if name == "bf16":
        kind = BF16
    elif isinstance(codec, Fp8Codec):
        kind = _FP8
        block_rows, block_cols = codec.block
    elif isinstance(codec, GroupedIntCodec):
        kind, group, payload = _INTEGERS[codec.bits], codec.group, "weight_packed"
    elif isinstance(codec, Nf4Codec):
        kind, group, scale = _NF4, codec.block, "weight.absmax"
    else:
        raise KernelError(f"the native kernels cannot read {name} weights; use --kernels reference")
    return Weight(kind, group, block_rows, block_cols, *shape, addresses[payload], addresses.get(scale, 0))


def describe_router(shape: RouterShape, experts: int) -> Router:
    """The library's words for a router over so many experts."""
    if experts % shape.n_group:
        raise KernelError(f"{experts} experts do not divide into {shape.n_group} groups")
    return Router(
        experts,
        shape.n_group,
        shape.topk_group,
        shape.num_experts_per_tok,
        int(shape.norm_topk_prob),
        shape.routed_scaling_factor,
    )
