"""From the records of study.py to RESULTS.md and the README's table, written anew.

With ``--collect runs/study``, records, metrics and results are first copied into results/.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from digit.core.files import read_json, write_bytes, write_file, write_json
from digit.evaluation import paper
from digit.evaluation.results import COLORS, columns, legend, panels, shown
from digit.evaluation.studies.stages import Comparison
from digit.pipeline.info import folder_part
from digit.training.logs import last_metrics

HERE = Path(__file__).parent
KEPT = HERE / "results"
README = HERE.parents[1] / "README.md"
MARKS = ("<!-- results -->", "<!-- /results -->")
SNRS = (30.0, 20.0, 10.0, 5.0, 0.01)

Json = dict[str, Any]
FIDELITIES = {
    "vq-s{}": "VQ prior (baseline)",
    "semantic-s{}-ar": "semantic prior + AR decoder",
    "semantic-s{}-onepass": "semantic prior + feed-forward decoder",
    "vq-masked": "VQ tokens alone, masked (MaskGIT, baseline)",
    "semantic-s{}-masked": "semantic prior + masked decoder",
    "vq-cond": "VQ prior, with a class",
    "cond-ar": "semantic prior + AR decoder, with a class",
    "cond-masked": "semantic prior + masked decoder, with a class",
    "cond-onepass": "semantic prior + feed-forward decoder, with a class",
    "cond-quarter-ar": "the packaged model, its prior of one block, with a class, AR decoder",
    "cond-quarter-onepass": "the first study's packaged model with its default, the feed-forward decoder",
    "plain": "semantic prior + AR decoder with a class, over the plain encoder's tokens",
}
SIZES = {
    "4 blocks of 128": ("vq-s0", "semantic-s0-ar", "cond-ar", "cond-onepass", "vq-prior-s0", "prior-s0"),
    "2 blocks of 128": ("", "", "cond-half-ar", "cond-half-onepass", "", ""),
    "1 block of 128": (
        "vq-quarter",
        "semantic-quarter",
        "cond-quarter-ar",
        "cond-quarter-onepass",
        "prior-vq-quarter",
        "prior-semantic-quarter",
    ),
    "9 blocks of 128": ("vq-whole", "", "", "", "prior-vq-whole", ""),
}
"""Four fidelities and two trainings of priors of each size; those of the first row are the study's own."""
MATCHED = ("VQ prior", "semantic prior + AR decoder")
DECODERS = {"ar": "AR", "masked": "masked", "onepass": "feed-forward"}


# -- collecting
# ------------------------------------------------------------------------------------------------------------


def collect(study: Path) -> None:
    """Copy what the page needs out of a study's folder: a file a step, a few kilobytes each."""
    for path in sorted((study / "records").glob("*.json")):
        record = read_json(path)
        if not record["finished"]:
            continue
        name = record["name"]
        run, result = study / name, study / "results"
        if (run / "metrics.jsonl").exists():
            record["metrics"] = last_metrics(run)
            record["parameters"] = folder_part(run, "model").parameters
        for place in (result / f"{name}.json", result / name.removeprefix("evaluate-") / "result.json"):
            if place.exists():
                found = read_json(place)
                record["result"] = {
                    key: found[key] for key in ("values", "settings", "data", "source", "reference") if key in found
                }
        write_json(KEPT / f"{name}.json", record)


# -- writing
# ---------------------------------------------------------------------------------------------------------------


