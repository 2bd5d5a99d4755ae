"""Whether the parts of a pipeline fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from digit.core.errors import DigitError

if TYPE_CHECKING:
    from digit.pipeline.pipeline import DigitPipeline


def check_fit(pipe: DigitPipeline) -> None:
    """Neighbouring parts must agree on vocabularies and lengths, or the first user would find out in a stack trace."""

    def agree(what: str, a: tuple[str, object], b: tuple[str, object]) -> None:
        if a[1] != b[1]:
            raise DigitError(f"The parts do not fit: {what} is {a[1]} in the {a[0]} and {b[1]} in the {b[0]}.")

    if pipe.encoder is not None and pipe.codebook is not None:
        agree("the feature width", ("encoder", pipe.encoder.dim), ("codebook", pipe.codebook.config.dim))
    prior, vqgan, codebook = pipe.prior, pipe.vqgan, pipe.codebook
    if prior is not None and prior.config.prefix_length:
        raise DigitError("A decoder was given as the prior: it expects a semantic prefix.")
    if prior is not None and codebook is not None and pipe.space == "semantic":
        agree(
            "the number of semantic tokens K",
            ("codebook", codebook.config.clusters),
            ("prior", prior.config.vocab_size),
        )
    if prior is not None and vqgan is not None and pipe.space == "vq":
        agree("the number of VQ codes V", ("vqgan", vqgan.config.codes), ("prior", prior.config.vocab_size))
    for kind, decoder in pipe.decoders.items():
        c = decoder.config
        if vqgan is not None and not pipe.paints(kind):
            agree("the number of VQ codes V", ("vqgan", vqgan.config.codes), (f"{kind} decoder", c.vocab_size))
            agree("VQ tokens an image M", ("vqgan", vqgan.num_tokens), (f"{kind} decoder", c.length))
        if prior is not None:
            agree(
                "the number of semantic tokens K",
                ("prior", prior.config.vocab_size),
                (f"{kind} decoder", c.prefix_vocab_size),
            )
            agree("semantic tokens an image N", ("prior", prior.config.length), (f"{kind} decoder", c.prefix_length))
    if pipe.class_names and pipe.num_classes and len(pipe.class_names) != pipe.num_classes:
        raise DigitError(f"{len(pipe.class_names)} class names were given for a prior of {pipe.num_classes} classes.")
