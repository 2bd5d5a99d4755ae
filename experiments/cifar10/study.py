"""The CIFAR-10 study: every command of it, in order, each run once and recorded.

    study.py --list                 what there is, and what is done
    study.py core headline          the steps of these groups that are not done yet
    study.py core --processes 2     trainings divided among two processes: faster than two threads
    study.py core --profile gpu --extra=--device=cuda       larger and longer, on a GPU
    study.py --restore              begin with the parts of the packaged model instead of training them

A step is one command of `digit`. Its command, commit, machine and seconds go to OUT/records/STEP.json, from which
results.py makes RESULTS.md; a step with a record of success is not run again, an interrupted one goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from digit.core.environment import hardware, versions
from digit.core.files import read_json, write_json
from digit.core.hub import packaged_models

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
CLUSTERS = (256, 1024, 4096)
K = 1024  # of the headline, as many as the VQGAN has codes
PLAIN = "plain"
"""Of the encoder that saw neither noise nor blur, and of all that was made with its tokens."""
STEADY = {
    "cpu": ("training.epochs=5", "training.lr=1e-3"),
    "gpu": ("training.epochs=30", "training.lr=5e-4", "training.warmup_steps=100"),
    "short": ("training.epochs=6", "training.lr=5e-4", "training.warmup_steps=20"),
}
VARIED = ("objective.views.noise=0.5", "objective.views.blur=0.3")
"""How the plain encoder is trained on, until noise and blur hardly change its tokens."""
SHARPER = (
    "objective.gan_start=0",
    "objective.gan_warmup=0.05",
    "objective.gan_weight=0.02",
    "objective.discriminator_lr=4",
    "objective.discriminator_steps=3",
    "objective.shift=2",
    "training.epochs=2",
    "training.lr=5e-4",
)
"""How the VQGAN's decoder is trained on behind codes that stay: against a discriminator that it does not outrun."""
UNTRAINED = ("training.epochs=null", "training.steps=1", "training.warmup_steps=0", "training.lr=1e-9")
SMALL_MAE = (
    "model.dim=96",
    "model.depth=4",
    "model.heads=3",
    "training.epochs=null",
    "training.steps=1500",
    "training.batch_size=128",
    "training.warmup_steps=100",
)
"""The masked autoencoder that two cores can train; on a GPU it is as large and as long as the study's encoder."""
SHALLOW = {"half": 2, "quarter": 4}
"""Priors of fewer blocks than the profile's: by what their number is divided."""
SHIPPED = ("prior.cfg_scale=2.0", "prior.top_p=0.95", "ar.top_p=0.9")
"""Defaults of sampling of the model that is shipped."""

