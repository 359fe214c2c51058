"""llama.cpp's two-step route from a checkpoint to Q4_0: its convert script, then llama-quantize.

Owns the one adaptation: llama.cpp knows tokenizers by a hash, and a synthetic one is given the real one's kind.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TO_GGUF = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outtype", "bf16", "--outfile", sys.argv[3]]
convert_hf_to_gguf.main()
"""


def to_gguf(tree: Path, checkpoint: Path, out: Path, threads: int = 2) -> Path:
    """The checkpoint as Q4_0 in `out`, made if it is not there; `tree` is llama.cpp's with its build/."""
    if not out.exists():
        dense = to_dense(tree, checkpoint, out.with_suffix(".bf16.gguf"))
        quantize(tree, dense, out, threads)
        dense.unlink()
    return out


def to_dense(tree: Path, checkpoint: Path, out: Path) -> Path:
    """The first step: every weight in BF16."""
    subprocess.run([sys.executable, "-c", TO_GGUF, str(tree), str(checkpoint), str(out)], check=True)
    return out


def quantize(tree: Path, dense: Path, out: Path, threads: int) -> None:
    """The second step."""
    command = [str(tree / "build" / "bin" / "llama-quantize"), str(dense), str(out), "Q4_0", str(threads)]
    # It prints the vocabulary's bytes as they are.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
