"""Models of the hub: what is asked for, what a cache may lack, and what is no model."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.chat_tokenizers import chat_tokenizer
from tests.models import changed_model
from tests.profiles import uniform_profile
from tests.tuning_jobs import IN_PROCESS, command
from vllm_afbs import tune
from vllm_afbs.errors import InputError
from vllm_afbs.evaluate import __main__ as evaluate
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.models.in_process.weights import load_weights
from vllm_afbs.profile.file import parse_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.weights import adapter_sha256, served_weights_sha256, weights_sha256

NAME = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
OTHER_FORMATS = ["consolidated.safetensors", "original/params.json", "onnx/config.json",
                 "original/model.safetensors", "runs/a/b.txt", "pytorch_model.bin"]  # fmt: skip


def shard(model: Path) -> None:
    """Splits a checkpoint's weights over two files with an index."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for file, part in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in part}, model / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, on a machine that is offline."""
    directory = tmp_path / "hub"
    directory.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return directory


def put(cache: Path, model: Path, *, revision: str = "main") -> Path:
    """Puts a checkpoint into the cache, and notes that the repository holds more."""
    folder = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text(COMMIT)
    names = [*(path.name for path in model.iterdir()), *OTHER_FORMATS, "training_args.json"]
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    (folder / "trees").mkdir()
    tree = {"format_version": 1, "files": files}
    (folder / "trees" / f"{COMMIT}.json").write_text(json.dumps(tree))
    return snapshot


def test_a_snapshot_of_another_tool_is_enough(
    cache: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """It lacks other formats of the weights, and small files that nobody reads."""
    model = changed_model(tiny_model, tmp_path / "model")
    shard(model)
    snapshot = put(cache, model)
    source = open_model(NAME)
    assert source.directory() == snapshot
    assert [path.name for path in source.weight_files()] == SHARDS
    loaded = load_weights(source, "sdpa", with_head=True)
    expected = load_file(tiny_model / "model.safetensors")
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, expected[name])
    assert served_weights_sha256(NAME) == source.weights_sha256() == weights_sha256(model)