class Results:
    """The collected files, by the name of their step."""

    def __init__(self, folder: Path = KEPT) -> None:
        self.steps: dict[str, Json] = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}

    def fid(self, name: str) -> float | None:
        """Of a step ``fidelity-NAME``, or None where it has not run."""
        step = self.steps.get(f"fidelity-{name}")
        return None if step is None else float(step["result"]["values"]["fid"])

    def fids(self, pattern: str) -> list[float]:
        """Of every seed that has run."""
        found = [self.fid(pattern.format(seed)) for seed in range(3)]
        return [value for value in found if value is not None]

    def metric(self, name: str, key: str) -> float | None:
        """The last value of a training's metric."""
        value = self.steps.get(name, {}).get("metrics", {}).get(key)
        return None if value is None else float(value)

    # sections

    def headline(self) -> str:
        """FID of every pair, over seeds where there are several."""
        rows = []
        for pattern, title in FIDELITIES.items():
            values = self.fids(pattern) if "{}" in pattern else [v for v in [self.fid(pattern)] if v is not None]
            if values:
                rows.append([title, _spread(values), len(values), f"{self._images(pattern.format(0)):,}"])
        text = table(["model", "FID", "seeds", "images"], rows)
        vq = self.fids("vq-s{}")
        ratios = [
            f"{_ratio(vq, found)} with the {title} decoder"
            for kind, title in DECODERS.items()
            if vq and (found := self.fids(f"semantic-s{{}}-{kind}"))
        ]
        if ratios:
            known = "the paper, ImageNet, AR: 24.38 / 9.66 = 2.52"
            text += f"\nFID(VQ prior) / FID(semantic prior + decoder): **{', '.join(ratios)}** ({known}).\n"
        maskgit, masked = self.fid("vq-masked"), self.fid("semantic-s0-masked")
        if maskgit is not None and masked is not None:
            text += f"FID(MaskGIT) / FID(semantic prior + masked decoder): **{maskgit / masked:.2f}**.\n"
        return text

    def _images(self, name: str) -> int:
        return int(self.steps[f"fidelity-{name}"]["result"]["source"]["images"])

    def parts(self) -> str:
        """What was trained, how large it is and how well it does."""
        rows = []
        for name, step in self.steps.items():
            if "metrics" in step:
                metrics = step["metrics"]
                shown = [f"{label} {metrics[key]:.4g}" for key, label in SHOWN.items() if key in metrics]
                rows.append(
                    [
                        f"`{name}`",
                        f"{step['parameters']:,}",
                        f"{metrics['step']:,}",
                        f"{step['seconds'] / 60:.0f}",
                        ", ".join(shown),
                    ]
                )
        return table(["run", "parameters", "steps", "minutes", "on held-out images"], rows)

    def stability(self) -> str:
        """Share of changed tokens, as the paper's Table 1, of VQ tokens and of both encoders' semantic tokens."""
        measured = [
            ("evaluate-stability", "vq", "VQ tokens"),
            *((step, "semantic", title) for step, title in ENCODERS.items()),
        ]
        found = [
            (self.steps[step]["result"]["values"], space, title)
            for step, space, title in measured
            if step in self.steps
        ]
        if not found:
            return MISSING
        rows = []
        others: dict[str, list[str]] = {}
        for values, space, title in found:
            own = [v for v in values if v["space"] == space]
            for key, label in MEASURES.items():
                row = [v[key]["mean"] for snr in SNRS for v in own if v["kind"] == "noise" and v["level"] == snr]
                rows.append([f"{title}, {label}", *(f"{value:.3f}" for value in row)])
            for v in (v for v in own if v["kind"] != "noise"):
                others.setdefault(f"{v['kind']} {v['level']:g}", []).append(f"{v['changed']['mean']:.3f}")
        noise = table(["SNR in dB", *(f"{snr:g}" for snr in SNRS)], rows)
        titles = [f"{title} changed" for _, _, title in found]
        return f"{noise}\n{table(['other changes', *titles], ([name, *shares] for name, shares in others.items()))}"

    def ceilings(self) -> str:
        """What the decoders could reach at best: real tokens decoded."""
        rows = [
            [
                row["name"] + more,
                f"{row['images']:,}",
                *(_number(row["values"].get(key)) for key in ("rfid", "psnr", "ssim")),
            ]
            for name, more in CEILINGS.items()
            if name in self.steps
            for row in self.steps[name]["result"]["values"]
        ]
        if not rows:
            return MISSING
        return table(["path", "images", "rFID", "PSNR, dB", "SSIM"], rows)

    def layers(self) -> str:
        """Linear probes and neighbours of every layer of the prior with classes."""
        step = self.steps.get("evaluate-probe")
        if step is None:
            return MISSING
        values = step["result"]["values"]
        scores = [
            (f"after block {score['state']}" if score["state"] else "embeddings", score) for score in values["layers"]
        ]
        if values["encoder"] is not None:
            scores.append(("the encoder's features", values["encoder"]))
        rows = [[name, _percent(score["accuracy"]), _percent(score["knn"])] for name, score in scores]
        return table(["features", "linear probe, %", "k-NN, %"], rows)

    def sizes(self) -> str:
        """FID and perplexity of priors of every size that was measured."""
        rows = []
        for title, names in SIZES.items():
            fids = [self.fid(name) for name in names[:4]]
            if any(value is not None for value in fids):
                perplexities = [self.metric(name, "validation/perplexity") for name in names[4:]]
                rows.append([title, *map(_number, fids), *map(_number, perplexities)])
        ways = ["VQ", "semantic, AR decoder", "with a class, AR decoder", "with a class, feed-forward decoder"]
        return table(["prior", *ways, "perplexity, VQ", "perplexity, semantic"], rows)

    def images(self) -> str:
        """FID of the same models over twice as many images."""
        rows = []
        for name, title in MANY.items():
            few, many = self.fid(name), self.fid(f"{name}-many")
            if few is not None and many is not None:
                rows.append(
                    [title, f"{self._images(name):,}: {few:.2f}", f"{self._images(f'{name}-many'):,}: {many:.2f}"]
                )
        return table(["model", "images: FID", "twice as many: FID"], rows) if rows else MISSING

    def vocabularies(self) -> str:
        """FID and perplexities over the number of clusters."""
        rows = []
        for clusters, (fidelity, prior, decoder) in VOCABULARIES.items():
            fid, perplexities = (
                self.fid(fidelity),
                [self.metric(name, "validation/perplexity") for name in (prior, decoder)],
            )
            if fid is not None:
                rows.append([f"{clusters:,}", *map(_number, (fid, *perplexities))])
        return table(["K", "FID", "perplexity of the prior", "of the AR decoder"], rows) if rows else MISSING

    def similarity(self) -> str:
        """KID, precision and recall of what was measured."""
        rows = []
        for name, title in SIMILARITIES.items():
            if step := self.steps.get(f"similarity-{name}"):
                values = step["result"]["values"]
                rows.append(
                    [title, f"{values['kid_mean']:.4f}", *(f"{values[key]:.3f}" for key in ("precision", "recall"))]
                )
        return table(["model", "KID", "precision", "recall"], rows) if rows else MISSING

    def settings(self) -> str:
        """FID over the settings of sampling, one at a time."""
        step = self.steps.get("evaluate-sweep")
        if step is None:
            return MISSING
        points = step["result"]["values"]["points"]
        rows = [[", ".join(f"{k} {v}" for k, v in p["settings"].items()), _number(p["values"]["fid"])] for p in points]
        return table(["setting", "FID"], rows)

    def prefixes(self) -> str:
        """FID where a share of a real image's tokens is given."""
        step = self.steps.get("evaluate-prefix")
        if step is None:
            return MISSING
        curves = step["result"]["values"]
        shares = [f"{p['share']:.0%}" for p in curves[0]["points"]]
        rows = [[curve["name"], *(_number(p["values"]["fid"]) for p in curve["points"])] for curve in curves]
        return table(["given of the tokens", *shares], rows)

    def discretisers(self) -> str:
        """The ranking of ``digit evaluate tokens``."""
        found = Comparison.load(KEPT / "second" / "tokens.json")
        rows = found.rows()
        head = columns(rows)
        return table(head, ([shown(row.get(name)) for name in head] for row in rows)) + f"\n{found.provenance()}.\n"

    def passes(self) -> str:
        """FID and images a second over the passes of priors of three kinds, and the likelihood of regions."""
        found = second("steps")
        if found is None:
            return MISSING
        rates = ("rate_64", "rate_1", "rate_64_native", "rate_1_native")
        rows = [
            [p["kind"], p["passes"], _number(p["fid"]), *(_number(p.get(name)) for name in rates)]
            for p in found["points"]
        ]
        head = ["prior", "passes", "FID", "images/s, 64 at a time", "one at a time", "C++ step, 64", "C++ step, one"]
        regions = [[name, *(f"{bits:.3f}" for bits in values.values())] for name, values in found["bits"].items()]
        kinds = [f"{kind}, bits a token" for kind in next(iter(found["bits"].values()))]
        trained = [
            [kind, f"{run['parameters']:,}", f"{run['step']:,}", _number(run["validation/perplexity"])]
            for kind, run in found["trained"].items()
        ]
        priors = table(["prior", "parameters", "steps", "perplexity, held-out tokens"], trained)
        return f"{table(head, rows)}\n{priors}\n{table(['sampled region', *kinds], regions)}"

    def feedforward(self) -> str:
        """The packaged feed-forward decoder of either study; see feedforward.py."""
        found = second("feedforward")
        if found is None:
            return MISSING
        names = ("fid", "fid_infinity", "kid_mean", "precision", "recall")
        rows = [
            [row["model"], f"{row['parameters']:,}", *(_number(row[n], 4 if n == "kid_mean" else 2) for n in names)]
            for row in found["models"]
        ]
        return table(["model", "parameters of the decoder", "FID", "FID∞", "KID", "precision", "recall"], rows)

    def matched(self, record: str) -> str:
        """The pair at equal training flops; see matched.py."""
        found = second(record)
        if found is None:
            return MISSING
        rows = []
        for row in found["models"]:
            parts = row["trainings"].values()
            rows.append(
                [
                    row["model"],
                    row["seed"],
                    f"{sum(part['parameters'] for part in parts):,}",
                    f"{sum(part['pflop'] for part in parts):.3f}",
                    " + ".join(f"{part['steps']:,}" for part in parts),
                    " + ".join(f"{part['lr']:g}" for part in parts),
                    " + ".join(_number(part.get("minutes"), 0) for part in parts),
                    " + ".join(f"{part['bits']:,.0f}" for part in parts),
                    _number(row["fid"]),
                    _number(row.get("fid_infinity")),
                ]
            )
        head = ["model", "seed", "parameters", "training PFLOP", "steps of 64", "rate", "minutes of a core"]
        return table([*head, "bits an image", "FID", "FID∞"], rows)

    def bits(self) -> list[tuple[str, float, float, float]]:
        """For every set of semantic tokens: its name, bits an image spent on it, bits of VQ tokens saved, FID ratio."""
        points = []
        for name, (vq, semantic, decoder, above, below) in BITS.items():
            vq_bits, spent, left = (
                64 * math.log2(self.metric(run, "validation/perplexity") or math.nan) for run in (vq, semantic, decoder)
            )
            points.append((name, spent, vq_bits - left, (self.fid(above) or math.nan) / (self.fid(below) or math.nan)))
        sets, one = second("token-sets"), second("vq-one-epoch")  # saved is counted after as many epochs
        if one is not None:
            bits = one["validation/nll"] * one["positions"] / math.log(2)
            points += self._equal_flops("matched-256", "256 VQ tokens, equal flops", bits)
        if sets is not None:
            alone = sets["alone"]
            points += self._equal_flops("matched-64", "64 VQ tokens, equal flops", alone["bits"])
            points += [
                (f"one epoch each, {name}", row["spent"], alone["bits"] - row["left"], alone["fid"] / row["fid"])
                for name, row in sets["sets"].items()
                if "fid" in row
            ]
        return points

    def _equal_flops(self, record: str, name: str, alone: float) -> list[tuple[str, float, float, float]]:
        """The point of a record of matched.py, the mean over its seeds; ``alone``: bits of a VQ prior of one epoch."""
        rows = (second(record) or {"models": []})["models"]
        priors, pairs = ([row for row in rows if row["model"] == model] for model in MATCHED)
        if not pairs:
            return []
        bits = [[part["bits"] for part in row["trainings"].values()] for row in pairs]
        spent, left = (statistics.mean(column) for column in zip(*bits, strict=True))
        ratios = [prior["fid"] / pair["fid"] for prior, pair in zip(priors, pairs, strict=True)]
        return [(name, spent, alone - left, statistics.mean(ratios))]

    def saved(self) -> str:
        """The table of :meth:`bits`."""
        rows = [
            [name, f"{spent:.0f}", f"{saved:.0f}", _number(saved / spent), _number(ratio)]
            for name, spent, saved, ratio in self.bits()
        ]
        head = ["semantic tokens", "bits spent", "bits saved", "saved a bit spent", "FID(VQ prior) / FID(pair)"]
        return table(head, rows)

    def token_sets(self) -> str:
        """What :mod:`token_sets` found; the VQ prior in the first row."""
        found = second("token-sets")
        if found is None:
            return MISSING
        alone = found["alone"]
        rows = [["none: the VQ prior", "-", f"{alone['bits']:.0f}", *["-"] * 6, _number(alone["fid"], 1), "1"]]
        for name, row in found["sets"].items():
            changed = [_number(row["changed"][str(level)], 3) for level in SNRS[:3]]
            measured = [_number(row["worth"]), _number(row["knn"], 3), *changed]
            saved = f"{alone['bits'] - row['left']:.0f}"
            ratio = _number(alone["fid"] / row["fid"] if "fid" in row else None)
            rows.append(
                [name, f"{row['spent']:.0f}", f"{row['left']:.0f}", saved, *measured, _number(row.get("fid"), 1), ratio]
            )
        levels = [f"changed at {level:.0f} dB" for level in SNRS[:3]]
        head = ["semantic tokens", "their bits", "bits of VQ tokens", "saved", "saved a bit spent", "20-NN", *levels]
        return table([*head, "FID", "FID(VQ prior) / FID"], rows)

    def commands(self) -> str:
        """Every step, its command and what it took."""
        rows = [
            [f"`{name}`", f"`{step['command']}`", step["commit"], f"{step['seconds']:.0f}"]
            for name, step in sorted(self.steps.items(), key=lambda item: item[1]["made"])
        ]
        return table(["step", "command", "commit", "seconds"], rows)

    def machine(self) -> str:
        """On what it ran."""
        found = {
            (s["hardware"]["processor"], s["hardware"]["threads"], ", ".join(s["hardware"]["gpus"]) or "no GPU")
            for s in self.steps.values()
        }
        return "; ".join(f"{processor}, {threads} threads, {gpus}" for processor, threads, gpus in sorted(found))


