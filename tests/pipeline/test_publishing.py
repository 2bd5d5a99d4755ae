"""Models to a Hub and back, through huggingface_hub's own client and a small server in place of the Hub."""

import json
import os
from pathlib import Path

import pytest

from hub_server import TOKEN, ask, serve

PUBLISH = """
import json
from digit import DigitPipeline
from digit.core.errors import DigitError
import tiny

def outcome(work):
    try:
        return work()
    except DigitError as error:
        return str(error)

pipe, found, asked = tiny.pipeline(), {}, tiny.request(range(2), decoder="ar")
found["first"] = pipe.push_to_hub("someone/tiny", private=True)
smaller = pipe.with_parts(decoders={"ar": tiny.token_model("ar", 1)}, prior=tiny.token_model("prior", 5, num_classes=3))
found["branch"] = smaller.push_to_hub("someone/tiny", revision="trial", message="Without the masked decoder")
found["request"] = pipe.push_to_hub("someone/tiny", create_pr=True)
commit = found["first"].rsplit("/", 1)[1]
for name, revision in {"main": None, "trial": "trial", "commit": commit}.items():
    loaded = DigitPipeline.from_pretrained("someone/tiny", revision=revision)
    found[name] = [sorted(loaded.decoders), loaded.sample_tokens(asked).sha256()]
found["local"] = [p.sample_tokens(asked).sha256() for p in (pipe, smaller)]
# a branch moves: the newest commit is taken although an older one is in the cache
smaller.push_to_hub("someone/tiny")
found["moved"] = sorted(DigitPipeline.from_pretrained("someone/tiny").decoders)
found["no such revision"] = outcome(lambda: DigitPipeline.from_pretrained("someone/tiny", revision="v9"))
found["stranger"] = outcome(lambda: pipe.push_to_hub("someone/other", token=False))
found["wrong token"] = outcome(lambda: pipe.push_to_hub("someone/other", token="hf_stranger"))
found["no name"] = outcome(lambda: pipe.push_to_hub("tiny model"))
print(json.dumps(found))
"""

OFFLINE = """
import json
from digit import DigitPipeline
from digit.core.errors import DigitError
import tiny
found = {}
found["cached"] = sorted(DigitPipeline.from_pretrained("someone/tiny").decoders)
found["cached branch"] = sorted(DigitPipeline.from_pretrained("someone/tiny", revision="trial").decoders)
for name, work in {
    "unknown": lambda: DigitPipeline.from_pretrained("someone/else"),
    "push": lambda: tiny.pipeline().push_to_hub("someone/tiny"),
}.items():
    try:
        found[name] = str(work())
    except DigitError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub():
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def talk(code, url, home, **more):
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = ask(code, url, home, PYTHONPATH=paths, OMP_NUM_THREADS="1", **more)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(hub, home):
    return talk(PUBLISH, hub.url, home, HF_TOKEN=TOKEN)


def test_a_model_goes_to_the_hub_whole(hub, found):
    repository = hub.repositories["someone/tiny"]
    assert repository.private
    commit = found["first"].rsplit("/", 1)[1]
    files = repository.commits[commit]
    assert set(files) >= {
        "model_index.json",
        "README.md",
        "pipeline.py",
        "prior/model.safetensors",
        "decoder/masked/model.safetensors",
    }
    assert files["README.md"].startswith(b"---\n")
    assert len(repository.commits) == 5, "each push is one commit"
    assert found["request"].endswith("/discussions/1")


def test_revisions_load_as_they_were_pushed(hub, found):
    assert found["main"] == [["ar", "masked"], found["local"][0]]
    assert found["trial"] == [["ar"], found["local"][1]]
    assert found["commit"] == found["main"]
    assert "has no branch, tag or commit" in found["no such revision"]
    assert "decoder/masked/model.safetensors" not in hub.repositories["someone/tiny"].at("trial")[1], (
        "what is gone, goes"
    )


def test_a_branch_that_moved_is_followed(found):
    assert found["moved"] == ["ar"]


def test_refusals_are_sentences(hub, found):
    for who in ("stranger", "wrong token"):
        assert "hf auth login" in found[who], found[who]
    assert "expected owner/name" in found["no name"]
    assert "someone/other" not in hub.repositories


def test_offline_the_cache_serves_and_nothing_is_published(hub, found, home):
    asked = len(hub.asked)
    offline = talk(OFFLINE, hub.url, home, HF_HUB_OFFLINE="1")
    assert offline["cached"] == offline["cached branch"] == ["ar"]
    assert "HF_HUB_OFFLINE is set" in offline["unknown"]
    assert "HF_HUB_OFFLINE is set" in offline["push"]
    assert len(hub.asked) == asked


def test_a_private_model_is_not_there_for_strangers(hub, found, tmp_path):
    code = "from digit import DigitPipeline\nfrom digit.core.errors import DigitError\nimport json\n"
    code += (
        "try: DigitPipeline.from_pretrained('someone/tiny')\nexcept DigitError as error: print(json.dumps(str(error)))"
    )
    assert "no repository someone/tiny that may be read" in talk(code, hub.url, tmp_path)
