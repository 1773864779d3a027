"""The documentation against the repository: links, commands, options, targets, names."""

import ast
import csv
import functools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllm_afbs.observability import metrics

CHECKOUT = Path(__file__).resolve().parents[1]
README = CHECKOUT / "README.md"
OBSERVABILITY = CHECKOUT / "docs" / "observability.md"
PAGES = sorted(
    [
        README,
        CHECKOUT / "CHANGELOG.md",
        *(CHECKOUT / "docs").glob("*.md"),
        *(CHECKOUT / "deploy").rglob("*.md"),
    ]
)
OURS = ("vllm_afbs", "benchmarks", "deploy", "tests")
MAX_README_LINES = 160
FIRST_SCREEN_LINES = 40


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


@functools.cache
def parts(page: Path) -> tuple[str, list[str]]:
    """A page's prose, code spans included, and the lines of its code blocks, continuations joined.

    Blocks are fenced or indented by four spaces or more; none of our prose is.
    """
    prose, code, fence = [], [], None
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().removeprefix("```") or "text" if fence is None else None
        elif fence is not None:
            code += [line] if fence != "mermaid" else []
        elif line.startswith("    "):
            code.append(line)
        else:
            prose.append(line)
    return "\n".join(prose), code


def snippets(page: Path) -> list[str]:
    """Everything on a page that is set as code."""
    prose, code = parts(page)
    return [*code, *(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose))]


@functools.cache
def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+)$", parts(page)[0], re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def broken_links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`]*`", "", parts(page)[0])
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[here](#a-heading), [there](#another), [nowhere](missing.md),\n"
        "[outside](https://example.org), ![picture](missing.png)\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["#another", "missing.md", "missing.png"]


def commands() -> dict[str, set[str]]:
    """Options by module, of every ``python -m MODULE`` of ours that a page shows."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for snippet in snippets(page):
            for command in re.split(r"\||&&|;", snippet):
                shown = re.search(r"(?:^|\s)-m ([\w.]+)(.*)", command)
                if shown and shown[1].split(".")[0] in OURS:
                    options = found.setdefault(shown[1], set())
                    given = shlex.split(shown[2], comments=True)
                    options |= {each.split("=")[0] for each in given if each.startswith("--")}
    return found


COMMANDS = commands()
LIGHT = sorted(module for module in COMMANDS if module.split(".")[0] in ("vllm_afbs", "deploy"))
"""Modules whose ``--help`` takes a second or less; benchmarks import vLLM first."""


def test_the_commands_of_the_first_page_are_found() -> None:
    assert {"--model", "--calibration", "--lengths", "--output"} <= COMMANDS["vllm_afbs.tune"]
    assert "--profile" in COMMANDS["vllm_afbs.evaluate"]
    assert any(module.startswith("benchmarks.") for module in COMMANDS)


def source(module: str) -> Path:
    """The file that ``python -m`` runs."""
    path = CHECKOUT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def added_options(node: ast.AST) -> set[str]:
    calls = (each for each in ast.walk(node) if isinstance(each, ast.Call))
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")
    }


def options_of(module: str, wanted: set[str]) -> set[str]:
    """Options that some functions of a module add, or functions that they call."""
    path = source(module)
    if path.name == "__main__.py" or not path.is_file():
        return set()
    local = {each.name: each for each in tree(path).body if isinstance(each, ast.FunctionDef)}
    options: set[str] = set()
    waiting, seen = [local[name] for name in wanted & local.keys()], set()
    while waiting:
        function = waiting.pop()
        if function.name in seen:
            continue
        seen.add(function.name)
        options |= added_options(function)
        called = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
        waiting += [local[name] for name in called & local.keys()]
        options |= options_of_imports(path, called)
    return options


def options_of_imports(path: Path, wanted: set[str] | None = None) -> set[str]:
    """Options that functions add which a file imports from our modules: all, or some by name."""
    options: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            names = {alias.name for alias in node.names}
            options |= options_of(str(node.module), names if wanted is None else names & wanted)
    return options


def options_by_source(module: str) -> set[str]:
    """Options of a module's parser, read off its source and the functions that it imports."""
    path = source(module)
    return added_options(tree(path)) | options_of_imports(path)


@functools.cache
def options_by_help(module: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", done.stdout, re.MULTILINE)
    return set(listed) - {"--help"}


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_commands_name_modules_that_have_the_options_shown(module: str) -> None:
    assert source(module).is_file()
    assert COMMANDS[module] - {"--help"} <= options_by_source(module)


@pytest.mark.parametrize("module", LIGHT)
def test_programs_list_the_options_that_their_source_has(module: str) -> None:
    assert options_by_help(module) == options_by_source(module)


@pytest.mark.parametrize(
    ("module", "page"),
    [
        ("vllm_afbs.tune", "tuning.md"),
        ("vllm_afbs.evaluate", "evaluation.md"),
        ("vllm_afbs.demo", "contributing.md"),
        ("vllm_afbs.check", "operations.md"),
    ],
)
def test_options_are_all_explained(module: str, page: str) -> None:
    text = (CHECKOUT / "docs" / page).read_text(encoding="utf-8")
    assert options_by_help(module) == {
        option for option in options_by_help(module) if re.search(rf"{option}\b(?!-)", text)
    }


def test_make_targets_exist() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = {
        target
        for page in PAGES
        for snippet in snippets(page)
        for target in re.findall(r"^\s*make ([a-z][\w-]*)", snippet)
    }
    assert {"setup", "demo", "test"} <= named
    assert named <= targets


def test_extras_exist() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra
        for page in PAGES
        for snippet in snippets(page)
        for listed in re.findall(r"\.\[([\w,-]+)\]", snippet)
        for extra in listed.split(",")
    }
    assert named
    assert named <= project["optional-dependencies"].keys()


def test_the_readme_is_short_and_begins_with_what_to_run() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES
    first = "\n".join(lines[:FIRST_SCREEN_LINES])
    for command in ("make demo", "make test", "python -m vllm_afbs.tune", "vllm serve"):
        assert command in first


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.md)", README.read_text(encoding="utf-8")))
    assert {name_of(page) for page in PAGES} - {"README.md"} == linked