def test_the_tuner_reads_an_offline_cache(tiny_model: Path, tmp_path: Path) -> None:
    """As a user has it: nothing patched, the environment alone says offline."""
    put(tmp_path / "hub", tiny_model)
    output = tmp_path / "p.json"
    arguments = command(Path(NAME), output, "--layers", "0", "--tolerance", "0.3")
    job = subprocess.run(
        [sys.executable, "-m", "vllm_afbs.tune", *arguments],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    profile = Profile.model_validate_json(output.read_text())
    assert profile.model_name == NAME
    assert profile.model_weights_sha256 == weights_sha256(tiny_model)


def test_a_revision_is_looked_up(cache: Path, tiny_model: Path) -> None:
    snapshot = put(cache, tiny_model, revision="v2")
    assert open_model(NAME, "v2").directory() == snapshot
    assert open_model(NAME, COMMIT).directory() == snapshot
    assert served_weights_sha256(NAME, "v2") is not None
    assert served_weights_sha256(NAME) is None
    for revision in (None, "v3"):
        with pytest.raises(InputError, match=f"^{NAME}.*the Hugging Face hub gives: ") as refused:
            open_model(NAME, revision)
        assert "\n" not in str(refused.value)
        assert f"(revision {revision})" in str(refused.value) or revision is None


def test_a_missing_shard_is_named(cache: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model")
    shard(model)
    (model / SHARDS[1]).unlink()
    put(cache, model)
    with pytest.raises(InputError, match=rf"file {SHARDS[1]} expected in .*\(1 of 2 missing\)"):
        open_model(NAME).weight_files()


class Hub:
    """The hub's part, played by a folder; patterns are matched as the hub's library does.

    Attributes:
        repository: What the hub has.
        asked: The revision and the files of each download.
    """

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository = repository
        self.asked: list[tuple[Any, list[str]]] = []
        self._snapshot = cache / "snapshots" / COMMIT

    def download(
        self,
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        def matches(path: str, patterns: list[str]) -> bool:
            return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)

        assert name == NAME
        paths = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*")]
        given = [
            path
            for path in paths
            if (self.repository / path).is_file()
            and matches(path, allow_patterns)
            and not matches(path, ignore_patterns)
        ]
        for path in given:
            (self._snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / path, self._snapshot / path)
        self.asked.append((revision, sorted(given)))
        return str(self._snapshot)


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Holds the tiny model in two shards."""
    hub = Hub(changed_model(tiny_model, tmp_path / "repository"), tmp_path)
    shard(hub.repository)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


def test_only_what_is_read_is_asked_for(hub: Hub) -> None:
    for name in OTHER_FORMATS:
        (hub.repository / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.repository / name).write_text("another format")
    model = open_model(NAME, "v2")
    ((revision, small),) = hub.asked
    assert revision == "v2"
    assert "config.json" in small
    assert not [path for path in small if "/" in path or path.endswith((".safetensors", ".bin"))]
    model.weight_files()
    # Of the commit whose index was read: the branch may have moved on.
    assert hub.asked[1] == (COMMIT, SHARDS)
    model.weight_files()
    assert len(hub.asked) == 2


CHAT = {"messages": [{"role": "user", "content": "Good morning."}]}


@pytest.mark.parametrize(
    ("rows", "template", "complaint"),
    [
        ([CHAT, {"messages": "hello"}], True, "line 2: messages: chat messages expected, got text"),
        ([CHAT, {"messages": [{"content": "a"}]}], True, "line 2: messages: message 0: a text"),
        ([CHAT], False, "line 1: messages: chats expect a model with a chat template"),
        ([{"messages": []}], True, "the calibration text is empty: 0 rows"),
        ([CHAT], True, "19 tokens"),  # too few
    ],
)
@pytest.mark.parametrize("program", ["tune", "evaluate"])
def test_texts_are_checked_before_weights_are_asked_for(
    program: str, rows: list[Any], template: bool, complaint: str, hub: Hub, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chat_tokenizer().save_pretrained(hub.repository)
    if not template:
        (hub.repository / "chat_template.jinja").unlink()
    path, output = tmp_path / "rows.jsonl", tmp_path / "output.json"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if program == "tune":
        status = tune.main(command(Path(NAME), output, "--calibration", str(path)))
    else:
        fingerprint = open_model(str(hub.repository)).fingerprint
        profile = uniform_profile(fingerprint, min_seq_len=256, max_seq_len=512)
        (tmp_path / "profile.json").write_text(profile.to_json())
        files = {"--profile": tmp_path / "profile.json", "--text": path, "--output": output}
        arguments = [str(each) for option in files.items() for each in option]
        status = evaluate.main(["--model", NAME, *arguments, *IN_PROCESS])
    assert status == 2
    assert complaint in capsys.readouterr().err
    assert not [each for _, files in hub.asked for each in files if each.endswith(".safetensors")]


def adapter(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    return "an adapter (adapter_config.json), not a model: tune the model that it is for, 'someone"


def adapter_beside(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    (folder / "adapter_config.json").write_text("[]")
    return "an adapter (adapter_config.json), not a model: tune the model that it is for"


def gguf_folder(folder: Path) -> str:
    (folder / "m-Q4_K_M.gguf").touch()
    return "GGUF files are not read: give the Hugging Face checkpoint that it was made from"


@pytest.mark.parametrize("make", [adapter, adapter_beside, gguf_folder])
def test_a_folder_of_something_else_says_so(make: Any, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    expected = make(folder)
    snapshot = None if make is gguf_folder else put(cache, folder)
    for name in (str(folder), *([NAME] if snapshot else [])):
        with pytest.raises(InputError) as refused:
            open_model(name)
        assert str(refused.value).startswith(f"{name}: {expected}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("models/m.gguf", "GGUF files are not read"),
        ("a/b/c", "no such directory"),
        ("a\0b", "the Hugging Face hub gives"),
        ("x" * 5000, "the Hugging Face hub gives"),
        ("someone/m:Q4_K_M", "the Hugging Face hub gives"),
    ],
)
def test_a_name_of_something_else_says_so(name: str, expected: str, cache: Path) -> None:
    with pytest.raises(InputError, match=expected) as refused:
        open_model(name)
    assert "\n" not in str(refused.value)


def test_a_directory_has_no_revision(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tiny_model, tmp_path / "p.json", "--revision", "v2")
    assert tune.main(arguments) == 2
    assert "--revision: a model on the hub expected, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "model.safetensors.index.json: cannot be read"),
        ("[]", "model.safetensors.index.json: a JSON object expected"),
        ("{}", "weight_map: an object of tensors and files expected"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "weight_map: a: a safetensors file beside"),
        ('{"weight_map": {"a": "/a.safetensors"}}', "weight_map: a: a safetensors file beside"),
        ('{"weight_map": {"a": 1}}', "weight_map: a: a safetensors file beside it expected, got 1"),
        ('{"weight_map": {"a": "a.bin"}}', "weight_map: a: a safetensors file beside"),
    ],
)
def test_a_damaged_index_is_named(index: str, named: str, tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError) as refused:
        open_model(str(model)).weight_files()
    assert str(refused.value).startswith(f"{model}: ")
    assert named in str(refused.value)
    assert weights_sha256(model) is None


def test_the_weights_digest_tells_weights_apart(tiny_model: Path, tmp_path: Path) -> None:
    known = weights_sha256(tiny_model)
    assert known is not None
    assert len(known) == 64
    same = changed_model(tiny_model, tmp_path / "same", rms_norm_eps=1e-3)
    assert weights_sha256(same) == known
    assert served_weights_sha256(str(same)) == known
    others = set()
    for name in load_file(tiny_model / "model.safetensors"):

        def change(weights: dict[str, torch.Tensor], name: str = name) -> dict[str, torch.Tensor]:
            return weights | {name: weights[name] * 1.01}

        others.add(weights_sha256(changed_model(tiny_model, tmp_path / name, change)))
    assert len(others) == 21
    assert known not in others
    assert weights_sha256(tmp_path) is None
    assert served_weights_sha256("a\0b") is None


def test_an_adapters_digest_is_of_its_configuration_and_weights(tmp_path: Path) -> None:
    adapter = tmp_path / "one"
    adapter.mkdir()
    found = [adapter_sha256(adapter)]
    for name, content in (
        ("adapter_model.safetensors", b"weights"),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b"[]"),
        ("adapter_model.safetensors", b"Weights"),
        ("adapter_model.bin", b"weights"),
    ):
        (adapter / name).write_bytes(content)
        found.append(adapter_sha256(adapter))
    assert found[:2] == [None, None]
    assert len(set(found[2:])) == 4
    (adapter / "README.md").write_text("changes nothing")
    assert adapter_sha256(adapter) == found[-1]


def test_a_profile_without_the_weights_digest_is_read(tiny_profile: Profile) -> None:
    data = json.loads(tiny_profile.to_json())
    assert data.pop("model_weights_sha256")
    older = parse_profile(json.dumps(data).encode(), "p.json")
    assert older.model_weights_sha256 is None
    assert older.schema_version == uniform_profile().schema_version == 4
