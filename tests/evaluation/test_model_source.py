import numpy as np
import pytest
import torch

from digit.core.errors import DigitError
from digit.core.images import to_uint8
from digit.data.folder import import_folder
from digit.evaluation.model_source import SamplingRun, as_uint8, describe_data, encode_all, open_images, pipe_size
from digit.evaluation.results import provenance


def test_a_run_gives_the_images_of_generate(pipe):
    """What is measured is what digit generate writes, pixel by pixel."""
    run = SamplingRun(pipe, 12, seed=3, settings={"top_k": 5, "decoder_top_p": 0.9}, batch_size=5)
    found = torch.cat(list(run.batches()))
    assert found.shape == (12, 3, 32, 32)
    assert found.dtype == torch.uint8
    pictures = pipe(labels=range(10), num=12, seed=3, top_k=5, decoder_top_p=0.9)
    expected = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    assert np.array_equal(found.numpy(), expected)


def test_the_line_under_a_table_says_how_images_were_scaled(pipe, cifar512, tmp_path):
    """As they were stored, and then for the model; a folder of files does not say which sizes it holds."""

    def told(dataset, *pipes):
        return provenance(data=describe_data(dataset, *pipes))

    assert told(open_images(cifar512, num=4), pipe) == f"{cifar512.name} train (4 images, not resized)"
    (tmp_path / "files").mkdir()
    for number in range(3):
        open_images(cifar512)[number].image.resize((48, 40)).save(tmp_path / "files" / f"{number}.png")
    assert (
        told(open_images(tmp_path / "files"), pipe)
        == "files train (3 images, resized by bicubic where of another size)"
    )
    for size, rest in ((32, ""), (36, ", then bicubic")):
        import_folder(tmp_path / "files", tmp_path / f"at{size}", size=size, filter="box")
        data = open_images(tmp_path / f"at{size}")
        assert told(data.subset([0, 1]), pipe) == f"files train (2 images, resized by box{rest})"


def test_labels_are_balanced(pipe):
    assert SamplingRun(pipe, 25).request.labels.bincount().tolist() == [3] * 5 + [2] * 5
    assert SamplingRun(pipe, 4, labels=[7]).request.labels.tolist() == [7] * 4
    assert SamplingRun(pipe, 4).describe()["labels"] == "all in turns"
    assert SamplingRun(pipe, 4, labels=[3, 1]).describe()["labels"] == [3, 1]
    assert SamplingRun(pipe, 200, labels=[3] * 200).describe()["labels"] == "200, one per image"


def test_batch_size_does_not_matter(pipe):
    one, other = (torch.cat(list(SamplingRun(pipe, 6, batch_size=size).batches())) for size in (1, 6))
    # the tokens are the same; convolutions over another batch round differently
    assert (one.int() - other.int()).abs().max() <= 1


def test_given_tokens_stay(pipe, cifar512):
    tokens = encode_all(pipe, open_images(cifar512, num=6), 4)
    assert torch.equal(tokens, pipe.tokenizer.encode([open_images(cifar512, num=6)[i].image for i in range(6)]))
    whole = torch.cat(list(SamplingRun(pipe, 6, batch_size=4).prior(tokens[:, :7])))
    assert torch.equal(whole[:, :7], tokens[:, :7])
    assert not torch.equal(whole, tokens)
    everything = torch.cat(list(SamplingRun(pipe, 6, batch_size=4).prior(tokens)))
    assert torch.equal(everything, tokens)


def test_baseline_runs_without_decoder(vq_pipe):
    assert next(SamplingRun(vq_pipe, 3).batches()).shape == (3, 3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top_q": 3}, "did you mean 'top_p'"),
        ({"decoder_top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_settings_are_checked_before_sampling(pipe, settings, sentence):
    with pytest.raises(DigitError, match=sentence):
        SamplingRun(pipe, 4, settings=settings).check()


def test_impossible_runs_are_explained(pipe, vq_pipe):
    with pytest.raises(DigitError, match="label 10"):
        SamplingRun(pipe, 4, labels=[10]).check()
    with pytest.raises(DigitError, match="no decoder 'onepass'"):
        SamplingRun(pipe, 4, decoder="onepass").check()
    with pytest.raises(DigitError, match="no decoder to choose"):
        SamplingRun(vq_pipe, 4, settings={"decoder_top_k": 3}).check()
    with pytest.raises(DigitError, match="no prior"):
        SamplingRun(pipe.with_parts(prior=None), 4).check()
    with pytest.raises(DigitError, match="takes no images"):
        pipe_size(pipe.with_parts(encoder=None, codebook=None, vqgan=None))


def test_pixels_are_rounded_like_saved_images():
    images = torch.rand(2, 3, 4, 4)
    assert np.array_equal(as_uint8(images).numpy(), to_uint8(images).transpose(0, 3, 1, 2))