# What the profiles change in the presets, whose own values are for two CPU cores. "gpu" is a day of one GPU; "short" is
# its half hour, see ../gpu.sh. Token models stop when their validation no longer falls (a run's best weights are kept),
# and all have dropout: 100 passes over 50,000 images are enough to overfit.
LARGER = (
    "model.transformer.dim=512 model.transformer.depth=12 model.transformer.heads=8 model.transformer.dropout=0.1 "
    "training.batch_size=256 training.lr=6e-4 training.validate_every=500 training.patience=8"
)
BLOCKS = {"cpu": 4, "gpu": 12, "short": 12}
"""Of every prior and decoder over tokens, by profile."""
PRIOR_EPOCHS = {"cpu": "training.epochs=4", "gpu": "training.epochs=200", "short": "training.epochs=20"}
"""Of every prior, by profile; the presets' own on the CPU."""
WHOLE = {"cpu": 9, "gpu": 25, "short": 25}
"""Blocks of a prior with about as many parameters as semantic prior and AR decoder together, by profile."""
PROFILES = {
    "cpu": {},
    "gpu": {
        "encoder-vit": "model.depth=12",
        "vqgan": "model.channels=64 model.multipliers=[1,2,4] model.blocks=2 training.epochs=100 "
        "training.batch_size=256 training.lr=3e-4",
        "prior": f"{LARGER} {PRIOR_EPOCHS['gpu']}",
        "decoder": f"{LARGER} training.epochs=100",
        "onepass": "model.transformer.dim=384 model.transformer.depth=8 model.transformer.heads=6 "
        "model.transformer.ffn_dim=1536 model.transformer.dropout=0.1 model.pixels.widths=[256,128] "
        "training.epochs=100 training.batch_size=256 training.lr=5e-4",
    },
    "short": {
        "encoder-vit": "objective.local_count=2 training.epochs=40 training.warmup_steps=100",
        "vqgan": "model.channels=64 model.multipliers=[1,2,4] model.blocks=2 training.epochs=10 "
        "training.batch_size=256 training.lr=3e-4",
        "prior": f"{LARGER} {PRIOR_EPOCHS['short']}",
        "decoder": f"{LARGER} training.epochs=20",
        "onepass": "training.epochs=20 training.batch_size=256",
    },
}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        group: which of them one asks for together.
        name: of its record.
        command: what is typed, without `digit`.
    """

    group: str
    name: str
    command: str


@dataclass(frozen=True)
class Study:
    """Where things are and how large they are.

    Attributes:
        out: of every run and result.
        data: CIFAR-10, made by `digit data cifar10`.
        reference: Inception statistics of its training images; made here if the file does not exist.
        images: how many are generated for a fidelity.
        profile: "cpu", "gpu" or "short".
    """

    out: Path
    data: Path
    reference: Path
    images: int
    profile: str

    def steps(self) -> Iterator[Step]:
        """All of the study, in an order in which every step finds what it needs."""
        if not self.reference.exists():
            command = f"evaluate statistics {self.data} --split train --out {self.reference}"
            yield Step("tokenizers", "reference", command)
        yield from self._tokenizers()
        yield from self._core()
        yield from self._headline()
        yield from self._plain()
        yield from self._baselines()
        yield from self._ceiling()
        yield from self._sizes()
        yield from self._vocabularies()
        yield from self._similarity()
        yield from self._curves()

    @property
    def larger(self) -> bool:
        """Whether the profile is for a GPU."""
        return self.profile != "cpu"

    @property
    def _encoder(self) -> str:
        return "cifar10-encoder-vit" if self.larger else "cifar10-encoder"

    # -- training
    # ----------------------------------------------------------------------------------------------------------

    def _train(self, group: str, name: str, component: str, preset: str, data: Path, *changes: str) -> Step:
        kind = preset.removeprefix("cifar10-")
        profile = PROFILES[self.profile]
        larger = profile.get(kind, profile.get("decoder", "") if component == "decoder" else "").split()
        given = "".join(f" --set {shlex.quote(change)}" for change in (*larger, *changes))
        command = f"train {component} --preset {preset} --data {data} --out {self.out / name} --resume{given}"
        return Step(group, name, command)

    def _prior(self, group: str, name: str, clusters: int | str, *changes: str) -> Step:
        """Over the tokens of a cache; VQ tokens are the same in all of them."""
        return self._train(group, name, "prior", "cifar10-prior", self.out / f"tokens-{clusters}", *changes)

    def _decoder(self, group: str, kind: str, clusters: int | str, *changes: str) -> Step:
        name = kind if clusters == K else f"{kind}-{clusters}"
        return self._train(group, name, "decoder", f"cifar10-{kind}", self.out / f"tokens-{clusters}", *changes)

    def _perceptual(self) -> tuple[str, str]:
        """Settings of the perceptual loss: the plain encoder's features, for the other's are alike whether a picture is
        sharp.
        """
        encoder = self.out / f"encoder-{PLAIN}" / "model"
        return "objective.perceptual=encoder", f"objective.perceptual_encoder={encoder}"

    def _onepass(self, group: str) -> Step:
        """The feed-forward decoder reads images, and their tokens from the cache."""
        changes = (
            f"data.tokens={self.out / f'tokens-{K}'}",
            *self._perceptual(),
        )
        step = self._train(group, "onepass", "decoder", "cifar10-onepass", self.data, *changes)
        return replace(step, command=f"{step.command} --model {self.out / 'models' / f'tokenizers-{K}'}")

    def _assemble(self, group: str, name: str, options: str = "", **parts: str) -> Step:
        given = "".join(f" --{part.split('_')[0]} {self.out / folder}" for part, folder in parts.items())
        command = f"assemble --name {name}{given}{options} --out {self.out / 'models' / name}"
        return Step(group, f"assemble-{name}", command)

    def _shipped(self, group: str, name: str, **parts: str) -> Step:
        """A model stored as it is shipped, so that what is measured is what is shipped."""
        return self._assemble(group, name, " --dtype fp16" + _defaults(SHIPPED), **parts)

    def _tokenizers(self) -> Iterator[Step]:
        group = "tokenizers"
        preset = self._encoder
        yield self._train(group, f"encoder-{PLAIN}", "encoder", preset, self.data)
        steady = self._train(group, "encoder", "encoder", preset, self.data, *VARIED, *STEADY[self.profile])
        yield replace(steady, command=f"{steady.command} --from {self.out / f'encoder-{PLAIN}'}")
        yield self._train(group, "vqgan", "vqgan", "cifar10-vqgan", self.data, *self._perceptual())
        yield from self._vocabulary(group, PLAIN, f"encoder-{PLAIN}", K)
        yield from self._vocabulary(group, K)

    def _codebook(self, group: str, name: int | str, encoder: str, clusters: int | str) -> Iterator[Step]:
        """Codebook and tokenizers."""
        out, book = self.out, f"codebook-{name}"
        command = f"fit-codebook --encoder {out / encoder} --data {self.data} --clusters {clusters} --images 20000"
        yield Step(group, book, f"{command} --out {out / book}")
        parts = {"encoder": encoder, "codebook": book, "vqgan": "vqgan"}
        yield self._assemble(group, f"tokenizers-{name}", **parts)

    def _vocabulary(
        self, group: str, name: int | str, encoder: str = "encoder", clusters: int | None = None
    ) -> Iterator[Step]:
        """Codebook, tokenizers and the tokens of the training images."""
        out = self.out
        yield from self._codebook(group, name, encoder, clusters or name)
        tokens = out / f"tokens-{name}"
        command = f"cache-tokens --model {out / 'models' / f'tokenizers-{name}'} --data {self.data} --out {tokens}"
        yield Step(group, f"tokens-{name}", command)

    # -- what is compared
    # --------------------------------------------------------------------------------------------------

    def _core(self) -> Iterator[Step]:
        """The parts of the model that is shipped, and its measurements."""
        group = "core"
        yield self._prior(group, "prior-cond", K, "data.labels=true")
        yield self._onepass(group)
        for kind in ("ar", "masked"):
            yield self._decoder(group, kind, K)
        yield self._shipped(group, "cond", base=f"models/tokenizers-{K}", prior="prior-cond", decoder="ar")
        yield self._assemble(
            group, "cond-two", " --default-decoder onepass --dtype fp16", base="models/cond", decoder="onepass"
        )
        yield self._assemble(group, "cond-all", base="models/cond-two", decoder="masked")
        yield self._stability(group, "stability", "cond")
        for kind, name in {"ar": "cond", "onepass": "cond-two", "masked": "cond-all"}.items():
            yield self._fidelity(group, f"cond-{kind}", name, f"--decoder {kind}")
        yield self._reconstruction(group, "reconstruction", "cond-all")

    def _headline(self) -> Iterator[Step]:
        """Unconditional: a prior over semantic tokens with each decoder against the same prior over VQ tokens."""
        group = "headline"
        for seed in SEEDS:
            own = () if seed == 0 else (f"training.seed={seed}",)
            yield self._prior(group, f"prior-s{seed}", K, *own)
            yield self._prior(group, f"vq-prior-s{seed}", PLAIN, "data.target=vq", *own)
            base = f"models/tokenizers-{K}"
            yield self._assemble(group, f"semantic-s{seed}", base=base, prior=f"prior-s{seed}", decoder="ar")
            yield self._assemble(group, f"vq-s{seed}", base=base, prior=f"vq-prior-s{seed}")
            yield self._fidelity(group, f"vq-s{seed}", f"vq-s{seed}")
            yield self._fidelity(group, f"semantic-s{seed}-ar", f"semantic-s{seed}")
        for kind in ("onepass", "masked"):
            name = f"semantic-s0-{kind}"
            yield self._assemble(group, name, f" --default-decoder {kind}", base="models/semantic-s0", decoder=kind)
            yield self._fidelity(group, name, name)
        # without semantic tokens in front the masked decoder is MaskGIT, the baseline of the pair above, for as many
        # epochs as its priors
        changes = ("data.prefix=null", PRIOR_EPOCHS[self.profile])
        yield self._train(group, "maskgit", "decoder", "cifar10-masked", self.out / f"tokens-{K}", *changes)
        yield self._assemble(group, "vq-masked", base=f"models/tokenizers-{K}", prior="maskgit")
        yield self._fidelity(group, "vq-masked", "vq-masked")

    def _plain(self) -> Iterator[Step]:
        """The model that is shipped, with the AR decoder, over tokens that noise and blur change more easily."""
        yield self._prior(PLAIN, f"prior-{PLAIN}", PLAIN, "data.labels=true")
        yield self._decoder(PLAIN, "ar", PLAIN)
        parts = {"base": f"models/tokenizers-{PLAIN}", "prior": f"prior-{PLAIN}", "decoder": f"ar-{PLAIN}"}
        yield self._shipped(PLAIN, PLAIN, **parts)
        yield self._stability(PLAIN, f"stability-{PLAIN}", PLAIN)
        yield self._fidelity(PLAIN, PLAIN, PLAIN)

    def _baselines(self) -> Iterator[Step]:
        """Stability of tokens of encoders that nobody taught to tell pictures apart: random weights, and a masked
        autoencoder.
        """
        group = "baselines"
        small = () if self.larger else SMALL_MAE
        trials = {
            "random": (self._encoder, UNTRAINED),
            "mae": ("cifar10-encoder-vit", ("objective={method: mae}", *small)),
        }
        for name, (preset, changes) in trials.items():
            yield self._train(group, f"encoder-{name}", "encoder", preset, self.data, *changes)
            yield from self._codebook(group, name, f"encoder-{name}", K)
            yield self._stability(group, f"stability-{name}", f"tokenizers-{name}")

    def _ceiling(self) -> Iterator[Step]:
        """What better training of the VQGAN's decoder alone gives: what its tokens leave open limits every picture made
        of them.
        """
        group = "ceiling"
        longer = ("training.epochs=20",) if self.larger else ()
        changes = (*self._perceptual(), *SHARPER, *longer)
        sharper = self._train(group, "vqgan-sharper", "vqgan", "cifar10-vqgan", self.data, *changes)
        yield replace(sharper, command=f"{sharper.command} --from {self.out / 'vqgan'} --freeze tokens")
        yield self._assemble(group, "sharper", vqgan="vqgan-sharper")
        yield self._reconstruction(group, "reconstruction-sharper", "sharper")

    def _sizes(self) -> Iterator[Step]:
        """Priors of fewer blocks, of both kinds; a VQ prior about as large as semantic prior and decoder together, and
        one with classes.
        """
        group, base = "sizes", f"models/tokenizers-{K}"
        depths = {name: f"model.transformer.depth={BLOCKS[self.profile] // part}" for name, part in SHALLOW.items()}
        for name, depth in depths.items():
            model = f"cond-{name}"
            yield self._prior(group, f"prior-{model}", K, "data.labels=true", depth)
            yield self._shipped(group, model, base="models/cond-two", prior=f"prior-{model}")
            for kind in ("ar", "onepass"):
                yield self._fidelity(group, f"{model}-{kind}", model, f"--decoder {kind}")
        trials = {
            "vq-quarter": ("data.target=vq", depths["quarter"]),
            "semantic-quarter": (depths["quarter"],),
            "vq-whole": ("data.target=vq", f"model.transformer.depth={WHOLE[self.profile]}"),
        }
        for name, changes in trials.items():
            yield self._prior(group, f"prior-{name}", K, *changes)
            decoder = {"decoder": "ar"} if name.startswith("semantic") else {}
            yield self._assemble(group, name, base=base, prior=f"prior-{name}", **decoder)
            yield self._fidelity(group, name, name)
        # the baseline with classes is sampled with the settings of the priors that it is compared with
        settings = _defaults(item for item in SHIPPED if item.startswith("prior."))
        yield self._prior(group, "prior-vq-cond", K, "data.target=vq", "data.labels=true")
        yield self._assemble(group, "vq-cond", settings, base=base, prior="prior-vq-cond")
        yield self._fidelity(group, "vq-cond", "vq-cond")
        for name in ("vq-quarter", "semantic-quarter"):  # by how much an FID depends on the number of pictures
            yield self._fidelity(group, f"{name}-many", name, images=2 * self.images)

    def _vocabularies(self) -> Iterator[Step]:
        """Other numbers of semantic tokens, behind priors of one block, as ``semantic-quarter`` has."""
        group = "vocabularies"
        for clusters in (size for size in CLUSTERS if size != K):
            yield from self._vocabulary(group, clusters)
            yield self._prior(
                group,
                f"prior-{clusters}",
                clusters,
                f"model.transformer.depth={BLOCKS[self.profile] // SHALLOW['quarter']}",
            )
            yield self._decoder(group, "ar", clusters)
            parts = {"base": f"models/tokenizers-{clusters}", "prior": f"prior-{clusters}", "decoder": f"ar-{clusters}"}
            yield self._assemble(group, f"semantic-{clusters}", **parts)
            yield self._fidelity(group, f"semantic-{clusters}", f"semantic-{clusters}")

    def _similarity(self) -> Iterator[Step]:
        """KID, precision and recall, which need the features of real images and not their statistics alone."""
        group, features = "similarity", self.out / "train-features.npz"
        yield Step(
            group, "features", f"evaluate statistics {self.data} --split train --num 5000 --features --out {features}"
        )
        trials = {
            "vq-quarter": "",
            "semantic-quarter": "",
            "cond-quarter-ar": " --decoder ar",
            "cond-quarter-onepass": " --decoder onepass",
        }
        for name, options in trials.items():
            model = self.out / "models" / name.removesuffix("-ar").removesuffix("-onepass")
            command = f"evaluate fidelity {model} --num 5000 --no-fid --kid --prc --reference {features}"
            command += f" --batch-size 250{options}"
            yield Step(
                group, f"similarity-{name}", f"{command} --out {self.out / 'results' / f'similarity-{name}.json'}"
            )

    def _curves(self) -> Iterator[Step]:
        """Figures over settings, layers and prefixes."""
        group, model = "curves", self.out / "models" / "cond"
        # an FID of fewer images than the 2,048 features has a covariance without full rank
        few = f"--num {min(self.images, 10_000 if self.larger else 2000)}"
        axes = (
            "--vary top_k=0,50,200 --vary top_p=0.8,0.9,0.95 --vary cfg_scale=1,1.5,2,3 --vary decoder_top_p=0.8,0.9,1"
        )
        yield self._evaluate(
            group, "sweep", f"sweep {model} --reference {self.reference} {axes} --decoder ar --metrics fid {few}"
        )
        yield self._evaluate(group, "probe", f"probe {model} --data {self.data} --num 10000 --layers all --epochs 20")
        pair = self.out / "models"
        command = (
            f"prefix {pair / 'semantic-s0'} --baseline {pair / 'vq-s0'} --data {self.data} --reference {self.reference}"
        )
        yield self._evaluate(group, "prefix", f"{command} --shares 0,0.5,1 --decoder ar --metrics fid {few}")

    # -- measuring
    # ---------------------------------------------------------------------------------------------------------

    def _evaluate(self, group: str, name: str, command: str) -> Step:
        return Step(group, f"evaluate-{name}", f"evaluate {command} --out {self.out / 'results' / name}")

    def _stability(self, group: str, name: str, model: str) -> Step:
        """Of a model's tokens, over test images."""
        command = f"stability {self.out / 'models' / model} --data {self.data} --split test --num 2000"
        return self._evaluate(group, name, command)

    def _reconstruction(self, group: str, name: str, model: str) -> Step:
        """How test images come back through every path of a model."""
        command = f"reconstruction {self.out / 'models' / model} --data {self.data} --split test"
        return self._evaluate(group, name, f"{command} --num {min(self.images // 2, 10_000)} --lpips none")

    def _fidelity(self, group: str, name: str, model: str, options: str = "", images: int | None = None) -> Step:
        path = self.out / "results" / f"fidelity-{name}.json"
        command = f"evaluate fidelity {self.out / 'models' / model} --num {images or self.images}"
        command += f" --reference {self.reference}"
        return Step(group, f"fidelity-{name}", f"{command} --batch-size 250 {options} --out {path}".replace("  ", " "))


