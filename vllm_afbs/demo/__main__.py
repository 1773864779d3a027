"""``python -m vllm_afbs.demo``: tune a small real model, serve it, compare with a stock server."""

import argparse
import os
import platform
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_afbs.commands.extras import missing_extra
from vllm_afbs.demo.assets import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    AssetError,
    Assets,
    prepare,
    read_token_ids,
)

PROGRAM = "python -m vllm_afbs.demo"
MAX_TOKENS = 64
WARM_UP_TOKENS = 2304
"""Longer than the shortest calibrated context, so that the sparse path is warm too."""
FEWEST_PROMPT_TOKENS = 6000
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    options = _parser().parse_args(arguments)
    if reason := missing_extra("demo"):
        return _fail(reason)
    end_in_order()
    from vllm_afbs.demo.server import ServerError, vllm_command

    try:
        vllm_command()  # refuses a missing vLLM before the tuner runs for minutes
        _run(options)
    except KeyboardInterrupt:
        print("\nInterrupted; the servers are stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (AssetError, DemoError, ServerError, OSError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return EXIT_FAILED


def end_in_order() -> None:
    """Turns SIGTERM into SystemExit, so that finally clauses run and stop the servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=f"Tune {MODEL_NAME}, then send one long prompt to a stock vLLM server, to one "
        "with the afbs backend and no profile, and to one with the profile.",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="serve this profile; without it, one is tuned first, which takes several minutes",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_prompt_tokens,
        default=7936,
        metavar="N",
        help=f"length of the prompt, at least {FEWEST_PROMPT_TOKENS} (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("demo-results"),
        help="directory for the profile, the results as JSON and CSV, and the servers' logs "
        "(default: %(default)s)",
    )
    return parser


def _prompt_tokens(text: str) -> int:
    most = MAX_MODEL_LEN - MAX_TOKENS
    value = int(text)
    if not FEWEST_PROMPT_TOKENS <= value <= most:
        raise argparse.ArgumentTypeError(
            f"expected a number from {FEWEST_PROMPT_TOKENS} to {most}, got {text}"
        )
    return value


def _run(options: argparse.Namespace) -> None:
    import httpx
    from openai import OpenAIError
    from rich.console import Console

    from vllm_afbs.demo import report
    from vllm_afbs.demo.comparison import arms, measure
    from vllm_afbs.profile.errors import ProfileError
    from vllm_afbs.profile.file import load_profile

    console = Console()
    output_dir: Path = options.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"Model and texts ({MODEL_NAME}, 4-bit weights dequantised) ...")
    assets = prepare()
    profile = options.profile or _tune(assets, output_dir / "profile.json")
    try:
        profile_id = load_profile(profile).profile_id
    except ProfileError as error:
        raise DemoError(str(error)) from None
    prompt, warm_up = _prompts(assets, options.prompt_tokens)
    outcomes = []
    for arm in arms(profile):
        log_file = output_dir / f"server-{arm.name}.log"
        console.print(f"Server '{arm.name}': start, warm-up, {len(prompt)} tokens ...")
        try:
            outcomes.append(measure(arm, assets.model_dir, prompt, warm_up, MAX_TOKENS, log_file))
        except (OpenAIError, httpx.HTTPError) as error:
            raise DemoError(f"server '{arm.name}': {error} Its log is {log_file}") from None
    report.write(outcomes, _setup(profile_id, len(prompt)), output_dir)
    report.show(outcomes, console)
    console.print(f"Also as JSON and CSV, with the servers' logs, in {output_dir}/")


def _tune(assets: Assets, output: Path) -> Path:
    command = [sys.executable, "-m", "vllm_afbs.tune", "--model", str(assets.model_dir)]
    command += ["--calibration", str(assets.calibration_file), "--output", str(output)]
    # An interrupted job goes on where it stopped; a finished profile is tuned again.
    status = subprocess.run([*command, "--resume"], check=False).returncode
    if status != 0:
        raise DemoError(f"the tuner ended with status {status}")
    return output


def _prompts(assets: Assets, num_tokens: int) -> tuple[list[int], list[int]]:
    """Cuts the prompt that is measured and the one that warms the server up, as token ids."""
    token_ids = read_token_ids(assets.model_dir, assets.prompt_file)
    if len(token_ids) < num_tokens + WARM_UP_TOKENS:
        raise DemoError(
            f"{assets.prompt_file}: at least {num_tokens + WARM_UP_TOKENS} tokens expected, "
            f"got {len(token_ids)}"
        )
    return token_ids[:num_tokens], token_ids[-WARM_UP_TOKENS:]


def _setup(profile_id: str, num_prompt_tokens: int) -> dict[str, Any]:
    """Records what the figures depend on."""
    return {
        "model": f"{MODEL_NAME}, dequantised from 4 bits",
        "profile_id": profile_id,
        "prompt_tokens": num_prompt_tokens,
        "answer_tokens": MAX_TOKENS,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm")},
    }


if __name__ == "__main__":
    sys.exit(main())
