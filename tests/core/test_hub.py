"""What a user names and is not here: paths are answered at once, and only the rest is looked for on the Hub."""

import time
from pathlib import Path

import huggingface_hub
import pytest

from digit.core.errors import DigitError
from digit.core.hub import is_repository, out_of_reach, packaged_models, repository_id
from digit.data.dataset import open_dataset
from digit.encoders import load_encoder
from digit.pipeline.hub import resolve_model

PATHS = [
    "nothing",
    "./owner/name",
    "../name",
    "~/name",
    "/owner/name",
    "a/b/c",
    "runs/prior.safetensors",
    "photos/cat.JPG",
]


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The Hub may be asked, and asking is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("find", [resolve_model, load_encoder, open_dataset])
def test_what_looks_like_a_path_is_answered_at_once(name, find, online):
    assert not is_repository(name)
    with pytest.raises(DigitError, match=r"There is no (model|encoder|dataset) .*it is not a Hub id \(owner/name\)"):
        find(name)


@pytest.mark.parametrize("find", [resolve_model, load_encoder, open_dataset])
def test_a_name_below_a_folder_that_is_here_is_a_mistyped_path(find, online, tmp_path):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert repository_id("somebody/modle", "model") == "somebody/modle"
    with pytest.raises(DigitError, match="the folder 'runs' has no 'modle' in it, so the Hub was not asked"):
        find("runs/modle")


@pytest.mark.parametrize("find", [resolve_model, load_encoder, open_dataset])
def test_a_hub_out_of_reach_is_not_tried_again_and_again(find, online, capsys):
    begin = time.perf_counter()
    with pytest.raises(DigitError, match=r"127\.0\.0\.1:9\) is out of reach"):
        find("nobody/nothing")
    assert time.perf_counter() - begin < 10  # the Hub's client alone takes 23 seconds
    assert "Retrying" not in capsys.readouterr().err
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_data_set_of_the_same_name_does_not_hide_the_packaged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cifar10").mkdir()
    assert resolve_model("cifar10") == packaged_models()["cifar10"]
    Path("cifar10/model_index.json").touch()
    assert resolve_model("cifar10") == Path("cifar10")


def test_the_packaged_model_is_found():
    assert (packaged_models()["cifar10"] / "model_index.json").is_file()
    assert out_of_reach() == "the Hub was not asked because HF_HUB_OFFLINE is set"
