"""Native kernels, weights: every format, shape, instruction set and thread count against float64."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.errors import KernelError
from offload.kernels import native_library
from offload.kernels.native import NativeKernels
from offload.quant import QuantizedTensor, get_codec
from offload.store.layout import ExpertLayout, ExpertWeights

REASON = native_library.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native kernels: {REASON}")
ISAS = native_library.supported_isas() if REASON is None else ()
INT_CODECS = ("int4-g32", "int4-g64", "int4-g128", "int8-g32", "int8-g64", "int8-g128", "int3-g32", "int2-g32")
FLOAT_CODECS = ("int3-g64", "int2-g128", "bf16", "fp8", "fp8-b32x32", "fp8-b7x5")
CODECS = (*INT_CODECS, "nf4-b64", *FLOAT_CODECS)
MAIN_CODECS = ("int4-g32", "int4-g128", "int8-g128", "int3-g32", "int2-g32", "nf4-b64", "bf16", "fp8")


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(threads=2, isa=request.param)


def quantize(weight: Tensor, codec: str) -> QuantizedTensor:
    c = get_codec(codec)
    return QuantizedTensor(c, weight.shape[0], weight.shape[1], c.encode(weight))


def random_weight(generator: torch.Generator, rows: int, cols: int, codec: str) -> QuantizedTensor:
    return quantize(torch.randn(rows, cols, generator=generator) * 0.05, codec)


def bound(x: Tensor, weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """The float64 product and how far a kernel may be from it, element by element.

    Formats computed with in integers round each activation by at most half of its group's scale (amax / 127), and nf4
    the values of its codes to multiples of 2^-14; the rest is fp32 rounding of the products and of a sum of at most
    cols / 8 + 16 terms.
    """
    w = weight.dequantize(torch.float32).double()
    x = x.double()
    exact = x @ w.T
    slack = (x.abs() @ w.abs().T) * 2.0**-23 * (weight.cols / 8 + 16)
    group = None
    if weight.codec.name in INT_CODECS:
        group = weight.codec.group  # type: ignore[attr-defined]
    elif weight.codec.name == "nf4-b64" and weight.cols % 64 == 0:  # blocks that run over the ends of rows are decoded
        group = 64
        scale = weight.parts["weight.absmax"].view(weight.rows, -1).double()
        slack += x.abs().unflatten(1, (-1, group)).sum(2) @ scale.T * 2.0**-15  # the values of the codes in integers
    if group is not None:
        pad = (0, -weight.cols % group)
        amax = torch.nn.functional.pad(x.abs(), pad).unflatten(1, (-1, group)).amax(2)
        mass = torch.nn.functional.pad(w.abs(), pad).unflatten(1, (-1, group)).sum(2)
        # Groups below 1e-30 may count as zero.
        slack += amax.clamp_min(254e-30) @ mass.T * (0.5 / 127) * (1 + 1e-5)
    return exact, slack + 1e-37


def assert_within(out: Tensor, x: Tensor, weight: QuantizedTensor) -> None:
    exact, slack = bound(x, weight)
    worst = ((out.double() - exact).abs() / slack).max()
    assert worst <= 1.0, f"{weight.codec.name} {weight.rows}x{weight.cols}: {worst:.2f} times the bound"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(64, 512), (5, 17), (3, 1), (37, 1000), (9, 2080), (130, 1536), (7, 192)])
def test_linear_is_within_the_bound_of_its_format(kernels: NativeKernels, codec: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    weight = random_weight(generator, *shape, codec)
    for tokens in (1, 3, 7):
        x = torch.randn(tokens, shape[1], generator=generator)
        assert_within(kernels.linear(x, weight), x, weight)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.integers(1, 70),
    st.integers(1, 1100) | st.integers(1, 34).map(lambda groups: 32 * groups),
    st.integers(1, 40),
    st.sampled_from(["plain", "outliers", "tiny", "huge", "zeros", "denormal", "tiny scales", "huge scales"]),
    st.integers(0, 2**20),
)
def test_any_shape_and_any_scale(codec: str, rows: int, cols: int, tokens: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(generator, rows, cols, codec)
    x = torch.randn(tokens, cols, generator=generator)
    if kind == "outliers":
        x[:, seed % cols] *= 1000.0
    elif kind == "tiny":
        x *= 1e-25
    elif kind == "huge":
        x *= 1e25
    elif kind == "zeros":
        x[:, : cols // 2] = 0.0
        x[seed % tokens] = 0.0
    elif kind == "denormal":
        x *= 1e-40
    elif kind.endswith("scales"):
        for name in {"weight_scale", "weight.absmax"} & set(weight.parts):
            weight.parts[name].mul_(1e-30 if kind == "tiny scales" else 1e30)
    outs = [NativeKernels(threads=1, isa=isa).linear(x, weight) for isa in ISAS]
    assert_within(outs[0], x, weight)
    for isa, out in zip(ISAS[1:], outs[1:], strict=True):
        assert torch.equal(out, outs[0]), f"{isa} gives other bits than {ISAS[0]}"


@pytest.mark.parametrize("codec", MAIN_CODECS)
def test_a_row_has_the_same_bits_for_any_batch_threads_and_isa(codec: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = random_weight(generator, 203, 1056, codec)
    x = torch.randn(70, 1056, generator=generator)
    expected = NativeKernels(threads=1, isa="portable").linear(x, weight)
    for isa in ISAS:
        for threads in (1, 2, 3):
            kernels = NativeKernels(threads=threads, isa=isa)
            for batch in (1, 2, 3, 4, 5, 33, 70):
                parts = [kernels.linear(part.contiguous(), weight) for part in x.split(batch)]
                assert torch.equal(torch.cat(parts), expected), f"{isa}, {threads} threads, batches of {batch}"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(20, 4200), (17, 2048), (18, 2112), (33, 5)])
def test_many_tokens_have_the_bits_of_one(kernels: NativeKernels, codec: str, shape: tuple[int, int]) -> None:
    """Tiles, panels and blocks of columns, whole and partial."""
    generator = torch.Generator().manual_seed(13)
    weight = random_weight(generator, *shape, codec)
    x = torch.randn(37, shape[1], generator=generator)
    out = kernels.linear(x, weight)
    assert_within(out, x, weight)
    for t in (0, 30, 36):
        assert torch.equal(kernels.linear(x[t : t + 1].contiguous(), weight), out[t : t + 1])


@pytest.mark.parametrize("codec", CODECS)
def test_extreme_codes_do_not_overflow(kernels: NativeKernels, codec: str) -> None:
    """All codes at one end of their range against activations at one end of theirs."""
    cols = 1024
    for sign in (1.0, -1.0):
        weight = quantize(torch.full((8, cols), -1.0), codec)
        if codec in INT_CODECS:
            weight.parts["weight_packed"].zero_()  # code 0 is the most negative one: -8, -128, -4 or -2
        x = torch.full((5, cols), sign * 3.0)
        assert_within(kernels.linear(x, weight), x, weight)
        if codec in INT_CODECS:
            weight.parts["weight_packed"].fill_(-1)
            assert_within(kernels.linear(x, weight), x, weight)


@pytest.mark.parametrize("codec", MAIN_CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_refused(kernels: NativeKernels, codec: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = random_weight(generator, 40, 300, codec)
    for column in (0, 150, 299):
        x = torch.randn(6, 300, generator=generator)
        x[4, column] = bad
        with pytest.raises(KernelError, match="row 4 hold NaN or infinity"):
            kernels.linear(x, weight)


def test_damaged_scales_and_fp8_nan_codes_reach_the_result(kernels: NativeKernels) -> None:
    x = torch.ones(1, 300)
    weight = quantize(torch.ones(3, 300), "int4-g32")
    weight.parts["weight_scale"][1, 4] = float("nan")
    assert kernels.linear(x, weight).isnan().tolist() == [[False, True, False]]
    weight = quantize(torch.ones(3, 300), "fp8")
    weight.parts["weight"].view(torch.uint8)[2, 290] = 0xFF
    assert kernels.linear(x, weight).isnan().tolist() == [[False, False, True]]
    assert kernels.linear(x.expand(7, 300).contiguous(), weight)[:, 2].isnan().all()


def test_fp8_scales_of_any_size(kernels: NativeKernels) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 256, generator=generator)
    for factor in (1e-30, 1e-3, 200.0, 1e30):
        weight = random_weight(generator, 130, 256, "fp8")
        weight.parts["weight_scale"].mul_(factor)
        assert_within(kernels.linear(x, weight), x, weight)


# ---- experts -----------------------------------------------------------------------------------------


def expert(generator: torch.Generator, layout: ExpertLayout, shift: int = 0) -> ExpertWeights:
    """A random expert in a buffer that starts `shift` bytes after an aligned address."""
    room = torch.zeros(layout.stride + shift + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + shift
    buffer = room[start : start + layout.stride]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        rows, cols = layout.shape(projection)
        parts = layout.codec.encode(torch.randn(rows, cols, generator=generator) * cols**-0.5)
        for field in layout.fields:
            if field.projection == projection:
                raw = parts[field.suffix].contiguous().view(torch.uint8).flatten()
                buffer[field.offset : field.offset + field.nbytes] = raw
    return layout.views(buffer)


@pytest.mark.parametrize("codec", MAIN_CODECS)
@pytest.mark.parametrize("shape", [(256, 128), (90, 52)])
def test_experts_equal_one_token_at_a_time(codec: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(6)
    hidden, inner = shape
    layout = ExpertLayout(get_codec(codec), hidden, inner)
    experts = [expert(generator, layout) for _ in range(3)]
    tokens, k = 21, 2
    x = torch.randn(tokens, hidden, generator=generator)
    chosen = torch.stack([torch.randperm(3, generator=generator)[:k] for _ in range(tokens)])  # [T, k]
    wave = [(e, (chosen.flatten() == i).nonzero().flatten()) for i, e in enumerate(experts)]
    wave.append((experts[0], torch.zeros(0, dtype=torch.int64)))
    single = NativeKernels(threads=1, isa="portable")
    expected = torch.empty(tokens * k, hidden)
    for e, positions in wave:
        for p in positions.tolist():
            row = x[p // k : p // k + 1]
            gate, up = single.linear(row, e.gate_proj), single.linear(row, e.up_proj)
            exact = gate.double().sigmoid() * gate.double() * up.double()
            result = single.swiglu_mlp(row, e.gate_proj, e.up_proj, e.down_proj)
            # Against the float64 SwiGLU, with room for its rounding to int8 falling the other way.
            _, slack = bound(exact.float(), e.down_proj)
            error = (result.double() - exact @ e.down_proj.dequantize(torch.float32).double().T).abs()
            assert (error <= 2.1 * slack).all()
            expected[p] = result
    for isa in ISAS:
        for threads in (1, 3):
            kernels = NativeKernels(threads=threads, isa=isa)
            partial = torch.full((tokens * k, hidden), 7.0)
            kernels.experts(x, wave[:2], k, partial)
            assert (partial[wave[2][1]] == 7.0).all(), "rows of other experts were written"
            kernels.experts(x, wave[2:], k, partial)
            assert torch.equal(partial, expected), f"{isa}, {threads} threads"


def test_experts_at_odd_addresses_and_through_plain_matrices(kernels: NativeKernels) -> None:
    generator = torch.Generator().manual_seed(7)
    layout = ExpertLayout(get_codec("fp8"), 45, 21)
    aligned = expert(generator, layout)
    odd = expert(torch.Generator().manual_seed(7), layout, shift=3)
    assert odd.buffer.data_ptr() % 4 == 3
    assert torch.equal(odd.buffer, aligned.buffer)
    x = torch.randn(4, 45, generator=generator)
    outs = [torch.empty(4, 45) for _ in range(3)]
    for e, out in zip((aligned, odd), outs, strict=False):
        kernels.experts(x, [(e, torch.arange(4))], 1, out)
    outs[2] = kernels.swiglu_mlp(x, aligned.gate_proj, aligned.up_proj, aligned.down_proj)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_experts_refuse_overflow_and_positions_outside(kernels: NativeKernels) -> None:
    generator = torch.Generator().manual_seed(8)
    e = expert(generator, ExpertLayout(get_codec("int4-g32"), 64, 32))
    x = torch.randn(3, 64, generator=generator)
    x[1] *= 1e37  # gate * up overflows
    with pytest.raises(KernelError, match="row 1 hold NaN or infinity"):
        kernels.experts(x, [(e, torch.arange(6))], 2, torch.empty(6, 64))
    with pytest.raises(KernelError, match="position"):
        kernels.experts(x[:1].contiguous(), [(e, torch.tensor([2]))], 2, torch.empty(2, 64))


def test_swiglu_with_two_formats(kernels: NativeKernels) -> None:
    generator = torch.Generator().manual_seed(9)
    gate, up = (random_weight(generator, 33, 70, c) for c in ("bf16", "fp8"))
    down = random_weight(generator, 70, 33, "bf16")
    x = torch.randn(5, 70, generator=generator)
    g, u, d = (w.dequantize(torch.float32).double() for w in (gate, up, down))
    xd = x.double()
    exact = (torch.nn.functional.silu(xd @ g.T) * (xd @ u.T)) @ d.T
    torch.testing.assert_close(kernels.swiglu_mlp(x, gate, up, down).double(), exact, rtol=1e-5, atol=1e-6)


def test_combine_adds_in_ascending_expert_order(kernels: NativeKernels) -> None:
    generator = torch.Generator().manual_seed(10)
    tokens, k, hidden = 5, 6, 75
    scales = 10.0 ** torch.randint(-3, 4, (tokens * k, 1), generator=generator)
    partial = torch.randn(tokens * k, hidden, generator=generator) * scales
    ids = torch.stack([torch.randperm(40, generator=generator)[:k] for _ in range(tokens)])
    weights = torch.rand(tokens, k, generator=generator)
    out = kernels.combine(partial, ids, weights)
    terms = partial.view(tokens, k, hidden).double() * weights.unsqueeze(2).double()
    # k products and sums, each rounded: terms of very different size may cancel, so the bound is of their magnitudes.
    assert ((out.double() - terms.sum(1)).abs() <= 2 * k * 2.0**-24 * terms.abs().sum(1)).all()
    shuffle = torch.randperm(k, generator=generator)
    moved = partial.view(tokens, k, hidden)[:, shuffle].reshape(tokens * k, hidden).contiguous()
    again = kernels.combine(moved, ids[:, shuffle].contiguous(), weights[:, shuffle].contiguous())
    assert torch.equal(out, again)
    assert torch.equal(out, NativeKernels(threads=1, isa="portable").combine(partial, ids, weights))


# ---- the binding -------------------------------------------------------------------------------------


def test_several_python_threads_share_a_backend() -> None:
    generator = torch.Generator().manual_seed(11)
    kernels = NativeKernels(threads=2)
    weights = [random_weight(generator, 64, 320, "int4-g32") for _ in range(3)]
    x = torch.randn(4, 320, generator=generator)
    expected = [kernels.linear(x, w) for w in weights]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(kernels.linear(x, weights[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_collected_weight_is_forgotten() -> None:
    generator = torch.Generator().manual_seed(12)
    kernels = NativeKernels(threads=1)
    weight = random_weight(generator, 8, 32, "bf16")
    x = torch.randn(1, 32, generator=generator)
    kernels.linear(x, weight)
    assert len(kernels._described._weights) == 1
    del weight
    assert not kernels._described._weights
    other = random_weight(generator, 8, 32, "bf16")
    assert_within(kernels.linear(x, other), x, other)


def test_bad_arguments_are_named() -> None:
    weight = quantize(torch.ones(4, 32), "bf16")
    kernels = NativeKernels(threads=1)
    with pytest.raises(KernelError, match="expected contiguous float32"):
        kernels.linear(torch.ones(2, 31), weight)
    with pytest.raises(KernelError, match="float64"):
        kernels.linear(torch.ones(2, 32, dtype=torch.float64), weight)
    with pytest.raises(KernelError, match="contiguous"):
        kernels.linear(torch.ones(32, 2).T, weight)
    with pytest.raises(KernelError, match="1 to 1024 threads"):
        NativeKernels(threads=0)
    with pytest.raises(KernelError, match="known: auto, avx512"):
        NativeKernels(isa="mmx")


def test_threads_that_the_system_does_not_start_are_an_error() -> None:
    """Thread stacks of eight megabytes each do not fit beside what the process has."""
    program = """
