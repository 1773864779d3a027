"""What each level of a profile costs and gains, and how sure that is."""

import math

from vllm_afbs.profile.schema import Level, Profile

KL_BY_WINDOW = "level_kl_by_window"
"""Name in the tuner's settings: by level, the divergence over each window that was measured."""

MEASURED_AT = "levels_measured_at"
"""Name in the tuner's settings: tokens of these windows."""


def measured_at(profile: Profile) -> int:
    """Tokens of the windows that the whole model was run over."""
    return int(profile.tuner.settings.get(MEASURED_AT, profile.max_seq_len))


def level_rows(profile: Profile) -> list[dict[str, str]]:
    """One row for each level, from nearly lossless to fast; the default one is marked."""
    return [
        {
            "level": f"{level.name} *" if level.name == profile.default_level else level.name,
            "tolerance": "" if level.tolerance is None else f"{level.tolerance:.3g}",
            **_by_length(level),
            **_whole_model(profile, level),
        }
        for level in profile.levels
    ]


def _by_length(level: Level) -> dict[str, str]:
    """Sparsity and predicted speedup of attention at each length."""
    cells = {}
    for each in level.by_length:
        cell = f"{each.sparsity:.1%}"
        if each.attention_time_ratio is not None:
            cell += f", {1.0 / each.attention_time_ratio:.2f}x"
        cells[f"{each.length} tokens"] = cell
    return cells


def _whole_model(profile: Profile, level: Level) -> dict[str, str]:
    """Divergence with its range over windows, and the change of perplexity."""
    whole = level.whole_model
    if whole is None:
        return {"KL, nats": "", "windows": "", "perplexity": ""}
    measured = profile.tuner.settings.get(KL_BY_WINDOW, {}).get(level.name, [])
    kl = f"{whole.kl:.5f}"
    if len(measured) > 1:
        mean = sum(measured) / len(measured)
        square = sum((each - mean) ** 2 for each in measured) / (len(measured) - 1)
        kl += f" ± {math.sqrt(square / len(measured)):.5f}"
    change = whole.perplexity / whole.dense_perplexity - 1.0
    return {"KL, nats": kl, "windows": str(len(measured) or ""), "perplexity": f"{change:+.2%}"}
