"""A tiny model, and `digit serve` running with it."""

import pytest

import tiny
from serving import running


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("web") / "model")


@pytest.fixture(scope="package")
def server(model, tmp_path_factory):
    pytest.importorskip("gradio", reason="the extra 'web' is not installed")
    with running(model, tmp_path_factory.mktemp("scratch")) as server:
        yield server
