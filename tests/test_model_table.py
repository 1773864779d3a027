"""docs/models.md: its table is what planning the committed configurations gives."""

import re
from pathlib import Path

import pytest
from vllm.model_executor.models.transformers.base import Base

from benchmarks import model_table
from tests.hybrids import FULL

PAGE = model_table.PAGE.read_text(encoding="utf-8")
COMMITTED = PAGE.partition(model_table.BEGIN)[2].partition(model_table.END)[0].strip()
ROWS = {
    cells[0]: cells[1:]
    for cells in ([each.strip() for each in line.split("|")[1:-1]] for line in
                  COMMITTED.splitlines()[2:])
}  # fmt: skip


def test_the_page_has_the_table_that_the_configurations_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM rewrites transformers' own classes of such models for its compiler, in place, and other
    # tests of this process make them without vLLM.
    monkeypatch.setattr(Base, "_decorate_cls_for_torch_compile", lambda *_, **__: None)
    assert model_table.table() == COMMITTED


def test_the_page_has_every_configuration_once() -> None:
    models = [each.model for each in model_table.models()]
    assert list(ROWS) == models
    assert len(models) == len(set(models)) == 40


def test_each_configuration_says_where_it_was_read() -> None:
    for model in model_table.models():
        assert re.fullmatch(
            r"https://github\.com/[\w.-]+/[\w.-]+/blob/[0-9a-f]{40}/.+", model.source
        )


@pytest.mark.parametrize(
    ("model", "sparse", "others"),
    [
        # As their authors describe them.
        ("google/gemma-3-27b-it", "10 of 62", "52 attend to windows of 1,024"),
        ("openai/gpt-oss-120b", "18 of 36", "18 attend to windows of 128"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "12 of 48", "36 attend to chunks of 8,192"),
        ("Qwen/Qwen3-30B-A3B", "48 of 48", ""),
        ("deepseek-ai/DeepSeek-R1", "none: refused", "61 have dense latent attention (MLA)"),
    ],
)
def test_rows_of_well_known_models(model: str, sparse: str, others: str) -> None:
    assert ROWS[model][:2] == [sparse, others]


def test_rows_counted_by_a_configuration_agree_with_its_list_of_layers() -> None:
    counted = [each for each in model_table.models() if each.not_made is not None]
    assert counted
    for model in counted:
        kinds = model.config["layer_types"]
        assert ROWS[model.model][0] == f"{kinds.count(FULL)} of {len(kinds)}"


def test_only_what_is_between_the_markers_is_replaced() -> None:
    page = f"before\n\n{model_table.BEGIN}\n\nold\n\n{model_table.END}\n\nafter\n"
    assert model_table.with_table(page, "new") == page.replace("old", "new")


def test_a_page_without_the_markers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a page of mine\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["model_table", "--page", str(page)])
    with pytest.raises(SystemExit):
        model_table.main()
    assert f"{page}: the lines {model_table.BEGIN}" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "a page of mine\n"
