"""Build the native kernels with sanitizers and run them: `python tests/kernels/sanitize.py [address|thread]`.

Address and undefined-behaviour checks by default and thread checks as well when no name is given.
Exits with 1 when a sanitizer or the driver (native_check.cpp) finds something.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [*sorted((HERE.parents[1] / "offload" / "kernels" / "csrc").glob("*.cpp")), HERE / "native_check.cpp"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-fno-omit-frame-pointer"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def check(name: str) -> int:
    """Exit status of the driver built with one group of sanitizers."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = FLAGS + SANITIZERS[name]
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in SOURCES]

        def compile_one(pair: tuple[Path, Path]) -> None:
            subprocess.run([*compiler, *flags, "-c", str(pair[0]), "-o", str(pair[1])], check=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(SOURCES, objects, strict=True)))
        program = Path(folder) / "native_check"
        subprocess.run([*compiler, *flags, *map(str, objects), "-o", str(program)], check=True)
        print(f"== {name}", flush=True)
        return subprocess.run([str(program)], check=False).returncode


def main() -> int:
    names = sys.argv[1:] or list(SANITIZERS)
    return max(check(name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
