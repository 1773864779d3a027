"""The benchmark's command line."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import quality
from benchmarks.command import benchmark_parser
from benchmarks.domains import Domain, add_texts, read_domains
from benchmarks.quality.bench import Bench, Candidates, Plan, Record, Setting
from benchmarks.quality.results import rows_of, show
from vllm_afbs.commands.results import write_rows
from vllm_afbs.demo.assets import prepare
from vllm_afbs.evaluate.baselines import VARIANTS, baselines, of_profile, variants
from vllm_afbs.evaluate.in_process import Runner
from vllm_afbs.evaluate.methods import Method
from vllm_afbs.evaluate.suite import Amounts
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.tuning.journal import FILE_NAME, Journal

ANY = "any"
OURS, THEIRS = "afbs", "SpargeAttn, tuned"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark on the demo's model."""
    args = _parser().parse_args(argv)
    assets = prepare()
    domains = read_domains(args.texts, assets)
    profiles = _profiles(args.profile, {domain.name for domain in domains})
    settings = _settings(domains, args.settings)
    plan = Plan(
        str(assets.model_dir),
        Amounts(args.length, args.windows, args.prefixes, 0, 1, 0),
        args.per_task,
        tuple(args.retrieval_sparsities),
        tuple(args.sparge_tolerances),
        min(args.sparge_length, args.length),
    )
    model = open_model(plan.model)
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        # In the form in which it is read back, with lists instead of tuples.
        header = json.loads(json.dumps({**asdict(plan), "texts": sorted(args.texts)}))
        journal = Journal(work / FILE_NAME, header)
        runner = Runner(model)
        records: list[Record] = []
        for setting in settings:
            bench = Bench(plan, setting, model, runner, journal)
            ours = profiles.get(setting.calibration.name, []) + profiles.get(ANY, [])
            candidates = _candidates(bench, ours, args)
            for record in bench.run(candidates, args.sparsities):
                records.append(record)
                if args.output:
                    write_rows(args.output, rows_of(records, args.length))
    show(records)


def _settings(domains: Sequence[Domain], wanted: Sequence[str] | None) -> list[Setting]:
    """Makes a setting of each kind of text, and one of the first with methods set on the second."""
    # Facts are hidden in one kind of text only: more prompts there tell as much as more kinds.
    settings = [Setting(domain, domain, domain is domains[0]) for domain in domains]
    if len(domains) > 1:
        settings.append(Setting(domains[1], domains[0]))
    names = [setting.name for setting in settings]
    if unknown := sorted(set(wanted or names) - set(names)):
        raise SystemExit(f"--settings: one of {', '.join(names)} expected, got {unknown[0]}")
    return [setting for setting in settings if setting.name in (wanted or names)]


def _candidates(bench: Bench, ours: Sequence[str], args: argparse.Namespace) -> Candidates:
    """Makes the methods that were asked for, by name."""
    methods = [*baselines(), *(variants() if args.variants else ())]
    candidates = {method.name: [method] for method in methods}
    if ours:
        candidates[OURS] = [_of_file(Path(path)) for path in ours]
        for change, fields in VARIANTS.items() if args.variants else ():
            changed = [_of_file(Path(path), given=None, **fields) for path in ours]
            candidates[f"{OURS}, {change}"] = changed
    wanted = args.methods or [*candidates, THEIRS]
    if THEIRS in wanted:
        candidates[THEIRS] = bench.tuned_by_spargeattn()
    return {name: each for name, each in candidates.items() if name in wanted}


def _of_file(path: Path, **fields: Any) -> Method:
    profile = load_profile(path)
    # The journal keeps steps under this name: another profile in the same file is measured again.
    return of_profile(f"{path.stem} {profile.profile_id}", profile, min_length=0, **fields)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(quality.__doc__)
    add_texts(parser)
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME=PROFILE",
        help=f"a profile tuned on the text of this name, or with the name {ANY!r} for all texts "
        "(may be given several times)",
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="measure only these, by name"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help="measure only these, as the results name them: a text's name, or 'TEXT by TEXT'",
    )
    parser.add_argument(
        "--variants", action="store_true", help="measure variants of the selector, too"
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=2, help="windows to measure perplexity on")
    parser.add_argument(
        "--prefixes", type=int, default=8, help="prompts whose next token is scored"
    )
    parser.add_argument("--per-task", type=int, default=5, help="prompts of each retrieval task")
    parser.add_argument("--retrieval-sparsities", type=float, nargs="*", default=[0.7])
    parser.add_argument("--sparge-tolerances", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--sparge-length", type=int, default=4096)
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for the measurements; another run with it continues from there",
    )
    return parser


def _profiles(given: Sequence[str], texts: set[str]) -> dict[str, list[str]]:
    profiles: dict[str, list[str]] = {}
    for each in given:
        name, _, path = each.partition("=")
        if name not in texts | {ANY} or not path:
            names = ", ".join(sorted(texts | {ANY}))
            raise SystemExit(f"--profile: NAME=PROFILE with a NAME of {names} expected, got {each}")
        profiles.setdefault(name, []).append(path)
    return profiles


if __name__ == "__main__":
    main()
