"""From a name to a folder: local, packaged, cached, or from a Hub, which here is a folder or a small web server."""

import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest

import hub_server
from digit.convert.upstream import convert_upstream
from digit.core.errors import DigitError
from digit.pipeline import hub
from digit.pipeline.hub import AUTHORS, VARIANTS, resolve_model
from digit.pipeline.pipeline import DigitPipeline
from hub_server import ask


@pytest.fixture(scope="module")
def repository(upstream_class, tmp_path_factory) -> Path:
    """A folder laid out as the authors' repository."""
    root, upstream = tmp_path_factory.mktemp("authors") / "mirror", upstream_class()
    for files in VARIANTS.values():
        classes = 1000 if "cls" in files.stage1 else 0
        upstream.save(root / AUTHORS / files.stage1, classes=classes)
        upstream.save(root / AUTHORS / files.stage2, "ar")
    return root


@pytest.fixture
def published(repository, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(repository, tmp_path / "mirror"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    for name in ("DIGIT_HUB_DIR", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_model_is_converted_once(published, tmp_path, monkeypatch, variant):
    monkeypatch.setenv("DIGIT_HUB_DIR", str(published))
    folder = resolve_model(AUTHORS, variant)
    assert folder.is_relative_to(tmp_path / "cache")
    pipe = DigitPipeline.from_pretrained(AUTHORS, variant=variant)
    assert pipe.num_classes == (1000 if variant.endswith("cond") else 0)
    assert list(pipe.decoders) == ["ar"]
    assert pipe.vqgan is not None
    # the second time nothing is asked
    monkeypatch.setenv("DIGIT_HUB_DIR", str(tmp_path / "nowhere"))
    assert resolve_model(AUTHORS, variant) == folder


def test_a_variant_must_be_named(published, monkeypatch):
    monkeypatch.setenv("DIGIT_HUB_DIR", str(published))
    for variant in (None, "huge"):
        with pytest.raises(DigitError, match="choose one of: base, base-cond, large, large-cond"):
            resolve_model(AUTHORS, variant)


def test_a_vqgan_that_is_not_inside_is_asked_for(published, upstream, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("DIGIT_HUB_DIR", str(published))
    path = published / AUTHORS / VARIANTS["base"].stage2
    values = upstream.values("ar")
    values["model"] = {name: value for name, value in values["model"].items() if not name.startswith("vqgan.")}
    torch.save(values, path)
    with pytest.raises(DigitError, match=r"Google Drive.*drive\.google\.com") as error:
        resolve_model(AUTHORS, "base")
    place = tmp_path / "cache" / hub.VQGAN_NAME
    assert str(place) in str(error.value)
    torch.save({"state_dict": upstream.vqgan}, place)
    assert DigitPipeline.from_folder(resolve_model(AUTHORS, "base")).vqgan is not None


def test_a_half_downloaded_file_leaves_nothing(published, tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_HUB_DIR", str(published))
    path = published / AUTHORS / VARIANTS["base"].stage1
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DigitError, match="truncated"):
        resolve_model(AUTHORS, "base")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_local_folders_come_first(tmp_path):
    (tmp_path / "own").mkdir()
    assert resolve_model(tmp_path / "own") == tmp_path / "own"


def test_packaged_models(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "packaged_models", lambda: {"tiny": tmp_path})
    assert resolve_model("tiny") == tmp_path
    assert resolve_model() == tmp_path
    monkeypatch.setattr(hub, "packaged_models", dict)
    with pytest.raises(DigitError, match="no packaged one"):
        resolve_model()


def test_what_is_nowhere(monkeypatch):
    with pytest.raises(DigitError, match="no such folder, no packaged model"):
        resolve_model("no-such-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begin = time.perf_counter()
    with pytest.raises(DigitError, match="HF_HUB_OFFLINE is set"):
        resolve_model("nobody/nothing")
    with pytest.raises(DigitError, match=r"base_8k_stage1_cls.*HF_HUB_OFFLINE is set"):
        resolve_model(AUTHORS, "base-cond")
    assert time.perf_counter() - begin < 10


def test_a_hub_out_of_reach_is_said_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as read when the client was imported
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.perf_counter()
    with pytest.raises(DigitError, match=r"127\.0\.0\.1:9\) is out of reach"):
        resolve_model("nobody/nothing")
    assert time.perf_counter() - begin < 10


@pytest.fixture
def server(published):
    with hub_server.serve() as hub:
        hub.add(AUTHORS, published / AUTHORS)
        yield hub


def test_the_real_client_downloads_only_what_is_needed(server, tmp_path):
    code = "from digit.pipeline import hub; print(hub.resolve_model('DAMO-NLP-SG/DiGIT', 'base-cond'))"
    result = ask(code, server.url, tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(server.asked) == sorted([VARIANTS["base-cond"].stage1, VARIANTS["base-cond"].stage2])
    folder = Path(result.stdout.strip().splitlines()[-1])
    assert DigitPipeline.from_folder(folder).num_classes == 1000
    # offline, another cache for converted models: the downloaded files are still there
    again = ask(code, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1", DIGIT_CACHE=str(tmp_path / "second"))
    assert again.returncode == 0, again.stderr
    assert len(server.asked) == 2


def test_a_model_of_ours_on_the_hub(server, upstream, tmp_path):
    birds = convert_upstream(
        tmp_path / "birds", upstream.save(tmp_path / "c.pt"), upstream.save(tmp_path / "d.pt", "ar")
    )
    server.add("someone/birds", birds)
    result = ask(
        "from digit.pipeline.hub import resolve_model; print(resolve_model('someone/birds'))", server.url, tmp_path
    )
    assert result.returncode == 0, result.stderr
    pipe = DigitPipeline.from_folder(result.stdout.strip().splitlines()[-1])
    assert sorted(pipe.decoders) == ["ar"]


def test_missing_files_and_repositories_on_the_hub(server, tmp_path):
    del server.repositories[AUTHORS].at("main")[1][VARIANTS["large"].stage2]
    code = (
        "from digit.pipeline.hub import resolve_model\n"
        "from digit.core.errors import DigitError\n"
        "try: resolve_model(*{!r})\n"
        "except DigitError as error: print(error)"
    )
    assert "has no file outputs/large_16k_stage2" in ask(code.format((AUTHORS, "large")), server.url, tmp_path).stdout
    assert "no repository some/thing" in ask(code.format(("some/thing",)), server.url, tmp_path).stdout
