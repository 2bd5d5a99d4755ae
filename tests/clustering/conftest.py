import pytest
import torch
import typer
from typer.testing import CliRunner

from digit.cli.train import fit_codebook
from digit.encoders import small_conv
from digit.models.codebook import Codebook
from digit.models.component import save_component


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return small_conv(widths=(8, 8, 16), blocks=(1, 1, 1)).eval().requires_grad_(False)


@pytest.fixture
def fitted(encoder, cifar512, tmp_path):
    """Runs ``digit fit-codebook`` on 64 images: what it prints, and the codebook."""
    save_component(tmp_path / "encoder", encoder, encoder.config)
    app = typer.Typer()
    app.command()(fit_codebook)
    options = ["--encoder", str(tmp_path / "encoder"), "--data", str(cifar512), "--out", str(tmp_path / "book")]
    options += ["-k", "20", "--device", "cpu", "--iterations", "3", "--images", "64"]

    def run(*given):
        output = CliRunner().invoke(app, [*options, *given], catch_exceptions=False).output
        return output, Codebook.from_pretrained(tmp_path / "book")

    return run
