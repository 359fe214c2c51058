"""The errors a user can cause or meet.

Owns the exception family. Every message says what happened, with which numbers, in which file, and
what to do about it, in one line: the command line prints it as it is. Must not know any other module.
"""

from __future__ import annotations


class OffloadError(Exception):
    """Base of every fault that comes from the user, the disk, the network or the hardware."""


class UsageError(OffloadError):
    """An option or argument has a value that cannot be used."""


class ConfigError(OffloadError):
    """A config.json describes a model that this project does not compute exactly."""


class CheckpointError(OffloadError):
    """A source checkpoint is incomplete, corrupt or inconsistent."""


class CodecError(OffloadError):
    """An unknown weight format, or a weight that a format cannot hold."""


class StoreError(OffloadError):
    """A store is missing, damaged, incomplete or written by another format version."""


class BudgetError(OffloadError):
    """RAM, VRAM or disk space is too small for what was asked."""


class DiskError(OffloadError):
    """Reading or writing failed at run time."""


class DeviceError(OffloadError):
    """An accelerator failed, was lost, or is not there."""


class KernelError(OffloadError):
    """A kernel backend is not available or refused its input."""


class TokenizerError(OffloadError):
    """Tokenizer or chat template files are missing or cannot be used."""
