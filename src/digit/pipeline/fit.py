"""Whether the components of a pipeline fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from digit.core.errors import DigitError

if TYPE_CHECKING:
    from digit.pipeline.model import Model


def check_fit(pipe: Model) -> None:
    """Neighbouring components must agree on vocabularies and lengths, or the first user would find out in a stack
    trace.
    """

    def agree(what: str, a: tuple[str, object], b: tuple[str, object]) -> None:
        if a[1] != b[1]:
            raise DigitError(f"The parts do not fit: {what} is {a[1]} in the {a[0]} and {b[1]} in the {b[0]}.")

    prior, vqgan, codebook = pipe.prior, pipe.vqgan, pipe.codebook
    semantic, codes, cells = "the number of semantic tokens K", "the number of VQ codes V", "VQ tokens an image M"
    if pipe.encoder is not None and codebook is not None:
        codebook.check_encoder(pipe.encoder)
    if prior is not None and prior.config.prefix_length:
        raise DigitError("A decoder was given as the prior: it expects a semantic prefix.")
    if prior is not None:
        sizes: dict[str, list[tuple[str, tuple[str, object]]]] = {
            "semantic": [] if codebook is None else [(semantic, ("codebook", codebook.config.clusters))],
            "vq": [] if vqgan is None else [(codes, ("vqgan", vqgan.config.codes))],
        }
        for what, source in sizes[pipe.space]:
            agree(what, source, ("prior", prior.config.vocab_size))
    for kind, decoder in pipe.decoders.items():
        c, name = decoder.config, f"{kind} decoder"
        if vqgan is not None and c.head == "vq":
            agree(codes, ("vqgan", vqgan.config.codes), (name, c.vocab_size))
            agree(cells, ("vqgan", vqgan.num_tokens), (name, c.length))
        if prior is not None:
            agree(semantic, ("prior", prior.config.vocab_size), (name, c.prefix_vocab_size))
            agree("semantic tokens an image N", ("prior", prior.config.length), (name, c.prefix_length))
    if pipe.class_names and pipe.num_classes and len(pipe.class_names) != pipe.num_classes:
        raise DigitError(f"{len(pipe.class_names)} class names were given for a prior of {pipe.num_classes} classes.")
