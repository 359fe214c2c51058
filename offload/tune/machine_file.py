"""Machine files: what a machine can do, as TOML.

Owns the format: names, units, defaults, and the refusal of anything malformed by line and key. Must not measure
(`probe` does) nor predict (`cost` does).

    name = "RTX 4090, 128 GB DDR5-6000"
    [ram]
    total = "128GB"          # sizes as everywhere: 24GiB, 24GB
    read = "72GB"            # bytes per second that the processor reads with all threads
    [drive]
    read = "7GB"             # bytes per second of random expert-sized extents
    [cpu]
    threads = 16
    gflops = 1500            # 2 x multiply-adds of matrix products with many rows

`[gpu]`, `[network]` and `[engine]` are optional, and so are the measured details a probe adds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offload.errors import CodecError, UsageError
from offload.quant import get_codec
from offload.toml_file import dotted, line_of, parse_toml, read_text
from offload.tune.machine import ENGINE_TIMES, FormatRate, Gpu, MachineSpec
from offload.types import parse_size

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "machines"
"""The machine files that come with the program."""

SYSTEM_NBYTES = 4 << 30
"""RAM the rest of the system is taken to use where a file does not say what is available."""


def load_machine(file: str | Path) -> MachineSpec:
    """The machine described by the file, or by the shipped file of that name.

    Raises UsageError with file, line and key for anything that is malformed.
    """
    path = Path(file)
    if not path.exists() and path.name == str(file):
        shipped = FOLDER / (path.name if path.suffix == ".toml" else f"{path.name}.toml")
        if not shipped.exists():
            known = ", ".join(sorted(item.stem for item in FOLDER.glob("*.toml")))
            raise UsageError(f"there is no machine file {file}; shipped ones: {known}")
        path = shipped
    return parse_machine(read_text(path), str(path))


def parse_machine(text: str, where: str) -> MachineSpec:
    """The machine that the TOML `text` describes; `where` names it in messages."""
    return _Reader(parse_toml(text, where), text, where).machine()


def save_machine(machine: MachineSpec, path: Path) -> None:
    """Write `machine` so that `load_machine` reads it back equal, rates rounded to whole bytes per second."""
    try:
        path.write_text(to_toml(machine), encoding="utf-8")
    except OSError as fault:
        raise UsageError(f"{path} cannot be written: {fault.strerror}") from None


def to_toml(machine: MachineSpec) -> str:
    """The text of a machine file."""
    tables: list[tuple[str, dict[str, Any]]] = [
        ("", {"name": machine.name, "warnings": list(machine.warnings)}),
        ("ram", {"total": machine.ram_total, "available": machine.ram_available, "read": machine.ram_read}),
        ("ram.threads", dict(machine.ram_threads)),
        (
            "drive",
            {
                "read": machine.drive_read,
                "beside_kernels": machine.drive_beside,
                "latency_us": 1e6 * machine.drive_latency_s,
                "free": machine.drive_free,
            },
        ),
        ("drive.depths", dict(machine.depths)),
        (
            "cpu",
            {
                "threads": machine.threads,
                "gflops": machine.gflops,
                "attention_gflops": machine.attention_gflops,
                "beside_drive": machine.kernels_beside,
                "encode": machine.encode,
            },
        ),
        *((f"cpu.formats.{codec}", vars(rate)) for codec, rate in machine.formats.items()),
        *_gpu_tables(machine.gpu),
        ("network", {"download": machine.download}),
        (
            "engine",
            _engine_table({name: getattr(machine, name) for name in ENGINE_TIMES}),
        ),
        ("engine.plain", _engine_table(machine.plain)),
    ]
    lines = []
    for table, values in tables:
        rows = [f"{key} = {_toml(key, value)}" for key, value in values.items() if value not in (None, [])]
        if rows:
            lines += ([f"\n[{table}]"] if table else []) + rows
    return "\n".join(lines) + "\n"


def _engine_table(times: Mapping[str, float | None]) -> dict[str, Any]:
    """Microseconds by key; what takes no time is left out."""
    return {f"{name[:-2]}_us": 1e6 * seconds for name, seconds in times.items() if seconds}


def _gpu_tables(gpu: Gpu | None) -> list[tuple[str, dict[str, Any]]]:
    """[gpu] and a table for every format whose kernels were measured."""
    if gpu is None:
        return []
    values = {key: value for key, value in vars(gpu).items() if key not in _GPU_TABLES and not key.endswith("_s")}
    usual = Gpu("", 0, 0.0, 0.0)
    known = [key for key in _GPU_TIMES if getattr(gpu, f"{key}_s") != getattr(usual, f"{key}_s")]
    times = {f"{key}_us": 1e6 * getattr(gpu, f"{key}_s") for key in known}
    rates = [(f"gpu.{kind}.{codec}", rate) for kind in _GPU_TABLES for codec, rate in getattr(gpu, kind).items()]
    return [("gpu", values | times), *((name, {"read": rate.read, "gflops": rate.gflops}) for name, rate in rates)]


def _toml(key: str, value: Any) -> str:
    if isinstance(value, float):
        exact = "gflops" in key or key.endswith("_us") or key.startswith("beside")
        return repr(value) if exact else str(max(1, round(value)))
    # A JSON text or list of texts is one in TOML, too, but for a character that JSON leaves alone.
    return json.dumps(value).replace("\x7f", "\\u007f")


Parser = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be text")
    return value


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError('must be a size such as "7GB"')
    return parse_size(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-9 <= value <= 1e15:
        raise ValueError("must be a number from 1e-9 to 1e15")
    return float(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError("must be a share, above 0 and at most 1")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 100_000:
        raise ValueError("must be a whole number, 1 or more")
    return value


def _lines(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


_GPU_TABLES = ("experts", "resident")
_GPU_TIMES = ("layer", "prompt_layer", "token", "decide", "decide_token")
_RATE_TABLE: dict[str, Parser] = {"read": _size, "gflops": _number, "attention": _size, "gflops_many": _number}
_KEYS: dict[str, dict[str, Parser]] = {
    "": {"name": _text, "warnings": _lines},
    "ram": {"total": _size, "available": _size, "read": _size},
    "drive": {"read": _size, "beside_kernels": _share, "latency_us": _number, "free": _size},
    "cpu": {
        "threads": _count,
        "gflops": _number,
        "attention_gflops": _number,
        "beside_drive": _share,
        "encode": _size,
    },
    "gpu": {
        "name": _text,
        "vram": _size,
        "read": _size,
        "h2d": _size,
        **dict.fromkeys(("free", "h2d_pageable", "h2d_with_reads", "ram_with_copies", "kernels"), _size),
        **dict.fromkeys(("attention_gflops", *(f"{key}_us" for key in _GPU_TIMES)), _number),
    },
    "network": {"download": _size},
    "engine": dict.fromkeys((f"{name[:-2]}_us" for name in ENGINE_TIMES), _number),
}
_TABLES = {"ram": ("threads",), "drive": ("depths",), "cpu": ("formats",), "gpu": _GPU_TABLES, "engine": ("plain",)}
"""Tables in sections: their keys are counts or formats, those of `plain` the section's own."""
_REQUIRED = (("", "name"), ("ram", "total"), ("ram", "read"), ("drive", "read"), ("cpu", "threads"), ("cpu", "gflops"))


