"""Training text that every Debian machine with Python has, and a byte-level BPE over it.

Owns the domains, which files belong to them, the split into training and held-out documents, and the
tokenizer. Must not know models.

    python -m benchmarks.embedded.corpus FOLDER     # held-out text, a folder per domain
"""

from __future__ import annotations

import gettext
import glob
import gzip
import hashlib
import json
import random
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from convert.synthetic_tokenizer import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, USER

HELD_OUT_EVERY = 16
"""One part of this many is never trained on; which one depends on its content only."""

PART = 12_000
"""Longest part of a document in characters: held-out text then comes from many files of every domain."""

_BLANK_RUNS = re.compile(r"\n{3,}")
_ROFF = re.compile(r'^[.\'](?:\\"|de|ie|if|el|ds|nr|tr|rm|hy|ad|nh|so|TH|UR|UE|PD|TS|TE|in|ft|mso).*\n?', re.MULTILINE)
_ROFF_FONT = re.compile(r"\\f(?:[BIRPC]|\(..|\[[^\]]*\])|\\&|\\,|\\/|\\:")
_ROFF_MACRO = re.compile(r"^\.[A-Za-z]+ ?", re.MULTILINE)


@dataclass(frozen=True)
class Domain:
    """One kind of text: which files, how they are read, how many bytes at most, its share of training."""

    name: str
    patterns: tuple[str, ...]
    read: Callable[[Path], str]
    limit: int
    share: float
    without: tuple[str, ...] = ()
    """Beginnings of file names that are left out."""


@dataclass
class Corpus:
    """Documents per domain, and what was read, for the record."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    record: dict[str, Any]


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read_man(path: Path) -> str:
    """The prose of a manual page: macros and fonts removed."""
    text = gzip.decompress(path.read_bytes()).decode()
    text = _ROFF_FONT.sub("", _ROFF.sub("", text))
    text = text.replace("\\-", "-").replace("\\(aq", "'").replace("\\(bu", "*").replace("\\e", "\\")
    return _ROFF_MACRO.sub("", text).replace('"', "")


def read_catalogue(path: Path) -> str:
    """The translations of a message catalogue, one after the other."""
    with path.open("rb") as file:
        messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return "\n".join(text for key, text in messages.items() if key and len(text) > 12)


def domains() -> tuple[Domain, ...]:
    """The corpus of this machine."""
    stdlib = sysconfig.get_paths()["stdlib"]
    mega = 1_000_000
    return (
        Domain("python", (f"{stdlib}/*.py", f"{stdlib}/[a-hj-su-z]*/*.py"), read_text, 5 * mega, 0.26),
        Domain(
            "c",
            ("/usr/include/*.h", "/usr/include/linux/**/*.h", "/usr/include/*-linux-gnu/**/*.h"),
            read_text,
            3 * mega,
            0.18,
        ),
        Domain("manual", ("/usr/share/man/man[1578]/*.gz",), read_man, 4 * mega, 0.17, ("gcloud", "kubectl")),
        Domain("licence", ("/usr/share/common-licenses/*", "/usr/share/doc/*/copyright"), read_text, 2 * mega, 0.15),
        *(
            Domain(name, (f"/usr/share/locale/{code}/LC_MESSAGES/[!i]*.mo",), read_catalogue, 2 * mega, 0.08)
            for name, code in (("german", "de"), ("french", "fr"), ("russian", "ru"))
        ),
    )


def read_corpus(seed: int = 0) -> Corpus:
    """Read, deduplicate and split the documents of every domain, in an order that `seed` fixes."""
    corpus = Corpus({}, {}, {})
    for domain in domains():
        documents, used, digest = [], 0, hashlib.sha256()
        for text in _documents(domain, random.Random(seed)):
            if used + len(text.encode()) > domain.limit:
                continue
            used += len(text.encode())
            digest.update(text.encode())
            documents.append(text)
        held = [text for text in documents if _held_out(text)]
        corpus.train[domain.name] = [text for text in documents if not _held_out(text)]
        corpus.held_out[domain.name] = held
        corpus.record[domain.name] = {
            "patterns": [pattern.replace(sysconfig.get_paths()["stdlib"], "STDLIB") for pattern in domain.patterns],
            "parts": len(documents),
            "held_out_parts": len(held),
            "bytes": used,
            "sha256": digest.hexdigest(),
            "share": domain.share,
        }
    return corpus


def _documents(domain: Domain, order: random.Random) -> Iterator[str]:
    paths = sorted({path for pattern in domain.patterns for path in glob.glob(pattern, recursive=True)})
    order.shuffle(paths)
    seen = set()
    for path in map(Path, paths):
        if path.is_dir() or path.stat().st_size > 1_000_000 or path.name.startswith(domain.without):
            continue
        try:
            text = _BLANK_RUNS.sub("\n\n", domain.read(path)).strip()
        except (OSError, UnicodeDecodeError, EOFError):
            continue
        key = hashlib.sha256(text.encode(errors="replace")).digest()
        if len(text) > 200 and key not in seen:
            seen.add(key)
            yield from (text[i : i + PART] for i in range(0, len(text), PART))


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode(errors="replace")).digest()[0] % HELD_OUT_EVERY == 0


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A byte-level BPE with DeepSeek's way to split text; special tokens first, chat roles last."""
    tokenizer = Tokenizer(models.BPE())
    split = [
        r"\p{N}{1,3}",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+",
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator((text for texts in corpus.train.values() for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(role, special=False, normalized=False) for role in (USER, ASSISTANT)])
    return tokenizer


def write_tokenizer_files(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json beside a checkpoint."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    for name, value in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, documents: dict[str, list[str]]) -> dict[str, NDArray[np.int32]]:
    """Token ids per domain, documents one after the other, each closed by the end-of-sequence token."""
    streams = {}
    for name, texts in documents.items():
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        streams[name] = np.concatenate([np.asarray([*e.ids, 1], np.int32) for e in encoded])
    return streams


def write_held_out(folder: Path, limit: int = 18_000, piece: int = 2_000) -> None:
    """Up to `limit` characters of held-out text per domain, as one file each: prompts for atlas and perplexity.

    They are the beginnings, of `piece` characters, of as many held-out parts as there are.
    """
    for name, texts in read_corpus().held_out.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "held_out.txt").write_text(
            "\n\n".join(text[:piece] for text in texts)[:limit], encoding="utf-8"
        )


if __name__ == "__main__":
    write_held_out(Path(sys.argv[1]))
