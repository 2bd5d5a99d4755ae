"""What other people's programs import: the public names, and the modules that the first edition's reference listed."""

import subprocess
import sys
from importlib import import_module

import pytest

import digit
from digit._moved import MOVED

# docs/reference/python.md of the first edition
FIRST_EDITION = {
    "digit.pipeline": ["DigitPipeline", "Tokens"],
    "digit.sampling.settings": ["SamplingSettings"],
    "digit.tokenizers.semantic": ["SemanticTokenizer"],
    "digit.tokenizers.codebook": ["Codebook"],
    "digit.tokenizers.kmeans": ["fit_codebook"],
    "digit.tokenizers.vqgan": ["VQGAN", "VQGANConfig"],
    "digit.encoders.base": ["Encoder", "Preprocessing"],
    "digit.encoders.loading": ["load_encoder"],
    "digit.models.token_model": ["TokenModel", "TokenModelConfig"],
    "digit.models.transformer": ["TransformerConfig"],
    "digit.data.images": ["load_images"],
    "digit.data.dataset": ["open_dataset", "ImageDataset"],
    "digit.data.token_cache": ["build_token_cache"],
    "digit.generation": ["generate_folder"],
    "digit.assembly": ["assemble"],
    "digit.training.build": ["build_task"],
    "digit.training.loop": ["train"],
    "digit.sampling.acceleration": ["accelerate"],
    "digit.card": ["with_facts"],
    "digit.hub": ["resolve_model", "push_folder"],
    "digit.evaluation.fidelity": ["fidelity"],
    "digit.evaluation.reconstruction": ["reconstruction"],
    "digit.evaluation.stability": ["stability"],
    "digit.errors": ["DigitError"],
    "digit.config": ["load_preset", "from_dict"],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", FIRST_EDITION)
def test_names_of_the_first_edition_import(module):
    old, new = import_module(module), import_module(MOVED.get(module) or module)
    for name in FIRST_EDITION[module]:
        assert getattr(old, name) is getattr(new, name)


def test_an_old_path_warns_where_it_is_imported():
    code = "import warnings; warnings.simplefilter('error'); import digit.tokenizers.vqgan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeprecationWarning: digit.tokenizers.vqgan is now digit.models.vqgan" in done.stderr


def test_modules_that_never_were_are_still_missing():
    with pytest.raises(ModuleNotFoundError, match=r"digit\.tokenizers\.nothing"):
        import_module("digit.tokenizers.nothing")


def test_the_public_names_are_listed():
    assert set(digit.__all__) <= set(dir(digit))
    assert all(getattr(digit, name) is not None for name in digit.__all__)
