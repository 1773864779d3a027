"""Stage 3: held-out text has the last word on each head's thresholds.

A head has to be accepted on every text: the largest of its errors counts. The error on a text is
the mean over the text's held-out windows, and each window has an equal part of the scored rows.
"""

import torch

from benchmarks.theta_tuner.results import Refined, Validated
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.profile.schema import HeadProfile, Measurement
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY
from vllm_afbs.tuning.search.depth import depth_of, tau_of
from vllm_afbs.tuning.search.evaluator import HeadScores
from vllm_afbs.tuning.search.results import HELD_OUT_SLACK
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.windows import by_text

HELD_OUT_Q_BLOCKS = 32
"""Query blocks of a text that are scored, spread over its windows: as many as ``REFINE_Q_BLOCKS``,
which was chosen on SmolLM2-135M, however long the context is."""
_BACK_OFFS = 4
"""Attempts to bring a head's held-out error down before it runs dense. On 135 heads of SmolLM2-135M
and three tolerances, no head backed off too far."""


def validate(
    settings: SearchSettings, scorer: LayerScorer, refined: Refined, q_blocks: tuple[int, int]
) -> Validated:
    """Backs heads off until their held-out error is accepted, at last to dense.

    Args:
        settings: The job's settings.
        scorer: The layer's evaluators.
        refined: Where stage 2 ended.
        q_blocks: Query blocks that stages 1 and 2 scored; the calibration text's measurements in
            the profile are made on the same.

    Returns:
        Each head's thresholds, measured on the calibration window and on held-out text.
    """
    theta = refined.theta
    # In fp32, as stage 2 compares it: a tenth is 1 - 0.9, which is less than 0.1 in fp64.
    tau = torch.where(refined.sparsity.float() >= MIN_SPARSITY, refined.tau, 1.0)
    tau, held_out = _back_off(settings, scorer, tau, theta)
    tau = torch.where(held_out.sparsity >= MIN_SPARSITY, tau, 1.0)
    calibration = _calibration(settings, scorer, refined, tau, theta, q_blocks)
    heads = (
        HeadProfile(
            tau=float(tau[head]),
            theta=min(1.0, float(theta[head])) if tau[head] < 1.0 else THETA_OFF,
            calibration=[_measurement(length, tau, s, head) for length, s in calibration],
            validation=_measurement(settings.longest, tau, held_out, head),
        )
        for head in range(len(tau))
    )
    return Validated(tuple(heads))


def _back_off(
    settings: SearchSettings, scorer: LayerScorer, tau: torch.Tensor, theta: torch.Tensor
) -> tuple[torch.Tensor, HeadScores]:
    limit = HELD_OUT_SLACK * settings.tolerance
    scores = _held_out(settings, scorer, HeadThresholds(tau, theta), tau < 1.0)
    for attempt in range(1, _BACK_OFFS + 2):
        above = (tau < 1.0) & (scores.error > limit)
        if not above.any():
            break
        # Log error falls by about as much as depth grows. Each further attempt goes farther.
        step = attempt * torch.log(scores.error / limit).float().clamp_min(0.1)
        deeper = tau_of(depth_of(tau) + step) if attempt <= _BACK_OFFS else torch.ones_like(tau)
        tau = torch.where(above, deeper, tau)
        again = _held_out(settings, scorer, HeadThresholds(tau, theta), above & (tau < 1.0))
        scores = _merge(above, again, scores)
    return tau, scores


def _held_out(
    settings: SearchSettings, scorer: LayerScorer, thresholds: HeadThresholds, heads: torch.Tensor
) -> HeadScores:
    errors, sparsities = [], []
    for windows in by_text(scorer.held_out):
        q_blocks = HELD_OUT_Q_BLOCKS // len(windows)
        scores = [
            scorer.score(scorer.evaluator(window, settings.longest, q_blocks), thresholds, heads)
            for window in windows
        ]
        errors.append(torch.stack([each.error for each in scores]).mean(dim=0))
        sparsities += [each.sparsity for each in scores]
    return HeadScores(torch.stack(errors).amax(dim=0), torch.stack(sparsities).mean(dim=0))


def _calibration(
    settings: SearchSettings,
    scorer: LayerScorer,
    refined: Refined,
    tau: torch.Tensor,
    theta: torch.Tensor,
    q_blocks: tuple[int, int],
) -> list[tuple[int, HeadScores]]:
    """The final thresholds' scores at every length, those of stage 2 used where they still hold."""
    explored, refined_blocks = q_blocks
    thresholds = HeadThresholds(tau, theta)
    measured = []
    for length in settings.lengths[:-1]:
        evaluator = scorer.evaluator(CALIBRATION, length, explored)
        measured.append((length, scorer.score(evaluator, thresholds, tau < 1.0)))
    known = HeadScores(refined.error, refined.sparsity)
    moved = (tau < 1.0) & (tau != refined.tau)
    evaluator = scorer.evaluator(CALIBRATION, settings.longest, refined_blocks)
    again = scorer.score(evaluator, thresholds, moved)
    return [*measured, (settings.longest, _merge(moved, again, known))]


def _merge(heads: torch.Tensor, new: HeadScores, old: HeadScores) -> HeadScores:
    return HeadScores(
        torch.where(heads, new.error, old.error), torch.where(heads, new.sparsity, old.sparsity)
    )


def _measurement(length: int, tau: torch.Tensor, scores: HeadScores, head: int) -> Measurement:
    if tau[head] >= 1.0:
        return Measurement(length=length, error=0.0, sparsity=0.0)
    # A head that keeps all blocks at a short length can come out at -1e-17.
    sparsity = max(0.0, float(scores.sparsity[head]))
    return Measurement(length=length, error=float(scores.error[head]), sparsity=sparsity)
