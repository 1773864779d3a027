"""A whole tuning job: from a model and a text to a profile."""

import hashlib
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from vllm_afbs.profile import LayerProfile, Profile, TextSource, TunerRun
from vllm_afbs.tuning.capture import WINDOWS, capture, cut_windows
from vllm_afbs.tuning.explore import EXPLORE_Q_BLOCKS
from vllm_afbs.tuning.journal import FILE_NAME, Journal
from vllm_afbs.tuning.model import SourceModel
from vllm_afbs.tuning.scorer import SearchSettings
from vllm_afbs.tuning.search import REFINE_Q_BLOCKS, LayerSearch
from vllm_afbs.tuning.validation import HELD_OUT_SLACK, MIN_SPARSITY


@dataclass(frozen=True)
class Text:
    """A calibration text.

    Attributes:
        name: Where it came from.
        content: All of it.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


class Progress(Protocol):
    """Hears how far a job is."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of ``total`` units begins."""

    def advance(self, units: float) -> None:
        """So many more units are done, fractions included."""


def tune(
    model: SourceModel,
    text: Text,
    settings: SearchSettings,
    work: Path,
    progress: Progress,
) -> Profile:
    """Tunes every layer and head of a model.

    Args:
        model: The model.
        text: Cut into a calibration and a held-out window of the longest length.
        settings: The search's settings.
        work: Directory for the journal and the captures, made if there is none; a journal in it
            is gone on with.
        progress: Hears about it.

    Returns:
        The profile, with what it cost over all the job's runs.

    Raises:
        InputError: The model, the text or the journal cannot be used.
        OSError: The work directory cannot be written.
    """
    windows = cut_windows(model, text.content, text.name, settings.lengths[-1])
    work.mkdir(exist_ok=True)
    journal = Journal(
        work / FILE_NAME,
        {"model": model.digest(), "text": text.sha256, **asdict(settings)},
    )
    num_layers = model.fingerprint.num_layers
    progress.begin("Capturing", num_layers * len(WINDOWS))
    # Not a step of the journal: captures are files that are checked for, and seconds are added.
    start = time.perf_counter()
    taken = capture(model, windows, work, progress.advance)
    journal.step("capture", lambda: {"capture_seconds": time.perf_counter() - start})
    progress.begin("Tuning", num_layers)
    layers = [
        LayerSearch(settings, layer, taken, journal, progress.advance).run()
        for layer in range(num_layers)
    ]
    return _profile(model, text, settings, journal, layers)


def _profile(
    model: SourceModel,
    text: Text,
    settings: SearchSettings,
    journal: Journal,
    layers: list[LayerProfile],
) -> Profile:
    num_tokens = len(WINDOWS) * settings.lengths[-1]
    return Profile(
        model_name=model.name,
        model=model.fingerprint,
        block_q=settings.block_q,
        block_k=settings.block_k,
        min_seq_len=settings.lengths[0],
        max_seq_len=settings.lengths[-1],
        layers=layers,
        calibration_texts=[TextSource(name=text.name, sha256=text.sha256, num_tokens=num_tokens)],
        tuner=TunerRun(
            version=version("vllm-afbs"),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seed=settings.seed,
            tolerance=settings.tolerance,
            lengths=settings.lengths,
            settings={
                "held_out_slack": HELD_OUT_SLACK,
                "min_sparsity": MIN_SPARSITY,
                "explore_q_blocks": EXPLORE_Q_BLOCKS,
                "refine_q_blocks": REFINE_Q_BLOCKS,
                "windows": list(WINDOWS),
            },
            evaluations=int(journal.total("evaluations")),
            cost=journal.total("cost"),
            wall_seconds=journal.total("seconds") + journal.total("capture_seconds"),
        ),
    )