VOCABULARIES = {
    256: ("semantic-256", "prior-256", "ar-256"),
    1024: ("semantic-quarter", "prior-semantic-quarter", "ar"),
    4096: ("semantic-4096", "prior-4096", "ar-4096"),
}
BITS = {
    "K = 1,024": ("vq-prior-s0", "prior-s0", "ar", "vq-s0", "semantic-s0-ar"),
    "K = 256, priors of one block": ("prior-vq-quarter", "prior-256", "ar-256", "vq-quarter", "semantic-256"),
    "K = 1,024, priors of one block": (
        "prior-vq-quarter",
        "prior-semantic-quarter",
        "ar",
        "vq-quarter",
        "semantic-quarter",
    ),
    "K = 4,096, priors of one block": ("prior-vq-quarter", "prior-4096", "ar-4096", "vq-quarter", "semantic-4096"),
    "K = 1,024, with classes": ("prior-vq-cond", "prior-cond", "ar", "vq-cond", "cond-ar"),
    "K = 1,024 of the plain encoder, with classes": ("prior-vq-cond", "prior-plain", "ar-plain", "vq-cond", "plain"),
}
"""Sets of semantic tokens: the trainings of VQ prior, semantic prior and AR decoder, and the FIDs of both pipelines."""
_VQ, _DINO = paper.ADDITIVE[:2]  # figure 3a: the VQ baseline, and DINOv2's tokens
PAPER = {row.encoder: _VQ.fid / row.fid for row in paper.ENCODERS if row.encoder in ("MoCo", "iBOT")}
PAPER |= {"DINOv2": _VQ.fid / _DINO.fid}
"""FID(VQ prior) / FID(semantic prior + decoder) by encoder, ImageNet: the paper's figures 3a and 4a."""
MANY = {"vq-quarter": "VQ prior of 1 block", "semantic-quarter": "semantic prior of 1 block + AR decoder"}
SIMILARITIES = MANY | {
    "cond-quarter-ar": "the same with a class, the packaged model's settings",
    "cond-quarter-onepass": "the first study's packaged model: 1 block, a class, feed-forward decoder",
}
MISSING = "Not measured yet.\n"
ENCODERS = {
    "evaluate-stability": "semantic tokens",
    "evaluate-stability-plain": "semantic tokens of the plain encoder",
    "evaluate-stability-mae": "tokens of a masked autoencoder",
    "evaluate-stability-random": "tokens of a random encoder",
}
CEILINGS = {"evaluate-reconstruction": "", "evaluate-reconstruction-sharper": ", its decoder trained on"}
MEASURES = {
    "changed": "changed",
    "cosine_features": "cosine of features",
    "cosine_codes": "cosine of codes",
    "cosine_centred": "cosine of centred codes",
}
SHOWN = {
    "validation/neighbour_accuracy": "20-NN accuracy",
    "validation/psnr": "PSNR",
    "validation/codebook_use": "codebook use",
    "validation/perplexity": "perplexity",
    "validation/bigram_perplexity": "of bigrams",
    "validation/accuracy": "accuracy",
}


