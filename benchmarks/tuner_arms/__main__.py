"""The benchmark's command line."""

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import tuner_arms
from benchmarks.command import benchmark_parser
from benchmarks.domains import Domain, add_texts, read_domains
from benchmarks.tuner_arms.results import print_summary, sample_rows, time_rows
from benchmarks.tuner_arms.samples import ARMS, GroupFigures, Plan, sample
from benchmarks.tuner_arms.times import WAYS, time_arms
from vllm_afbs.commands.results import Row, write_rows
from vllm_afbs.demo.assets import prepare


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the arms on the demo's model."""
    args = _parser().parse_args(argv)
    assets = prepare()
    domains = read_domains(args.texts, assets)
    plan = Plan(
        str(assets.model_dir),
        sorted(args.lengths),
        args.tolerance,
        args.every,
        args.slow_heads,
        args.seeds,
    )
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        times = _timed(plan, domains[0], args.arms, args.timed_layers, work)
        for taken in _samples(plan, domains, args.arms, args.processes, work):
            rows = [*times]
            for name, samples in taken.items():
                rows += sample_rows(name, samples, args.arms, _setting(plan))
            if args.output:
                write_rows(args.output, rows)
    print_summary(rows)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(tuner_arms.__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--every", type=int, default=1, help="take every n-th layer")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=5, help="samples of each text")
    add_texts(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM")
    parser.add_argument(
        "--slow-heads",
        type=int,
        default=6,
        help="heads for the arms with an optimiser of each head's own, at most one of a layer; "
        "their layers are the oracle's",
    )
    parser.add_argument("--timed-layers", type=int, default=3, help="layers to time each arm on")
    parser.add_argument(
        "--processes", type=int, default=1, help="samples at a time; arms are timed alone before"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for finished arms, which another run goes on from"
    )
    return parser


def _timed(
    plan: Plan, domain: Domain, names: Sequence[str], num_layers: int, work: Path
) -> list[Row]:
    if num_layers == 0:
        return []
    times = time_arms(plan, domain, names, num_layers, work)
    num_timed = min((len(record[way]) for record in times.values() for way in WAYS), default=0)
    return time_rows(times, WAYS, f"{domain.name}-{num_timed} layers-{_setting(plan)}")


def _samples(
    plan: Plan, domains: Sequence[Domain], names: Sequence[str], processes: int, work: Path
) -> Iterator[dict[str, list[dict[str, GroupFigures]]]]:
    """Takes samples in any order; yields all that there are, by text, after each."""
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    taken: dict[str, list[dict[str, GroupFigures]]] = {}
    with ProcessPoolExecutor(
        processes, spawn, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = {
            pool.submit(sample, plan, domain, seed, names, work): domain.name
            for seed in range(plan.seeds)
            for domain in domains
        }
        for future in as_completed(futures):
            taken.setdefault(futures[future], []).append(future.result())
            yield taken


def _setting(plan: Plan) -> str:
    return f"L{plan.lengths[-1]}-tolerance{plan.tolerance}"


if __name__ == "__main__":
    main()