def _defaults(settings: Iterable[str]) -> str:
    return "".join(f" --default {item}" for item in settings)


def run(step: Step, out: Path, extra: list[str], processes: int) -> None:
    """Run a step and keep its record; the study stops where one fails."""
    record = out / "records" / f"{step.name}.json"
    earlier = read_json(record)["seconds"] if record.exists() else 0.0
    command = ["digit", *shlex.split(step.command)]
    if command[1] == "train":
        command += extra
        if processes > 1:
            command = ["torch.distributed.run", "--nproc_per_node", str(processes), "-m", *command]
    print(f"\n== {step.name}\n{shlex.join(command)}", flush=True)
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    values = {
        "name": step.name,
        "group": step.group,
        "command": shlex.join(command).replace("torch.distributed.run", "torchrun"),
        "finished": code == 0,
        "seconds": round(earlier + time.perf_counter() - began, 1),  # of all attempts
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware() | {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))},
        "versions": versions(),
    }
    write_json(record, values)
    if code:
        sys.exit(f"{step.name} ended with exit code {code}; the same command goes on from here.")


def restore(out: Path) -> None:
    """Begin where the packaged model was made: its parts, rounded to float16 as they are stored, with the records of
    their training.
    """
    parts = {"encoder": "encoder", "codebook": f"codebook-{K}", "vqgan": "vqgan", "prior": "prior-cond-quarter"}
    for part, name in (parts | {f"decoder/{kind}": kind for kind in ("ar", "onepass")}).items():
        if not (out / name).exists():
            shutil.copytree(packaged_models()["cifar10"] / part, out / name)
            write_json(out / "records" / f"{name}.json", read_json(RESULTS / f"{name}.json"))


