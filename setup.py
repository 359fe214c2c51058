"""Builds the native CPU kernels; everything else about the package is in pyproject.toml.

The library has a plain C interface and is opened by path (offload/kernels/native_library.py). Python's headers are
not needed; where they are, one function is called without ctypes (csrc/python.cpp). It is optional: without a C++17
compiler the package installs and runs on torch.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("offload/kernels/csrc")
# Contraction is off so that every instruction set rounds alike; fused products are spelled out.
# -O3 unrolls the integer kernels beyond the registers: a third slower, and longer to compile.
OPTIMIZE = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"]
FLAGS = [*OPTIMIZE, "-std=c++17", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]

setup(
    ext_modules=[
        Extension(
            "offload.kernels._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
