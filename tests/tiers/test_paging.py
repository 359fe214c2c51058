"""The engine over a drive that is slow, reorders, fails or goes away: same tokens, or a clear error and a next try."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from paging_samples import Unruly

import offload
from offload.engine.engine import Engine, ram_for_share
from offload.errors import BudgetError, DiskError, StoreError, UsageError
from offload.store import Store
from offload.store.mirror import check_mirror
from offload.tune.memory import Memory

PROMPT = [0, 17, 301, 5, 99, 402, 33, 8]
CONTEXT = 64


@pytest.fixture
def load(store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Loads the store with a share of its experts in RAM over a given file system; nothing is learned."""

    monkeypatch.setattr("offload.engine.backend.process_nbytes", lambda: 300 << 20)  # so that slots do not vary

    def make(system: Unruly | None = None, share: float = 0.4, path: Path = store, **options: object) -> Engine:
        if system is not None:
            monkeypatch.setattr("offload.tiers.disk.Posix", lambda: system)
        ram = ram_for_share(path, share, context=CONTEXT)
        given = {"context": CONTEXT, "allow_slow": True, "usage": "off"} | options
        return offload.load(path, ram=ram, **given)

    return make


def generate(engine: Engine, count: int = 12) -> list[int]:
    return [step.token_id for step in engine.generate(PROMPT, max_tokens=count, temperature=0.0, ignore_eos=True)]


@pytest.fixture(scope="module")
def expected(store: Path) -> list[int]:
    with offload.load(store, context=CONTEXT, usage="off") as engine:
        return generate(engine)


@pytest.mark.parametrize(
    "disk",
    [{"delay_s": 0.003}, {"short": 0.3, "delay_s": 0.001, "seed": 1}, {"fail": 0.15, "seed": 2}, {"refuse": "open"}],
    ids=["slow and reordering", "short", "failing", "buffered"],
)
def test_tokens_are_the_same_whatever_the_drive_does(
    load: Callable[..., Engine], expected: list[int], disk: dict[str, float]
) -> None:
    for policy, share, prefetch in (
        ("ema+tokens", 0.1, True),
        ("lru", 0.3, False),
        ("lfu", 0.2, True),
        ("ema", 0.6, True),
    ):
        with load(Unruly(**disk), share, policy=policy, prefetch=prefetch) as engine:
            assert generate(engine) == expected, (policy, share, prefetch)
            ram = engine.counters()["ram"]
            assert ram["misses"] > 0 and bool(ram["retries"]) == bool(disk.keys() & {"short", "fail"})


def test_a_drive_that_fails_for_good_is_named_and_the_engine_goes_on(
    load: Callable[..., Engine], expected: list[int], store: Path
) -> None:
    system = Unruly()
    with load(system, 0.3) as engine:
        generate(engine, 3)
        layer = Store.open(store).config.moe_layers[-1]
        name = next(store.glob(f"*{layer:05d}-experts.safetensors"))
        system.broken.add(str(name))
        with pytest.raises(
            DiskError, match=rf"expert \d+ of layer {layer} .*at offset \d+: Input/output error"
        ) as found:
            generate(engine)
        assert str(name) in str(found.value)
        assert len(engine.summary().response.token_ids) < 12
        system.broken.clear()
        assert generate(engine) == expected