def second(name: str) -> Json | None:
    """A record of the second study; None where it was not made."""
    place = KEPT / "second" / f"{name}.json"
    return read_json(place) if place.exists() else None


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [list(head), ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Of the means over the seeds that both have, and of each seed."""
    pairs = list(zip(above, below, strict=False))
    text = f"{sum(a for a, _ in pairs) / sum(b for _, b in pairs):.2f}"
    return text if len(pairs) == 1 else f"{text} ({', '.join(f'{a / b:.2f}' for a, b in pairs)} seed by seed)"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def page(results: Results) -> str:
    """RESULTS.md."""
    notes = (HERE / "NOTES.md").read_text()
    return f"""# Results of the CIFAR-10 study

Made by `python experiments/cifar10/results.py` from the files in `results/`; do not edit it here. Machine:
{results.machine()}.

## Generation
FID against the 50,000 training images. Within a pair the priors have equal parameters and epochs, and sampling has the
same filters. The pipelines do not: the semantic one has a second network, its decoder, and so 2.13 times the parameters
and 2.4 times the training flops of the VQ prior (3.35 against 1.40 GFLOP an image times epochs; priors 4 epochs, AR
decoder 3). The seeds are those of the priors; encoder, VQGAN and decoders are the same in all of them.

{results.headline()}
## What it says

{notes}
## Ceilings
Real test images through the tokenizers and back; FID against the same images.

{results.ceilings()}
## Stability
2,000 test images. The paper's Table 1 (ImageNet) has, of VQ and semantic tokens, .187 and .114 changed at 30 dB, .487
and .260 at 20, .805 and .457 at 10, and cosines of .972 and .975, .910 and .940, .777 and .888.

{results.stability()}
## Sizes of priors
FID, and the perplexity of held-out tokens; data, epochs and decoders are the same in every row. Unconditional but for
two columns.

{results.sizes()}
## Numbers of images
FID falls with their number; it is why only figures of as many images are compared here.

{results.images()}
## Numbers of clusters
Unconditional, a prior of one block and the AR decoder of four, no filter, 5,000 images.

{results.vocabularies()}
## KID, precision and recall
5,000 images against 5,000 training images; KID over 100 subsets of 1,000, precision and recall over the nearest 3
neighbours.

{results.similarity()}
## Layers
Top-1 on 10 classes from the mean state of each layer of the prior with classes (asked without one).

{results.layers()}
## Settings of sampling
The model with classes and the AR decoder, 2,000 images a point: compare with each other only.

{results.settings()}
## Prefixes
The unconditional pair, 2,000 images a point. With all tokens given nothing is left to the prior: what remains is the
decoder's, or the VQGAN's.

{results.prefixes()}
## Discretisers
Ranked without training a prior or decoder,
by bits saved per bit spent; `docs/measuring-models.md` says how and what it means.

{results.discretisers()}
## Bits saved and the ratio
What an image's semantic tokens cost, what they save of its VQ tokens, and what the pair gains.

![FID ratio over bits saved a bit spent, with the paper's encoders as lines](../../docs/images/bits.png)

{results.saved()}
## Token sets
`token_sets.py`: codebooks over outputs of the packaged encoder, 64 VQ tokens an image; every training is of one epoch
(766 steps of 64, dropout .1, one seed). 20-NN accuracy of 2,000 test images among all training images; changed are
shares of the tokens of 2,000 test images; FID of 2,000 images without a class or filter, to be compared with each other
only.

{results.token_sets()}
## Equal training flops
`matched.py`: the packaged VQGAN's 64 VQ tokens an image, dropout .1, no filter, no class, 10,000 images a model; a seed
is one of the prior's, the decoder's and the sampling's. The rates are the best of three for each part (`../LOG.md`).
The larger VQ prior has the smaller one's rate. Seed 2, the larger VQ prior and the shuffled tokens ran on a faster AMD
EPYC than the rest.

{results.matched("matched-64")}
The same over the 256 VQ tokens of `vqgan-f2`, with one rate for all; minutes are left out, for other work ran beside.

{results.matched("matched-256")}
## The packaged feed-forward decoder
`feedforward.py`: 10,000 images of the packaged prior with all classes in turns and the model's default settings. FID
against the 50,000 training images; KID, precision and recall against the 10,000 test images.

{results.feedforward()}
## Fewer passes
`steps.py`: priors in raster order, in random order, masked, and a state-space model in raster order, of as many
parameters and training FLOPs; 1,000 images of all classes a point through the packaged feed-forward decoder, guidance 2
and top-p .95.

{results.passes()}
## What was trained

{results.parts()}
## Commands

{results.commands()}"""


def draw(results: Results, path: Path) -> None:
    """FID ratio over bits saved a bit spent, all sets of semantic tokens, and the paper's encoders as lines."""
    figure, (axes,) = panels(1, (6.4, 4.4))
    points = results.bits()
    marks = itertools.product("os^", COLORS)  # a colour that comes again has another shape
    for (name, spent, saved, ratio), (shape, color) in zip(points, marks, strict=False):
        axes.plot([saved / spent], [ratio], shape, color=color, markersize=7, label=name)
    for name, ratio in PAPER.items():
        axes.axhline(ratio, color="0.6", linewidth=1, linestyle="--", zorder=0)
        axes.annotate(f"paper, {name}", (1, ratio), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel="bits of VQ tokens saved a bit of semantic tokens", ylabel="FID(VQ prior) / FID(pair) ↑")
    axes.margins(x=0.12)
    legend([axes])
    write_file(path, lambda aside: figure.savefig(aside, dpi=150, format="png"))


def write(results: Results) -> None:
    """RESULTS.md, its figure, and the table between the marks of the README."""
    write_bytes(HERE / "RESULTS.md", page(results).encode())
    draw(results, HERE.parents[1] / "docs" / "images" / "bits.png")
    text = README.read_text()
    if all(mark in text for mark in MARKS):
        before, rest = text.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        write_bytes(README, f"{before}{MARKS[0]}\n{results.headline()}{MARKS[1]}{after}".encode())


def main() -> None:
    """Collect where asked, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, help="the folder of a study")
    options = parser.parse_args()
    if options.collect is not None:
        collect(options.collect)
    write(Results())


if __name__ == "__main__":
    main()