def is_done(step: Step, out: Path) -> bool:
    """Whether its record says so."""
    record = out / "records" / f"{step.name}.json"
    return record.exists() and bool(read_json(record)["finished"])


def main() -> None:
    """Run the groups that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "groups",
        nargs="*",
        help="tokenizers, core, headline, plain, baselines, ceiling, sizes, vocabularies, similarity, curves; or "
        "names of steps",
    )
    parser.add_argument("--list", action="store_true", help="show the steps and which are done")
    parser.add_argument("--restore", action="store_true", help="take what the packaged model has as trained already")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--reference", type=Path, default=Path("runs/study/train-statistics.npz"))
    parser.add_argument("--images", type=int, default=5_000, help="generated for each fidelity")
    parser.add_argument("--profile", choices=tuple(PROFILES), default="cpu")
    parser.add_argument(
        "--extra", action="append", default=[], help="given to every training, such as --extra=--device=cuda"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="that share every training, each with OMP_NUM_THREADS threads"
    )
    options = parser.parse_args()
    study = Study(options.out, options.data, options.reference, options.images, options.profile)
    if options.restore:
        restore(options.out)
    for step in study.steps():
        if options.list:
            print(f"{'done' if is_done(step, options.out) else '    '}  {step.group:13} {step.name}")
        elif {step.group, step.name} & set(options.groups) and not is_done(step, options.out):
            run(step, options.out, options.extra, options.processes)


if __name__ == "__main__":
    main()
