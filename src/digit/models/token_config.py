"""The shape of a token model."""

from __future__ import annotations

from typing import Literal

from digit.core.config import NonNegativeInt, PositiveInt, Probability, config
from digit.models.state_space import StateSpaceConfig
from digit.models.transformer import TransformerConfig


@config
class TokenModelConfig:
    """What a token model reads and predicts.

    Attributes:
        role: see the table of :mod:`digit.models.token_model`. It fixes ``transformer.causal``.
        vocab_size: how many ids there are (K for a prior over semantic tokens, V over VQ tokens).
        codebook_depth: tokens a place, d; more than 1 for a prior over the tokens of a residual codebook. Token i is
            then one of the vocab_size / d ids of depth i mod d, which alone have logits. Lee et al. 2022, arXiv
            2203.01941, predict them in this order too, with a small network of its own for the depths; here they are
            one sequence.
        length: tokens an image (256 for 16 x 16).
        prefix_vocab_size, prefix_length: vocabulary and number of the semantic tokens in front; 0 for none.
        num_classes: 0 for an unconditional model.
        class_dropout: probability that a training label is replaced by the start vector; 0 makes guidance impossible.
        embedding_scale: token, start and class vectors are multiplied by it (the paper's code: sqrt(dim)); positions
            are not.
        label_smoothing: of the training loss.
        init: how random weights are drawn. "normal", the default, is GPT-2's: std 0.02, tables that are scaled
            1 / sqrt(dim); all packaged models began so. "authors" is fairseq's, for runs to be compared with the
            paper's: std 1 / sqrt(dim) for every table and the head, see
            :func:`~digit.models.transformer.init_as_fairseq`.
        transformer, state_space: the network between embeddings and head, one of the two.
    """

    role: Literal["prior", "ar", "masked", "random"]
    vocab_size: PositiveInt
    codebook_depth: PositiveInt = 1
    length: PositiveInt
    prefix_vocab_size: NonNegativeInt = 0
    prefix_length: NonNegativeInt = 0
    num_classes: NonNegativeInt = 0
    class_dropout: Probability = 0.1
    embedding_scale: float = 1.0
    label_smoothing: Probability = 0.0
    init: Literal["normal", "authors"] = "normal"
    transformer: TransformerConfig | None = None
    state_space: StateSpaceConfig | None = None

    def __post_init__(self) -> None:
        if (self.prefix_vocab_size == 0) != (self.prefix_length == 0):
            raise ValueError("prefix_vocab_size and prefix_length go together: both 0, or both positive")
        if (self.transformer is None) == (self.state_space is None):
            raise ValueError("expected either transformer or state_space, and null for the other")
        if self.state_space is not None and (self.role not in ("prior", "ar") or self.init != "normal"):
            raise ValueError(
                "a state-space model reads row by row; expected role prior or ar, and init normal, not role "
                f"'{self.role}' and init '{self.init}'"
            )
        if self.transformer is not None and self.transformer.causal == (self.role == "masked"):
            raise ValueError(f"role '{self.role}' needs transformer.causal = {self.role != 'masked'}")
        if self.role == "random" and self.prefix_length:
            raise ValueError("role 'random' is for priors; expected prefix_length = 0")
        if self.codebook_depth > 1 and self.role != "prior":
            raise ValueError(
                f"tokens of a residual codebook are predicted in order; expected role prior, not '{self.role}'"
            )
        if self.vocab_size % self.codebook_depth or self.length % self.codebook_depth:
            raise ValueError(f"codebook_depth={self.codebook_depth} does not divide vocab_size and length")

    @property
    def codes(self) -> int:
        """Ids of one depth, V: as many logits has a token."""
        return self.vocab_size // self.codebook_depth

    @property
    def backbone(self) -> TransformerConfig | StateSpaceConfig:
        """The network between embeddings and head."""
        found = self.transformer or self.state_space
        assert found is not None
        return found

    @property
    def head(self) -> str:
        """What a decoder of this kind gives: "vq"."""
        return "vq"

    @property
    def can_guide(self) -> bool:
        """Whether classifier-free guidance has an unconditional half that was trained."""
        return self.num_classes > 0 and self.class_dropout > 0

    def describe(self) -> str:
        """Its shape in a line."""
        norm = f", {self.transformer.norm}-norm" if self.transformer else ""
        classes = f"; {self.num_classes:,} classes" if self.num_classes else ""
        guidance = "" if not self.num_classes else " with guidance" if self.can_guide else ", no guidance"
        prefix = f" from {self.prefix_length} of {self.prefix_vocab_size:,}" if self.prefix_length else ""
        depth = f" in {self.codebook_depth} depths" if self.codebook_depth > 1 else ""
        tokens = f"{self.length} tokens of {self.vocab_size:,}{depth}{prefix}"
        return f"{self.backbone.describe()}{norm}; {tokens}{classes}{guidance}"
