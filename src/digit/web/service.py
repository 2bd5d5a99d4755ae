"""What can be asked of a model over the web, as functions from :mod:`digit.web.schema` to it. Nothing is kept between
two calls, and nothing is written.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from digit.clustering.patches import FILE, Atlas
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.images import decode, encode_png, to_pil, to_tensor
from digit.core.transforms import center_crop, resize_shorter
from digit.evaluation.metrics.noise import NoiseModel, add_noise, realised_snr
from digit.evaluation.metrics.stability import token_spaces
from digit.evaluation.model_source import pipe_size
from digit.pipeline.editing import continue_rows, edit_region
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.sampling.request import SampleRequest, SamplingParams, takes_steps
from digit.sampling.sampler import calls
from digit.web import schema
from digit.web.jobs import Job, Refused

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What browsers make. Pillow knows many more, one of which starts another program."""
FRAMES = 16
"""How often a stage reports its progress."""


class Service:
    """A loaded model, with what its clusters look like where it has an atlas. Its methods that take a job run in one
    thread at a time.
    """

    def __init__(self, pipe: DigitPipeline, limits: schema.Limits | None = None, atlas: Atlas | None = None) -> None:
        self.pipe, self.limits, self.atlas = pipe, limits or schema.Limits(), atlas
        self.image_size = pipe_size(pipe)
        spaces: dict[str, tuple[tuple[int, int], int]] = {}  # kinds of tokens: (rows, columns) and vocabulary
        if pipe.encoder is not None and pipe.codebook is not None:
            spaces["semantic"] = (pipe.tokenizer.grid, pipe.tokenizer.vocab_size)
        elif pipe.prior is not None and pipe.space == "semantic":  # a model that generates only: its grid is square
            side = round((pipe.prior.config.length / pipe.prior.config.codebook_depth) ** 0.5)
            spaces["semantic"] = ((side, pipe.prior.config.length // side), pipe.prior.config.vocab_size)
        if pipe.vqgan is not None:
            spaces["vq"] = (pipe.vqgan.config.grid, pipe.vqgan.config.codes)
        self.grids = {space: grid for space, (grid, _) in spaces.items()}
        self.vocabulary = {space: size for space, (_, size) in spaces.items()}

    def about(self) -> schema.About:
        """What a client needs to know to ask well."""
        pipe, atlas, decoders = self.pipe, self.atlas, list(self.pipe.decoders)
        parts = {stage: part for stage, part in {"prior": pipe.prior, **pipe.decoders}.items() if part is not None}
        return schema.About(
            name=pipe.name,
            space=pipe.space,
            image_size=self.image_size,
            grids=self.grids,
            vocabulary=self.vocabulary,
            classes=pipe.class_names or pipe.num_classes,
            decoders=decoders,
            default_decoder=pipe.stage2().kind if decoders else None,
            stepped=[stage for stage, part in parts.items() if takes_steps(part.config)],
            can={
                "generate": pipe.can_generate,
                "edit": pipe.can_generate and (pipe.encoder is not None or pipe.space == "vq"),
                "guide": pipe.prior is not None and pipe.prior.config.can_guide,
                "clusters": atlas is not None,
            },
            clusters_from=atlas and f"{atlas.images:,} images{atlas.source and f' of {atlas.source}'}",
            settings={
                stage: to_dict(pipe.settings.get(stage, SamplingParams()).of(part.config.role, part.config.length))
                for stage, part in parts.items()
            },
            limits=to_dict(self.limits),
        )

    # ---- what can be asked

    def generate(self, body: schema.Generate, job: Job) -> schema.Images:
        """New images. DigitError: labels, settings or components that the model does not have, or too many images."""
        request = self._request(body, body.num, body.labels)
        return self._images(self.pipe.sample_tokens(request, self._watch(job, request)), request, job)

    @torch.inference_mode()
    def tokenize(self, body: schema.Tokenize, job: Job) -> schema.Tokenization:
        """The tokens of an image, and the images made of them."""
        pipe, image = self.pipe, self._read(body.image)
        found: dict[str, Any] = dict.fromkeys(("semantic", "vq", "vqgan", "full"))
        batch = self._batch(image)
        if pipe.encoder is not None and pipe.codebook is not None:
            semantic = pipe.tokenizer.encode(batch)
            found["semantic"] = semantic[0].tolist()
            job.check()
            if pipe.can_generate:
                request = SampleRequest(seed=body.seed, decoder=body.decoder).validate(pipe, prior=False)
                tokens = pipe.complete(semantic, request, self._watch(job, request))
                found["full"] = to_base64(to_pil(pipe.to_pixels(tokens)[0]))
        if pipe.vqgan is not None:
            vq = pipe.vqgan.encode(batch)
            found |= {"vq": vq[0].tolist(), "vqgan": to_base64(to_pil(pipe.to_pixels(Tokens(vq=vq))[0]))}
        return schema.Tokenization(grids=self.grids, picture=to_base64(image), **found)

    @torch.inference_mode()
    def stability(self, body: schema.Stability, job: Job) -> schema.Changed:
        """The paper's Table 1, for one image: add white noise and see which tokens change."""
        images, law = self._batch(self._read(body.image)), NoiseModel(seed=body.seed)
        noisy = add_noise(images, body.snr, [0], law)
        changes = {}
        for name, space in token_spaces(self.pipe).items():
            job.check()
            before, after = (space.codebook.assign(space.features(x))[0].cpu() for x in (images, noisy))
            places = (before != after).nonzero().flatten().tolist()
            share = len(places) / len(before)
            changes[name] = schema.Changes(
                count=len(places), of=len(before), share=share, places=places, after=after.tolist()
            )
        snr = float(realised_snr(images, noisy, law.signal))
        return schema.Changed(
            realised_snr=snr if math.isfinite(snr) else None, picture=to_base64(to_pil(noisy[0])), flips=changes
        )

    def edit(self, body: schema.Edit, job: Job) -> schema.Images:
        """Resample cells of an image, or everything below its first rows. Refused: both or neither of cells and rows,
        or cells outside of the grid. DigitError: see :mod:`digit.pipeline.editing`.
        """
        if (body.cells is None) == (body.rows is None):
            raise Refused("Say what to resample: exactly one of 'cells' and 'rows'.")
        request = self._request(body, body.num, None if body.label is None else [body.label])
        images = self._batch(self._read(body.image)).expand(body.num, -1, -1, -1)  # (num, 3, S, S)
        watch = self._watch(job, request)
        if body.rows is not None:
            tokens = continue_rows(self.pipe, images, body.rows, request, body.keep_pixels, watch)
        else:
            tokens = edit_region(self.pipe, images, self.region(body.cells or []), request, watch)
        return self._images(tokens, request, job)

    def cluster(self, number: int) -> schema.Cluster:
        """Patches of real images that are nearest to a cluster. DigitError: no atlas, or no such cluster."""
        if self.atlas is None:
            raise DigitError(
                "This model has no patches of its clusters; its owner can add them: digit atlas MODEL --data D"
            )
        if not 0 <= number < len(self.atlas.counts):
            raise DigitError(f"There is no cluster {number}; expected 0 to {len(self.atlas.counts) - 1}.")
        patches = [to_base64(Image.fromarray(patch)) for patch in self.atlas.patches(number)]
        return schema.Cluster(cluster=number, patches=patches)

    def region(self, cells: list[int]) -> Tensor:
        """The prior's grid (rows, columns), bool, True at these cells."""
        rows, columns = self.grids[self.pipe.space]
        if bad := [cell for cell in cells if not 0 <= cell < rows * columns]:
            raise Refused(f"There is no cell {bad[0]}; this model's grid has the cells 0 to {rows * columns - 1}.")
        marked = torch.zeros(rows * columns, dtype=torch.bool)
        marked[cells] = True
        return marked.view(rows, columns)

    # ---- help

    def _request(self, body: schema.Sampling, num: int | None, labels: Sequence[int | str] | None) -> SampleRequest:
        most, classes = self.limits.pictures, self.pipe.num_classes
        if (count := max(num or 0, len(labels or []))) > most:
            raise Refused(f"{count} images were asked for; at most {most} are made at a time here.", 413)
        numbers = None if labels is None else self.pipe.class_numbers(labels)
        for label, number in zip(labels or [], numbers or [], strict=True):
            if label == -1 or not -1 <= number < classes:  # "none" is -1
                known = f"knows 0 to {classes - 1}" if classes else "has no classes"
                raise Refused(f"The label {label} was given; this model {known}.")
        return SampleRequest.of_run(num, numbers, body.seed, body.decoder, body.settings).validate(self.pipe)

    def _read(self, text: str) -> Image.Image:
        """An image as a request carries it, scaled and cropped to the model's size."""
        if text.startswith("data:"):
            head, _, text = text.partition(",")
            if not head.endswith(";base64"):
                raise Refused("The image is a data URL without ';base64'; expected base64 of an image file.")
        most = self.limits.upload_mb
        if len(text) * 3 // 4 > (most << 20) + 2:
            raise Refused(f"The image is larger than {most} MiB, which is the most that is accepted here.", 413)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused("The image is not base64 of a file; paths and addresses are not opened here.") from error
        image = decode(data, "The uploaded file", self.limits.megapixels * 1_000_000, FORMATS).image
        return center_crop(resize_shorter(image, self.image_size), self.image_size)

    def _batch(self, image: Image.Image) -> Tensor:
        return to_tensor(image)[None].to(self.pipe.device)  # (1, 3, S, S)

    def _images(self, tokens: Tokens, request: SampleRequest, job: Job) -> schema.Images:
        job.check()
        labels = [-1] * len(request) if request.labels is None else request.labels.tolist()
        return schema.Images(
            pictures=[to_base64(to_pil(image)) for image in self.pipe.to_pixels(tokens)],
            labels=[None if label < 0 else label for label in labels],
            semantic=None if tokens.semantic is None else tokens.semantic.tolist(),
            vq=None if tokens.vq is None else tokens.vq.tolist(),
            sha256=tokens.sha256(),
            decoder=request.decoder,
            settings={stage: to_dict(params) for stage, params in request.params.items()},
        )

    def _watch(self, job: Job, request: SampleRequest) -> Callable[[str, int, Tensor], None]:
        """A callback for the pipeline: checks at every step, and reports some of them."""
        pipe = self.pipe

        def watch(stage: str, done: int, tokens: Tensor) -> None:
            job.check()
            space: Literal["semantic", "vq"] = "vq" if stage != "prior" or pipe.space == "vq" else "semantic"
            config = (pipe.part("prior") if stage == "prior" else pipe.decoders[stage]).config
            stepped, total = takes_steps(config), calls(config, request.params[stage])
            if not stepped and done % max(1, total // FRAMES) and done != total:
                return
            known = tokens.cpu().clone()
            if not stepped:
                known[:, done:] = -1
            job.report(schema.Progress(stage=stage, space=space, done=done, total=total, tokens=known.tolist()))

        return watch


def to_base64(image: Any) -> str:
    """An image as base64 of a PNG file."""
    return base64.b64encode(encode_png(image)).decode()


def open_atlas(folder: Path, pipe: DigitPipeline) -> Atlas | None:
    """The patches of the clusters of a model folder, if it has them."""
    path = folder / "codebook" / FILE
    usable = path.is_file() and pipe.encoder is not None and pipe.codebook is not None
    return Atlas(path, pipe.tokenizer) if usable else None