def _seconds(times: Mapping[str, float]) -> dict[str, float]:
    """By field, of microseconds by key."""
    return {f"{key[:-3]}_s": value / 1e6 for key, value in times.items()}


class _Reader:
    """Checks every key of a machine file; complaints carry line and key."""

    def __init__(self, values: dict[str, Any], text: str, where: str) -> None:
        self.values = values
        self.text = text
        self.where = where

    def machine(self) -> MachineSpec:
        found = self._sections()
        for section, key in _REQUIRED:
            if key not in found.get(section, {}):
                raise UsageError(f"{self.where}: key {dotted(section, key)} is missing")
        ram, drive, cpu = found["ram"], found["drive"], found["cpu"]
        available = ram.get("available", max(ram["total"] - SYSTEM_NBYTES, ram["total"] // 2))
        if available > ram["total"]:
            raise self._fault("ram", "available", "exceeds ram.total")
        return MachineSpec(
            name=found[""]["name"],
            warnings=found[""].get("warnings", ()),
            ram_total=ram["total"],
            ram_available=available,
            ram_read=float(ram["read"]),
            ram_threads=self._rates("ram", "threads"),
            drive_read=float(drive["read"]),
            drive_latency_s=drive.get("latency_us", 100.0) / 1e6,
            drive_free=drive.get("free"),
            depths=self._rates("drive", "depths"),
            drive_beside=drive.get("beside_kernels", 1.0),
            kernels_beside=cpu.get("beside_drive", 1.0),
            threads=cpu["threads"],
            gflops=cpu["gflops"],
            attention_gflops=cpu.get("attention_gflops"),
            formats=self._formats("cpu", "formats", ("attention", "gflops_many")),
            encode=cpu.get("encode"),
            gpu=self._gpu(found),
            download=found.get("network", {}).get("download"),
            plain=_seconds(self._plain()),
            **_seconds(found.get("engine", {})),
        )

    def _plain(self) -> dict[str, float]:
        """[engine.plain]."""
        name, found = "engine.plain", {}
        for key, value in self.values.get("engine", {}).get("plain", {}).items():
            if key not in _KEYS["engine"]:
                raise self._fault(name, key, f"is unknown; known: {', '.join(_KEYS['engine'])}")
            found[key] = self._value(name, key, value, _KEYS["engine"][key])
        return found

    def _sections(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {"": {}}
        for name, value in self.values.items():
            if name in _KEYS[""]:
                found[""][name] = self._value("", name, value, _KEYS[""][name])
            elif name not in _KEYS:
                known = ", ".join([*_KEYS[""], *(f"[{key}]" for key in _KEYS if key)])
                raise self._fault("", name, f"is unknown; known: {known}")
            elif not isinstance(value, dict):
                raise self._fault("", name, "must be a table")
            else:
                found[name] = self._section(name, value)
        return found

    def _section(self, section: str, values: dict[str, Any]) -> dict[str, Any]:
        known, tables = _KEYS[section], _TABLES.get(section, ())
        found = {}
        for key, value in values.items():
            if key in tables:
                if not isinstance(value, dict):
                    raise self._fault(section, key, "must be a table")
            elif key not in known:
                raise self._fault(section, key, f"is unknown; known: {', '.join([*known, *tables])}")
            else:
                found[key] = self._value(section, key, value, known[key])
        return found

    def _rates(self, section: str, table: str) -> dict[str, float]:
        name = f"{section}.{table}"
        rates = {}
        for key, value in self.values[section].get(table, {}).items():
            if not re.fullmatch("[1-9][0-9]{0,4}", key):
                raise self._fault(name, key, "must be a count such as 8")
            rates[key] = float(self._value(name, key, value, _size))
        return rates

    def _formats(self, section: str, table: str, optional: tuple[str, ...] = ()) -> dict[str, FormatRate]:
        formats = {}
        for codec, values in self.values[section].get(table, {}).items():
            where = f"{section}.{table}"
            name = f"{where}.{codec}"
            try:
                get_codec(codec)
            except CodecError as fault:
                raise self._fault(where, codec, f"names no format: {fault}") from None
            if not isinstance(values, dict) or not {"read", "gflops"} <= set(values) <= {"read", "gflops", *optional}:
                may = f", may have {', '.join(optional)}" if optional else " and no other"
                raise self._fault(where, codec, f"must have the keys read and gflops{may}")
            found = {key: float(self._value(name, key, value, _RATE_TABLE[key])) for key, value in values.items()}
            formats[codec] = FormatRate(**found)
        return formats

    def _gpu(self, found: dict[str, dict[str, Any]]) -> Gpu | None:
        gpu = found.get("gpu")
        if gpu is None:
            return None
        for key in ("name", "vram", "read", "h2d"):
            if key not in gpu:
                raise self._fault("", "gpu", f"lacks the key {key}")
        values: dict[str, Any] = {table: self._formats("gpu", table) for table in _GPU_TABLES}
        for key, value in gpu.items():
            if key.endswith("_us"):
                values[f"{key[:-3]}_s"] = value / 1e6
            else:
                values[key] = value if key in ("name", "vram", "free") else float(value)
        return Gpu(**values)

    def _value(self, section: str, key: str, value: Any, parser: Parser) -> Any:
        try:
            return parser(value)
        except (ValueError, UsageError) as fault:
            raise self._fault(section, key, f"is {value!r}: {fault}") from None

    def _fault(self, section: str, key: str, what: str) -> UsageError:
        line = line_of(self.text, section, key)
        return UsageError(f"{self.where}, line {line}: key {dotted(section, key)} {what}")
