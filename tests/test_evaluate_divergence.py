"""The divergences against scipy, and the bound they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr

from vllm_afbs.evaluate.divergence import (
    SMALLEST_MASS,
    agreement_length,
    coarsen,
    kl_divergence,
    total_variation,
)

Distribution = dict[int, float]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Distribution, Distribution]:
    """Two distributions over the same tokens; both keep at least 1 % elsewhere."""
    size = draw(st.integers(2, 30))
    weights = st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)
    drawn = [np.array(draw(weights)) for _ in range(2)]
    p, q = (dict(enumerate((0.99 * w / w.sum()).tolist())) for w in drawn)
    return p, q


def top(p: Distribution, k: int) -> Distribution:
    return dict(sorted(p.items(), key=lambda item: -item[1])[:k])


def whole(p: Distribution) -> np.ndarray:
    values = np.array([p[token] for token in sorted(p)])
    return np.append(values, 1 - values.sum())


@given(pairs())
def test_with_all_tokens_known_it_is_what_scipy_says(
    both: tuple[Distribution, Distribution],
) -> None:
    p, q = both
    assert kl_divergence(p, q) == pytest.approx(rel_entr(whole(p), whole(q)).sum(), abs=1e-9)
    assert total_variation(p, q) == pytest.approx(np.abs(whole(p) - whole(q)).sum() / 2, abs=1e-9)


@given(pairs(), st.integers(1, 10), st.integers(1, 10))
def test_from_the_top_it_is_a_lower_bound(
    both: tuple[Distribution, Distribution], left: int, right: int
) -> None:
    p, q = both
    kl = kl_divergence(top(p, left), top(q, right))
    tv = total_variation(top(p, left), top(q, right))
    assert -1e-9 <= kl <= rel_entr(whole(p), whole(q)).sum() + 1e-9
    assert -1e-9 <= tv <= np.abs(whole(p) - whole(q)).sum() / 2 + 1e-9


def test_hand_values() -> None:
    p, q = {1: 0.5, 2: 0.25}, {1: 0.25, 2: 0.5}
    assert kl_divergence(p, q) == pytest.approx(0.25 * math.log(2))
    assert total_variation(p, q) == pytest.approx(0.25)
    assert kl_divergence(p, p) == total_variation(p, p) == 0


def test_token_known_to_one_side_goes_into_the_rest() -> None:
    left, right = coarsen({1: 0.6, 2: 0.3}, {1: 0.5, 3: 0.4})
    assert left == pytest.approx({1: 0.6, None: 0.4})
    assert right == pytest.approx({1: 0.5, None: 0.5})


def test_certain_token_leaves_no_infinite_divergence() -> None:
    certain, split = {1: 1.0, 2: 0.0}, {1: 0.5, 2: 0.4}
    assert coarsen(certain, split)[0] == {1: 1.0, None: SMALLEST_MASS}
    assert math.isfinite(kl_divergence(split, certain))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0)],
)
def test_agreement_length(left: list[int], right: list[int], expected: int) -> None:
    assert agreement_length(left, right) == expected