def test_a_store_that_is_deleted_during_a_run(load: Callable[..., Engine], store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    with load(path=copy, share=0.3) as engine:
        generate(engine, 1)  # opens every file: descriptors outlive names
        shutil.rmtree(copy)
        assert len(generate(engine)) == 12
    copy = shutil.copytree(store, tmp_path / "copy")
    with load(path=copy, share=0.3) as engine:
        shutil.rmtree(copy)
        with pytest.raises(DiskError, match="No such file"):
            generate(engine)


def test_an_interrupt_during_a_read_leaves_the_engine_usable(load: Callable[..., Engine], expected: list[int]) -> None:
    system = Unruly()
    with load(system, 0.3) as engine:
        system.gate.clear()  # every read hangs

        def interrupt() -> None:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            threading.Timer(0.2, system.gate.set).start()

        # It is ignored in processes that a shell put into the background.
        former = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            generate(engine)
        signal.signal(signal.SIGINT, former)
        assert generate(engine) == expected


def test_two_engines_on_one_store_and_many_threads(load: Callable[..., Engine], expected: list[int]) -> None:
    with load(share=0.3) as one, load(share=0.6, threads=2) as other:
        results: dict[str, list[int]] = {}
        threads = [
            threading.Thread(target=lambda name=name, engine=engine: results.update({name: generate(engine)}))
            for name, engine in (("one", one), ("other", other))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {"one": expected, "other": expected}
        assert generate(one) == expected


def test_both_copies_are_read_and_one_covers_for_the_other(
    load: Callable[..., Engine], expected: list[int], store: Path, tmp_path: Path
) -> None:
    mirror = shutil.copytree(store, tmp_path / "mirror")
    system = Unruly(delay_s=0.001)
    with load(system, 0.3, mirror=mirror) as engine:
        assert generate(engine) == expected
        assert {Path(name).parent for name in system.names.values()} == {store, mirror}
        system.broken |= {str(path) for path in store.glob("*-experts.safetensors")}
        assert generate(engine) == expected
        assert engine.counters()["ram"]["retries"] > 0


def test_only_a_copy_of_the_store_is_a_mirror(store: Path, fp8_store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    copy = shutil.copytree(store, tmp_path / "copy")
    assert check_mirror(opened, copy) == copy
    with pytest.raises(StoreError, match="is the store itself"):
        check_mirror(opened, store)
    with pytest.raises(StoreError, match="another model or other codecs"):
        check_mirror(opened, fp8_store)
    with pytest.raises(StoreError, match="--mirror .* cannot be used: .*expertpager.json"):
        check_mirror(opened, tmp_path)
    next(copy.glob("*-experts.safetensors")).write_bytes(b"short")
    with pytest.raises(StoreError, match="cannot be used: .*5 bytes, expected"):
        offload.load(store, mirror=copy)


@pytest.fixture
def learned(store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to learn beside."""
    return shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("*.npz"))


def test_what_was_learned_is_kept_beside_the_store(load: Callable[..., Engine], learned: Path) -> None:
    misses = []
    for _ in range(2):
        with load(path=learned, usage="auto", prefetch=False) as engine:
            generate(engine, 30)
            misses.append(engine.counters()["ram"]["misses"])
    assert (learned / "expert-usage.npz").exists() and misses[1] < misses[0]
    with load(path=learned, usage="off", prefetch=False) as engine:
        generate(engine, 30)
        assert engine.counters()["ram"]["misses"] == misses[0]


def test_a_recording_neither_uses_nor_changes_what_was_learned(
    load: Callable[..., Engine], learned: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        with load(path=learned, usage="auto", trace=tmp_path / name) as engine:
            generate(engine)
    assert not (learned / "expert-usage.npz").exists()


def test_a_damaged_usage_file_is_ignored_with_a_notice(
    load: Callable[..., Engine], learned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = learned / "expert-usage.npz"
    file.write_bytes(b"PK\x03\x04 not what it seems")
    with caplog.at_level(logging.WARNING, "expertpager"), load(path=learned, usage="auto") as engine:
        generate(engine)
    assert f"{file} is ignored" in caplog.text
    caplog.clear()
    with load(path=learned, usage="auto"):
        assert not caplog.records


def test_a_store_that_cannot_be_written_keeps_what_it_learned_in_the_users_cache(
    load: Callable[..., Engine], learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != learned)  # the tests may run as root
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with load(path=learned, usage="auto") as engine:
        generate(engine)
    assert not (learned / "expert-usage.npz").exists()
    assert len(list((tmp_path / "home").rglob("store-*.npz"))) == 1


def test_more_ram_than_there_is_is_refused_before_anything_is_allocated(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.engine.backend.memory", lambda: Memory(100 << 20, 60 << 20, limited_by_group=True))
    with pytest.raises(
        BudgetError, match=r"--ram 64.0 GiB: .* and its control group allows 100.0 MiB; give --ram 100MiB"
    ):
        offload.load(store, ram="64GiB", context=CONTEXT)
    with pytest.raises(UsageError, match="prefetch is 3"):
        offload.load(store, prefetch=3)
