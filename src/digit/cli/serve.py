"""``serve`` and ``atlas``: the model as a page and a JSON API, and the patches that the page shows of each cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from digit.cli import options
from digit.cli.options import option
from digit.core.errors import DigitError, require


def serve(
    model: options.Model = None,
    host: Annotated[str, option("Address to listen on; 0.0.0.0 is open to the network.")] = "127.0.0.1",
    port: Annotated[int, option("0 takes any that is free.", min=0, max=65535)] = 7860,
    auth: Annotated[str | None, option("USER:PASSWORD asked of visitors. Default: none.", envvar="DIGIT_AUTH")] = None,
    share: Annotated[bool, option("A public address too, by Gradio's tunnel; needs --auth.", "--share")] = False,
    waiting: Annotated[int, option("Requests in the queue; more are told that the server is busy.", min=0)] = 64,
    max_pictures: Annotated[int, option("Images per request.", min=1)] = 16,
    max_seconds: Annotated[float, option("Seconds that a request may run.", min=0.1)] = 120.0,
    max_upload: Annotated[int, option("MiB of an uploaded image.", min=1)] = 10,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    variant: options.Variant = None,
) -> None:
    """Serve a model as a page (generate, inspect tokens, edit) and as a JSON API, see docs/serving.md.

    Only this machine can reach it unless --host or --share say otherwise. Uploaded images are never kept.

    Examples:
      digit serve cifar10

      DIGIT_AUTH=me:secret digit serve cifar10 --host 0.0.0.0
    """
    from digit.core.config import from_dict
    from digit.pipeline.hub import resolve_model

    if auth is not None and not all(auth.partition(":")[::2]):
        raise DigitError("--auth needs the form USER:PASSWORD, with something on both sides.")
    if share and auth is None:
        raise DigitError("--share makes the server reachable for everybody, so it needs --auth USER:PASSWORD.")
    require("fastapi_offline", "web", "digit serve")
    if share:
        require("gradio", "share", "--share")
    from digit.web.app import LOCAL, make_app, serve
    from digit.web.schema import Limits
    from digit.web.service import Service, open_atlas

    values = {"waiting": waiting, "pictures": max_pictures, "seconds": max_seconds, "upload_mb": max_upload}
    limits = from_dict(Limits, values, "The options of digit serve")
    local = host.strip("[]") in {name.strip("[]") for name in LOCAL}
    if not local and auth is None:
        typer.echo(
            f"Warning: everybody who can reach {host} can use this server; --auth asks for a password.", err=True
        )
    folder = resolve_model(model, variant=variant)
    pipe = options.load(str(folder), device, dtype)
    service = Service(pipe, limits, open_atlas(folder, pipe))
    user, _, password = (auth or "").partition(":")
    hosts = LOCAL if local and not share else None
    serve(make_app(service, (user, password) if auth else None, hosts), host, port, share)


def atlas(
    model: options.RequiredModel,
    data: options.Data,
    split: options.Split = "train",
    num: Annotated[int, options.num("How many images to look through, spread over the dataset.")] = 5000,
    each: Annotated[int, option("Patches a cluster.", min=1)] = 8,
    device: options.Device = None,
) -> None:
    """Find what each cluster looks like: the patches of real images nearest to its centroid. The page of digit serve
    shows them.

    Writes codebook/patches.safetensors into the model's folder.

    Example:  digit atlas runs/model --data data/cifar10
    """
    from digit.clustering.patches import FILE, build_atlas
    from digit.core.progress import track
    from digit.evaluation.model_source import image_batches, open_images
    from digit.pipeline.hub import resolve_model

    folder = resolve_model(model)
    tokenizer = options.load(str(folder), device).tokenizer
    images = open_images(data, split)
    images = open_images(data, split, min(num, len(images)))
    batches = image_batches(images, tokenizer.image_size, 64)
    shown = track((batch.images for batch in batches), "Looking for patches", -(-len(images) // 64), "batches")
    path = folder / "codebook" / FILE
    counts = build_atlas(tokenizer, shown, path, each, f"{images.name} ({images.split})")
    used = int((counts > 0).sum())
    typer.echo(f"Patches of {used} of {len(counts)} clusters, from {len(images):,} images: {path}")