import resource
from offload.errors import KernelError
from offload.kernels.native import NativeKernels
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.RLIM_INFINITY))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
try:
    NativeKernels(threads=1000)
except KernelError as error:
    print(error)
NativeKernels(threads=2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "does not start 1000 threads" in done.stdout


def test_a_product_without_pythons_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that was built without them has no module in it, and is called through ctypes."""
    weight, x = random_weight(torch.Generator().manual_seed(0), 48, 96, "int4-g32"), torch.randn(1, 96)
    expected = NativeKernels(threads=1).linear(x, weight)

    def without(spec: object) -> None:
        raise ImportError("dynamic module does not define module export function")

    with monkeypatch.context() as patch:
        patch.setattr(native_library.importlib.util, "module_from_spec", without)
        native_library.linear.cache_clear()
        try:
            assert native_library.linear() is native_library.library().ep_linear
            assert torch.equal(NativeKernels(threads=1).linear(x, weight), expected)
        finally:
            native_library.linear.cache_clear()


def test_the_quick_call_checks_its_arguments() -> None:
    call = native_library.linear()
    if call is native_library.library().ep_linear:
        pytest.skip("built without Python's headers")
    for wrong, error in (((1, 2), TypeError), ((1, 2, 3, "1", 5), TypeError), ((1, 2, 3, 1, -5), OverflowError)):
        with pytest.raises(error):
            call(*wrong)


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "library_path", lambda: None)
    native_library.library.cache_clear()
    try:
        assert "compiler" in (native_library.available() or "")
        with pytest.raises(KernelError, match="was not built"):
            NativeKernels()
    finally:
        native_library.library.cache_clear()