def test_every_result_is_shown() -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    results = (CHECKOUT / "benchmarks" / "results").iterdir()
    assert [path.name for path in results if f"benchmarks/results/{path.name}" not in shown] == []


def rows(page: Path, first_cell: str) -> list[list[str]]:
    """Cells of the table rows whose first cell fits a pattern."""
    lines = [line for line in parts(page)[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if re.match(first_cell, row[0])]


def test_metrics_are_all_explained_with_their_types_and_labels() -> None:
    registered = {}
    for metric in vars(metrics).values():
        if isinstance(metric, metrics.Counter | metrics.Histogram | metrics.Gauge):
            kind = type(metric).__name__.lower()
            name = metric.name + ("_total" if kind == "counter" else "")
            registered[name] = (kind, set(metric.labels))
    explained = {
        row[0].strip("`"): (row[1], set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row[3]))))
        for row in rows(OBSERVABILITY, r"`vllm_afbs_")
    }
    assert explained == registered


def test_environment_variables_are_all_explained() -> None:
    public = re.compile(r'^[A-Z]\w* = "(VLLM_AFBS_[A-Z_]+)"', re.MULTILINE)
    read = set()
    for path in (CHECKOUT / "vllm_afbs").rglob("*.py"):
        read |= set(public.findall(path.read_text(encoding="utf-8")))
    explained = {
        name
        for row in rows(OBSERVABILITY, r"`VLLM_AFBS_")
        for name in re.findall(r"VLLM_AFBS_[A-Z_]+", row[0])
    }
    assert explained == read


def test_routes_are_all_explained() -> None:
    routes = (CHECKOUT / "vllm_afbs/observability/routes.py").read_text(encoding="utf-8")
    served = {
        f"{method.upper()} /afbs{path}"
        for method, path in re.findall(r'^@router\.(\w+)\("([^"]+)"', routes, re.MULTILINE)
    }
    assert served
    assert {row[0].strip("`") for row in rows(OBSERVABILITY, r"`(GET|POST) ")} == served


def test_times_to_first_token_are_those_of_the_csv() -> None:
    """Both pages show the medians of the file, and the speed-up over the faster baseline."""
    with (CHECKOUT / "benchmarks/results/serving_gpu.csv").open(newline="") as file:
        medians = {(row["what"], row["shape"]): float(row["p50"]) for row in csv.DictReader(file)}
    engines = ("FLASH_ATTN", "FLASH_ATTN, pages of 128", "afbs tau=0.2")
    speedup_of = f"{engines[-1]}: time to first token, speedup over the faster FLASH_ATTN"
    table = [
        row
        for row in rows(CHECKOUT / "docs/benchmarks.md", r"[\d,]+$")
        if [cell[-1] for cell in row[1:]] == ["s", "s", "s", "x"]
    ]
    assert [row[0] for row in table] == ["8,192", "32,768", "65,536", "131,072"]
    num_on_first_page = 0
    for length, *cells, speedup in table:
        shape = length.replace(",", "")
        times = [medians[f"{each}: time to first token", shape] for each in engines]
        for cell, seconds in zip(cells, times, strict=True):
            assert float(cell.removesuffix(" s")) == pytest.approx(seconds, rel=2e-3)
        assert float(speedup.removesuffix("x")) == pytest.approx(
            medians[speedup_of, shape], abs=6e-3
        )
        for row in rows(README, f"time to first token, {length} tokens$"):
            num_on_first_page += 1
            own, _, factor = row[3].partition(" s (")
            assert float(row[2].removesuffix(" s")) == pytest.approx(min(times[:2]), rel=2e-3)
            assert float(own) == pytest.approx(times[2], rel=2e-3)
            assert factor == f"{speedup})"
    assert num_on_first_page == 3
