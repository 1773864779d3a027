"""Which kernel the dispatcher chooses by the measurements in the repository."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.dispatch_measurements import update_measurements, write_measurements
from vllm_afbs.backends.cuda import dispatch
from vllm_afbs.backends.cuda.card import Card
from vllm_afbs.backends.cuda.dispatch import (
    KERNEL_CHOICES,
    KernelChoice,
    LayerKind,
    Measurement,
    Measurements,
    fastest_kernel,
    measurements,
)


def row(head_dim: int, kv_len: int, density: float, *seconds: float) -> Measurement:
    return Measurement(
        head_dim, 4, kv_len, density, dict(zip(KERNEL_CHOICES, seconds, strict=True))
    )


CARD = "sm90-fa3"
HOST_SECONDS: dict[KernelChoice, float] = {"dense": 0.1, "tiles": 0.3, "triton": 0.2}
MADE_UP = Measurements(
    HOST_SECONDS,
    (
        row(64, 8192, 1.0, 1.0, 2.0, 3.0),
        row(64, 8192, 0.2, 1.0, 1.2, 0.5),
        row(128, 8192, 1.0, 1.0, 1.1, 2.0),
        row(128, 8192, 0.5, 1.0, 0.6, 1.2),
        row(128, 8192, 0.1, 1.0, 0.2, 0.1),
        row(128, 131072, 1.0, 100.0, 101.0, 200.0),
        row(128, 131072, 0.1, 100.0, 13.0, 20.0),
    ),
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "measurements", lambda: {CARD: MADE_UP})
    dispatch._seconds_per_score.cache_clear()
    yield
    dispatch._seconds_per_score.cache_clear()


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("head_dim", "kv_len", "density", "kernel"),
    [
        (64, 8192, 1.0, "dense"),
        (64, 8192, 0.2, "triton"),
        (80, 9000, 0.05, "triton"),  # the nearest head size, and below the lowest density
        (128, 8192, 0.95, "dense"),
        (128, 8192, 0.6, "tiles"),
        (128, 8192, 0.1, "triton"),
        (128, 40000, 0.1, "tiles"),  # 131072 is nearer than 8192 in proportion
        (256, 1_000_000, 1.0, "dense"),
    ],
)
def test_nearest_measurements_choose(
    head_dim: int, kv_len: int, density: float, kernel: KernelChoice
) -> None:
    assert fastest_kernel(CARD, LayerKind(head_dim), kv_len, density, 4 * kv_len**2 // 2) == kernel


@pytest.mark.parametrize(
    ("kind", "kernels", "kernel"),
    [
        (LayerKind(128, 64, 64), KERNEL_CHOICES, "triton"),
        (LayerKind(100, 64, 32), KERNEL_CHOICES, "triton"),  # the nearest head size, then blocks
        (LayerKind(128, 128, 64), KERNEL_CHOICES, "tiles"),
        (LayerKind(128, 256, 128), KERNEL_CHOICES, "dense"),  # 128x128 is nearest
        (LayerKind(64, 64, 64), KERNEL_CHOICES, "triton"),  # heads of 64 have rows of 128x128 alone
        (LayerKind(128, 64, 64), ("dense", "tiles"), "dense"),
        (LayerKind(128, 128, 64), ("dense", "triton"), "dense"),
        (LayerKind(128, 128, 128), ("tiles", "triton"), "triton"),
    ],
    ids=str,
)
def test_blocks_have_rows_of_their_own(
    kind: LayerKind,
    kernels: tuple[KernelChoice, ...],
    kernel: KernelChoice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_blocks(block_q: int, block_k: int, **seconds: float) -> Measurement:
        by_kernel = {each: seconds[each] for each in KERNEL_CHOICES if each in seconds}
        return Measurement(128, 4, 8192, 0.2, by_kernel, block_q, block_k)

    rows = (
        Measurement(64, 4, 8192, 0.2, {"dense": 1.0, "tiles": 1.1, "triton": 0.1}),
        of_blocks(128, 128, dense=1.0, tiles=2.1, triton=1.9),
        of_blocks(128, 64, dense=1.0, tiles=0.1, triton=1.9),
        of_blocks(64, 64, dense=1.0, triton=0.1),  # on pages that tiles cannot use
    )
    host: dict[KernelChoice, float] = dict.fromkeys(KERNEL_CHOICES, 0.1)
    monkeypatch.setattr(dispatch, "measurements", lambda: {CARD: Measurements(host, rows)})
    dispatch._seconds_per_score.cache_clear()
    num_scores = 4 * 8192**2 // 2
    assert fastest_kernel(CARD, kind, 8192, 0.2, num_scores, kernels) == kernel
    dispatch._seconds_per_score.cache_clear()


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize(
    ("share", "density", "kernel"),
    [
        (1.0, 0.5, "tiles"),  # 0.6 + 0.3 against 1.0 + 0.1
        (0.4, 0.5, "dense"),  # 0.24 + 0.3 against 0.4 + 0.1
        (0.2, 0.1, "triton"),  # 0.02 + 0.2 against 0.2 + 0.1
        (0.1, 0.1, "dense"),  # 0.01 + 0.2 against 0.1 + 0.1
    ],
)
def test_small_work_is_not_worth_the_host(
    share: float, density: float, kernel: KernelChoice
) -> None:
    """A few heads, or a short chunk of a long prompt: the host takes as long as for many."""
    assert (
        fastest_kernel(CARD, LayerKind(128), 8192, density, round(share * 4 * 8192**2 / 2))
        == kernel
    )


def test_repository_holds_what_the_dispatcher_needs() -> None:
    known = measurements()[CARD]
    assert known.host_seconds.keys() == set(KERNEL_CHOICES)
    assert known.host_seconds["dense"] < known.host_seconds["triton"]
    by_shape = itertools.groupby(known.rows, key=lambda row: (row.head_dim, row.kv_len))
    for _, rows in by_shape:
        densities = sorted(row.density for row in rows)
        assert densities[0] <= 0.1
        assert densities[-1] == 1.0
    assert {64, 128} <= {row.head_dim for row in known.rows}


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "kv_len", "density", "dense"),
    [
        (9, 64, 8192, 0.37, True),  # SmolLM2-135M: dense takes 0.15 ms a layer
        (32, 128, 8192, 0.2, False),
        (32, 128, 131072, 0.2, False),
    ],
)
def test_repository_measurements_tell_small_models_from_large(
    num_heads: int, head_dim: int, kv_len: int, density: float, dense: bool
) -> None:
    kernel = fastest_kernel(CARD, LayerKind(head_dim), kv_len, density, num_heads * kv_len**2 // 2)
    assert (kernel == "dense") is dense


def test_variants_are_chosen_by_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_fp8(density: float, *seconds: float) -> Measurement:
        return dataclasses.replace(row(128, 8192, density, *seconds), variant="fp8")

    # Dense attention gains more from FP8 than tiles do.
    rows = (*MADE_UP.rows, in_fp8(1.0, 0.5, 0.9, 2.0), in_fp8(0.1, 0.5, 0.15, 0.4))
    known = {CARD: Measurements(HOST_SECONDS, rows)}
    monkeypatch.setattr(dispatch, "measurements", lambda: known)
    dispatch._seconds_per_score.cache_clear()
    num_scores = 4 * 8192**2 // 2
    for variant, kernel in (("", "tiles"), ("fp8", "dense"), ("sinks", "tiles")):
        assert (
            fastest_kernel(CARD, LayerKind(128, variant=variant), 8192, 0.6, num_scores) == kernel
        )
    for variant, seconds in (("", 1.0), ("fp8", 0.5), ("sinks", 1.0)):
        found = dispatch.dense_seconds(CARD, LayerKind(128, variant=variant), 8192, num_scores)
        assert found == pytest.approx(seconds, rel=1e-3)
    dispatch._seconds_per_score.cache_clear()


def test_variants_are_named_by_what_the_layer_has() -> None:
    names = [dispatch.variant_name(*has) for has in itertools.product([False, True], repeat=2)]
    assert names == ["", "sinks", "fp8", "fp8-sinks"]


def test_updating_a_variant_leaves_the_plain_layer(tmp_path: Path) -> None:
    new = dataclasses.replace(row(64, 32768, 0.5, 1.0, 2.0, 3.0), variant="sinks")
    updated = update_measurements(MADE_UP, HOST_SECONDS | {"tiles": 0.4}, [new])
    assert updated == Measurements(HOST_SECONDS, (*MADE_UP.rows, new))
    path = tmp_path / "measured.json"
    write_measurements(path, {CARD: updated})
    assert Measurements.read(path) == {CARD: updated}
    again = dataclasses.replace(new, density=0.2)
    assert update_measurements(updated, HOST_SECONDS, [again]).rows == (*MADE_UP.rows, again)


def test_rows_without_blocks_are_of_128(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(
        '{"sm90-fa3": {"host_seconds": {"dense": 0.1}, "rows": [{"head_dim": 64, "num_heads": 4, '
        '"kv_len": 8192, "density": 0.5, "seconds": {"dense": 1.0}}]}}'
    )
    (row,) = Measurements.read(path)["sm90-fa3"].rows
    assert row.kind == LayerKind(64, 128, 128)
    text = path.read_text()
    write_measurements(path, Measurements.read(path))
    assert json.loads(path.read_text()) == json.loads(text)


def test_updating_replaces_only_the_measured_shapes(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    both = {CARD: MADE_UP, "sm80-fa2": Measurements({"dense": 0.1, "triton": 0.2}, ())}
    write_measurements(path, both)
    assert Measurements.read(path) == both
    new = row(64, 32768, 0.5, 1.0, 2.0, 3.0)
    updated = update_measurements(MADE_UP, HOST_SECONDS | {"tiles": 0.4}, [new])
    assert updated.rows == (*MADE_UP.rows[2:], new)
    assert updated.host_seconds["tiles"] == 0.4
    smaller = dataclasses.replace(new, block_k=64, seconds={"dense": 1.0, "triton": 2.0})
    again = update_measurements(updated, {"dense": 0.2, "triton": 0.2}, [smaller])
    assert again.rows == (*updated.rows, smaller)
    assert again.host_seconds == {"dense": 0.2, "tiles": 0.4, "triton": 0.2}
    write_measurements(path, {CARD: again})
    assert Measurements.read(path) == {CARD: again}
    assert update_measurements(None, HOST_SECONDS, [new]) == Measurements(HOST_SECONDS, (new,))


def test_a_card_without_flash_attention_3_chooses_between_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds: dict[KernelChoice, float] = {"dense": 1.0, "triton": 0.5}
    ampere = Measurements({"dense": 0.1, "triton": 0.2}, (Measurement(128, 4, 8192, 0.2, seconds),))
    monkeypatch.setattr(dispatch, "measurements", lambda: {CARD: MADE_UP, "sm80-fa2": ampere})
    dispatch._seconds_per_score.cache_clear()
    for share, kernel in ((1.0, "triton"), (0.1, "dense")):  # 0.7 and 1.1, 0.25 and 0.2
        num_scores = round(share * 4 * 8192**2 / 2)
        assert fastest_kernel("sm80-fa2", LayerKind(128), 8192, 0.2, num_scores) == kernel
    assert dispatch.dense_seconds(
        "sm80-fa2", LayerKind(128), 8192, 4 * 8192**2 // 2
    ) == pytest.approx(1.0, rel=1e-3)
    # A card that nobody measured is taken for an H100, for the estimate alone.
    for card in ("sm89-fa2", CARD):
        assert dispatch.dense_seconds(card, LayerKind(64), 8192, 4 * 8192**2 // 2) == pytest.approx(
            1.0, rel=1e-3
        )
    dispatch._seconds_per_score.cache_clear()


def test_a_card_that_was_not_measured_is_named_once(logged: list[str]) -> None:
    dispatch.is_measured.cache_clear()
    assert dispatch.is_measured(Card(90, 3).name)
    assert not logged
    for _ in range(3):
        assert not dispatch.is_measured(Card(89, 2).name)
    (line,) = logged
    assert line.startswith("Attention runs dense: ")
    assert f"lists {', '.join(measurements())}, not sm89-fa2" in line
