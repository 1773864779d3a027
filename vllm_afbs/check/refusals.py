"""Tells what vLLM refuses from a fault of ours, by whose code raised the exception.

vLLM refuses a configuration with whatever exception its checks end in: besides ``ValueError`` a
``KeyError`` for a field of ``config.json`` that is missing, or an assertion without a message.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_afbs.commands.faults import keep_traceback
from vllm_afbs.files import printable

_LONGEST_REASON = 600
_OURS = __name__.partition(".")[0]


class RefusedError(ValueError):
    """A server would not start with what was given; the message is one line."""


@contextmanager
def refusals_of_vllm() -> Iterator[None]:
    """Turns what vLLM's own code raises into one line, and keeps the traceback in a file.

    Raises:
        RefusedError: vLLM raised something. What our code raises passes unchanged.
    """
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:
        original = _original(error)
        if not _is_raised_by_vllm(original):
            raise
        raise RefusedError(
            f"vLLM refuses this configuration: {_reason(error, original)}; "
            f"{keep_traceback(original, 'refused')}"
        ) from error


def _original(error: Exception) -> Exception:
    """What a check of vLLM's raised; pydantic wraps its ``ValueError`` or ``AssertionError``."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return error
    original = error.errors(include_url=False)[0].get("ctx", {}).get("error", error)
    return original if isinstance(original, Exception) else error


def _is_raised_by_vllm(error: Exception) -> bool:
    """Whether the innermost frame of vLLM's code or ours is vLLM's.

    vLLM calls our platform while it makes a configuration, and our platform calls vLLM's.
    """
    frames = traceback.walk_tb(error.__traceback__)
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    return [each for each in packages if each in ("vllm", _OURS)][-1:] == ["vllm"]


def _reason(error: Exception, original: Exception) -> str:
    """Why vLLM refuses, on one line."""
    from pydantic import ValidationError

    if isinstance(original, ValidationError):
        first = original.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    elif not str(original):
        line = traceback.extract_tb(original.__traceback__)[-1].line
        reason = f"{type(original).__name__}: {line}"
    elif type(original) is ValueError:  # vLLM's usual way, with a sentence
        reason = str(original)
    else:
        reason = f"{type(original).__name__}: {original}"
    reason = printable(" ".join(reason.split()))
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}..."
