"""Which way the measurements in the repository choose."""

import itertools
from pathlib import Path

import pytest

from vllm_afbs.cuda import dispatch
from vllm_afbs.cuda.dispatch import WAYS, Measurement, fastest_way, measurements


def row(head_dim: int, kv_len: int, density: float, *seconds: float) -> Measurement:
    return Measurement(head_dim, kv_len, density, dict(zip(WAYS, seconds, strict=True)))


MADE_UP = (
    row(64, 8192, 1.0, 1.0, 2.0, 3.0),
    row(64, 8192, 0.2, 1.0, 1.2, 0.5),
    row(128, 8192, 1.0, 1.0, 1.1, 2.0),
    row(128, 8192, 0.5, 1.0, 0.6, 1.2),
    row(128, 8192, 0.1, 1.0, 0.2, 0.1),
    row(128, 131072, 1.0, 100.0, 101.0, 200.0),
    row(128, 131072, 0.1, 100.0, 13.0, 20.0),
)


@pytest.mark.parametrize(
    ("head_dim", "kv_len", "density", "way"),
    [
        (64, 8192, 1.0, "dense"),
        (64, 8192, 0.2, "triton"),
        (80, 9000, 0.05, "triton"),  # the nearest head size, and below the lowest density
        (128, 8192, 0.95, "dense"),
        (128, 8192, 0.8, "tiles"),
        (128, 8192, 0.1, "triton"),
        (128, 40000, 0.1, "tiles"),  # 131072 is nearer than 8192 in proportion
        (256, 1_000_000, 1.0, "dense"),
    ],
)
def test_nearest_measurements_choose(
    head_dim: int, kv_len: int, density: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "measurements", lambda: MADE_UP)
    assert fastest_way.__wrapped__(head_dim, kv_len, density) == way


def test_repository_holds_what_the_dispatcher_needs() -> None:
    by_shape = itertools.groupby(measurements(), key=lambda row: (row.head_dim, row.kv_len))
    for _, rows in by_shape:
        densities = sorted(row.density for row in rows)
        assert densities[0] <= 0.1
        assert densities[-1] == 1.0
    assert {128} <= {row.head_dim for row in measurements()}


def test_updating_replaces_only_the_measured_head_sizes(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    dispatch.update_measurements(path, MADE_UP)
    assert dispatch.read_measurements(path) == MADE_UP
    new = row(64, 32768, 0.5, 1.0, 2.0, 3.0)
    dispatch.update_measurements(path, [new])
    assert dispatch.read_measurements(path) == (*MADE_UP[2:], new)
