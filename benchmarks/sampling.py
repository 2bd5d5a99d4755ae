"""How fast are tokens sampled, against what else one could run, and against what the machine allows?

    python benchmarks/sampling.py                 small model, batch 1, 8 and 64 on a CPU; the paper's models on a CUDA
    GPU python benchmarks/sampling.py --quick         a minute: a toy model, to see that it works
    python benchmarks/sampling.py --batches 8 --out 8.json --with 1.json --plot speed.svg       in pieces, put together
    at the end

Side by side in one process, on the same weights where the code is ours: the engine in its variants, the cached but
    uncompiled loop, the
same model without a cache, and Hugging Face ``generate`` on a GPT-2 of the same shape. Contenders take turns round
after round, so that a busy machine is busy for all of them; speed-ups are medians of the ratios within a round.
Compiling is done before and reported apart. At batch 64 and above there is one round, without the slower variants. The
last line printed is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from digit.core.config import from_dict
from digit.core.environment import hardware
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.sampling import SampleRequest, SamplingParams, sample
from digit.sampling.batching import DECODED_AT_ONCE, allocated, peak, reset_peak
from digit.sampling.engines.acceleration import accelerate, compile_seconds, engine_name, release

AUTHORS = 0.81  # seconds an image of the authors' loop at batch 8, on two quiet cores of this kind
SIZES = {
    "quick": {"dim": 128, "depth": 2, "length": 32, "vocab": 128},
    "small": {"dim": 512, "depth": 8, "length": 256, "vocab": 1024},
}
LARGE = 64  # from this batch on, one round
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def small_model(size: str) -> TokenModel:
    s = SIZES[size]
    torch.manual_seed(0)
    values = {
        "role": "prior",
        "vocab_size": s["vocab"],
        "length": s["length"],
        "transformer": {"dim": s["dim"], "depth": s["depth"], "heads": 8},
    }
    return TokenModel(from_dict(TokenModelConfig, values, "benchmark")).eval().requires_grad_(False)


@dataclass
class Contender:
    """One way to sample a batch: ``run(images)`` returns when the tokens are there."""

    name: str
    run: Callable[[int], object]
    bytes_a_weight: float
    kind: str
    prepare: Callable[[int], object]
    compiled: Callable[[], float] = lambda: 0.0
    free: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    memory: int = 0
    compile_seconds: float = 0.0


def ours(name: str, model: TokenModel, settings: SamplingParams, dtype: str, device: str, **speed) -> Contender:
    mine = copy.deepcopy(model).to(device=device, dtype=DTYPES[dtype])
    accelerate(mine, **speed)

    def run(batch: int) -> None:
        sample(mine, range(batch), 0, settings)
        wait(device)

    def prepare(batch: int) -> None:
        run(batch)
        print(f"  {name}: the {engine_name(mine)} step", flush=True)

    width = 1 if speed.get("quantize") else torch.finfo(DTYPES[dtype]).bits // 8
    return Contender(name, run, width, dtype, prepare, lambda: compile_seconds(mine), lambda: release(mine))


def without_cache(model: TokenModel, device: str) -> Contender:
    """Whole forward passes. Timed at some lengths and summed by the trapezoidal rule: in full it would take many
    minutes.
    """
    mine, length = copy.deepcopy(model).to(device), model.config.length

    @torch.inference_mode()
    def run(batch: int) -> float:
        pieces = 8 if batch < LARGE else 4
        places = sorted({round(i * (length - 1) / pieces) for i in range(pieces + 1)})
        took = []
        for n in places:
            tokens = torch.zeros(batch, n, dtype=torch.long, device=device)
            began = time.perf_counter()
            mine(tokens)
            wait(device)
            took.append(time.perf_counter() - began)
        pairs = zip(zip(places, took, strict=True), list(zip(places, took, strict=True))[1:], strict=False)
        return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairs)

    return Contender("without a cache", run, 4, "fp32", lambda _: run(1))


def hugging_face(size: str, top_k: int, dtype: str, device: str) -> Contender:
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    s = SIZES[size]
    config = GPT2Config(
        vocab_size=s["vocab"] + 1, n_positions=s["length"] + 1, n_embd=s["dim"], n_layer=s["depth"], n_head=8,
        bos_token_id=s["vocab"], eos_token_id=None, pad_token_id=s["vocab"],
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval().to(device=device, dtype=DTYPES[dtype])

    @torch.inference_mode()
    def run(batch: int) -> None:
        start = torch.full((batch, 1), s["vocab"], device=device)
        out = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=top_k,
            max_new_tokens=s["length"], min_new_tokens=s["length"],
        )  # fmt: skip
        assert out.shape[1] == s["length"] + 1
        wait(device)

    return Contender(f"HF generate {dtype}", run, torch.finfo(DTYPES[dtype]).bits // 8, dtype, lambda _: run(1))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, float]:
    """What the machine gives now: bytes/s of reading and of copying, and flops/s of square matrix products."""
    numbers = torch.ones(1 << 26, device=device)  # 256 MB, beyond any cache
    into = torch.empty_like(numbers)

    def best(work: Callable[[], object], count: int) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            wait(device)
            times.append(time.perf_counter() - began)
        return min(times)

    read = 4 * len(numbers) / best(numbers.sum, 6)
    copied = 8 * len(numbers) / best(lambda: into.copy_(numbers), 6)
    found = {"read": read, "copy": copied, "bandwidth": max(read, copied)}
    side = 4096 if device == "cuda" else 1024
    for name, dtype in DTYPES.items():
        if device == "cpu" and name == "fp16":
            continue
        a = torch.randn(side, side, device=device, dtype=dtype)
        found[f"flops_{name}"] = 2 * side**3 / best(lambda a=a: a @ a, 8)
    return found


def step_weights(model: TokenModel) -> int:
    """Weights that one step reads: the matrices of all blocks and the head; of the tables a few rows."""
    return sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)


class Others:
    """How much of the processors other programs use."""

    def __init__(self) -> None:
        self.system, self.own = self._now()

    def _now(self) -> tuple[float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        return sum(times) - times.idle - times.iowait, own.user + own.system

    def share(self, seconds: float) -> float:
        """Of all cores, since the object was made."""
        system, own = self._now()
        return max(0.0, (system - self.system) - (own - self.own)) / (seconds * psutil.cpu_count())


def wait_for_quiet(longest: float) -> None:
    """Wait until other programs use less than a twentieth of the processors for three seconds, but not for ever."""
    end = time.monotonic() + longest
    while time.monotonic() < end:
        others = Others()
        time.sleep(3)
        if others.share(3) < 0.05:
            return


def measure(
    contenders: list[Contender], batch: int, rounds: int, device: str, patience: float
) -> list[dict[str, float]]:
    """Let the contenders take turns; the machine's own speed and what others took of it, round by round."""
    where = torch.device(device)
    for c in contenders:
        c.seconds.clear()
        c.cpu_seconds.clear()
        before = allocated(where)
        reset_peak(where)
        c.prepare(batch)
        c.compile_seconds = c.compiled()
        c.memory = peak(where) - before  # with what compiling took
        print(f"  ready: {c.name}, {c.compile_seconds:.0f} s of compiling", flush=True)
    speeds = []
    for _ in range(rounds):
        wait_for_quiet(patience)
        speeds.append(machine(device))
        others, started = Others(), time.perf_counter()
        for c in contenders:
            before = allocated(where)
            reset_peak(where)
            began, spent = time.perf_counter(), time.process_time()
            told = c.run(batch)
            elapsed, spent = time.perf_counter() - began, time.process_time() - spent
            seconds = told if isinstance(told, float) else elapsed
            c.seconds.append(seconds)
            c.cpu_seconds.append(spent * seconds / elapsed)
            c.memory = max(c.memory, peak(where) - before)
        speeds[-1]["others"] = others.share(time.perf_counter() - started)
    for c in contenders:
        c.free()
    return speeds


def rows(contenders: list[Contender], speeds: list[dict[str, float]], model: TokenModel, batch: int) -> list[dict]:
    length, weights = model.config.length, step_weights(model)
    shape = model.config.transformer
    reference = next((c for c in contenders if c.name == "HF generate fp32"), None)
    out = []
    for c in contenders:
        cache = 2 * shape.depth * shape.dim * batch * (length / 2) * torch.finfo(DTYPES[c.kind]).bits / 8
        moved = weights * c.bytes_a_weight + (0 if c.name == "without a cache" else cache)
        took = [s / length for s in c.seconds]  # a step
        bound = [weights * c.bytes_a_weight / v["bandwidth"] / t for v, t in zip(speeds, took, strict=True)]
        traffic = [moved / t / v["bandwidth"] for v, t in zip(speeds, took, strict=True)]
        flops = [2 * weights * batch / t / v[f"flops_{c.kind}"] for v, t in zip(speeds, took, strict=True)]
        ratio = [a / b for a, b in zip(reference.seconds, c.seconds, strict=True)] if reference else [float("nan")]
        out.append({
            "batch": batch,
            "contender": c.name,
            "seconds_per_image": statistics.median(c.seconds) / batch,
            "best_seconds_per_image": min(c.seconds) / batch,
            "cpu_seconds_per_image": statistics.median(c.cpu_seconds) / batch,
            "images_per_second": batch / statistics.median(c.seconds),
            "tokens_per_second": batch * length / statistics.median(c.seconds),
            "milliseconds_per_step": 1e3 * statistics.median(took),
            "times_hf_generate": statistics.median(ratio),
            "times_authors_loop": AUTHORS * batch / statistics.median(c.seconds) if (batch, length) == (8,
                256) else None,
            "weight_bandwidth_share": statistics.median(bound),
            "bandwidth_share": statistics.median(traffic),
            "matmul_share": statistics.median(flops),
            "megabytes_per_step": moved / 1e6,
            "peak_megabytes": c.memory / 1e6,
            "compile_seconds": c.compile_seconds,
        })  # fmt: skip
    return out


def show(table: list[dict]) -> None:
    heads = ("batch", "contender", "s/image", "images/s", "tokens/s", "ms/step", "x HF", "x authors", "MB/step",
        "of weight bound",
             "of bandwidth", "of matmul", "peak MB", "compile s")  # fmt: skip
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for r in table:
        print(
            f"| {r['batch']} | {r['contender']} | {r['seconds_per_image']:.3f} | {r['images_per_second']:.2f} | "
            f"{r['tokens_per_second']:,.0f} | {r['milliseconds_per_step']:.2f} | {r['times_hf_generate']:.2f} | "
            f"{'' if r['times_authors_loop'] is None else format(r['times_authors_loop'], '.2f')} | "
            f"{r['megabytes_per_step']:.0f} | {r['weight_bandwidth_share']:.0%} | {r['bandwidth_share']:.0%} | "
            f"{r['matmul_share']:.0%} | {r['peak_megabytes']:,.0f} | {r['compile_seconds']:.0f} |"
        )


def cpu(
    size: str, batches: list[int], rounds: int, only: list[str] | None, patience: float, earlier: list[dict]
) -> dict:
    model, top_k = small_model(size), 200 if size == "small" else 20
    s = SamplingParams(top_k=top_k)
    makers = {
        "C++ int8": lambda: ours("C++ int8", model, s, "bf16", "cpu", quantize="int8"),
        "C++ bf16": lambda: ours("C++ bf16", model, s, "bf16", "cpu"),
        "C++ fp32": lambda: ours("C++ fp32", model, s, "fp32", "cpu"),
        "compiled int8": lambda: ours(
            "compiled int8", model, s, "fp32", "cpu", compile=True, quantize="int8", native=False
        ),
        "compiled bf16": lambda: ours("compiled bf16", model, s, "bf16", "cpu", compile=True, native=False),
        "compiled fp32": lambda: ours("compiled fp32", model, s, "fp32", "cpu", compile=True, native=False),
        "plain bf16": lambda: ours("plain bf16", model, s, "bf16", "cpu", native=False),
        "plain fp32": lambda: ours("plain fp32", model, s, "fp32", "cpu", native=False),
        "without a cache": lambda: without_cache(model, "cpu"),
        "HF generate fp32": lambda: hugging_face(size, top_k, "fp32", "cpu"),
    }
    slow = {"compiled int8", "compiled fp32", "plain bf16"}
    table, speeds = [r for e in earlier for r in e["rows"]], [m for e in earlier for m in e["rounds"]]
    for batch in batches:
        wanted = only or [name for name in makers if batch < LARGE or name not in slow]
        contenders = [make() for name, make in makers.items() if name in wanted]
        print(f"batch {batch}", flush=True)
        speeds += (now := measure(contenders, batch, rounds if batch < LARGE else 1, "cpu", patience))
        table += rows(contenders, now, model, batch)
    show(table)
    found = {name: statistics.median(v[name] for v in speeds) for name in speeds[0]}
    print(
        f"\nread {found['read'] / 1e9:.1f} GB/s, copy {found['copy'] / 1e9:.1f} GB/s (read + write), matmul "
        f"{found['flops_fp32'] / 1e9:.0f} GFLOP/s fp32, {found['flops_bf16'] / 1e9:.0f} bf16, "
        f"{torch.get_num_threads()} threads; other programs took {found['others']:.0%} of the processors"
    )
    return {"size": size, "weights": step_weights(model), "machine": found, "rounds": speeds, "rows": table}


def paper_pipeline(name: str, guided: bool, device: str = "cuda", smaller: dict | None = None):
    """The paper's model with AR decoder and VQGAN at 256 px, random weights, bfloat16.

    ``smaller`` are changes to the prior and the decoder, and make the VQGAN narrow: to see that the benchmark works.
    """
    from digit.core.config import load_preset
    from digit.models.vqgan import VQGAN, VQGANConfig
    from digit.pipeline.pipeline import DigitPipeline

    def part(preset: str, **changes) -> TokenModel:
        values = {**load_preset(preset)["model"], **changes, **(smaller or {})}
        return TokenModel(from_dict(TokenModelConfig, values, preset)).eval().requires_grad_(False)

    pipe = DigitPipeline(
        prior=part(f"imagenet256-{name}-cond", class_dropout=0.1) if guided else part(f"imagenet256-{name}"),
        decoders={"ar": part(f"imagenet256-{name}-ar")},
        vqgan=VQGAN(VQGANConfig(channels=32) if smaller else VQGANConfig()).eval().requires_grad_(False).bfloat16(),
        settings={
            "prior": SamplingParams(top_k=200, cfg_scale=2.0 if guided else 1.0),
            "ar": SamplingParams(top_p=0.8),
        },
    )
    return pipe.to(device, torch.bfloat16)


def chain(pipe, batch: int, rounds: int, compile: bool, bandwidth: float) -> dict:
    """Images a second from labels to pixels, and the time of an average step against reading the weights once."""
    models = [pipe.prior, *pipe.decoders.values()]
    reset_peak(pipe.device)
    for m in models:
        accelerate(m, compile=compile)
    labels = torch.zeros(batch, dtype=torch.long) if pipe.num_classes else None
    times = []
    for index in range(rounds + 1):
        began = time.perf_counter()
        tokens = pipe.sample_tokens(SampleRequest(range(batch), labels=labels))
        wait(pipe.device.type)
        sampled = time.perf_counter() - began
        for rows in torch.arange(batch).split(DECODED_AT_ONCE):  # as in digit generate
            pipe.to_pixels(tokens.take(rows))
        wait(pipe.device.type)
        if index:  # the first compiles and records
            times.append((time.perf_counter() - began, sampled))
    whole = statistics.median(t for t, _ in times)
    steps = sum(m.config.length for m in models)
    step = statistics.median(s for _, s in times) / steps
    moved = sum(2 * step_weights(m) * m.config.length for m in models) / steps
    result = {
        "batch": batch,
        "compiled": compile,
        "images_per_second": batch / whole,
        "milliseconds_per_step": 1e3 * step,
        "weight_bandwidth_share": moved / step / bandwidth,
        "peak_megabytes": peak(pipe.device) / 1e6,
        "compile_seconds": sum(compile_seconds(m) for m in models),
    }
    for m in models:
        release(m)
    return result


def gpu(names: list[str], batches: list[int], rounds: int) -> dict:
    table, speed = [], machine("cuda")
    for name in names:
        for guided in (False, True):
            pipe = paper_pipeline(name, guided)
            for batch in batches:
                for compile in (True, False):
                    found = chain(pipe, batch, rounds, compile, speed["bandwidth"])
                    table.append({"model": name, "guided": guided, **found})
                    print(json.dumps(table[-1]), flush=True)
    return {"device": torch.cuda.get_device_name(), "machine": speed, "rows": table}


def plot(table: list[dict], path: Path) -> None:
    """Images a second against the batch size, one line a contender, named at its right end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"C++": "#0b6e4f", "compiled": "#2f6db5", "plain": "#8a8a8a", "without": "#c98a00", "HF": "#c0392b"}
    styles = {"int8": "-", "bf16": "--", "fp32": ":"}
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    batches = sorted({r["batch"] for r in table})
    ends, behind = [], {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for name in dict.fromkeys(r["contender"] for r in table):
        points = sorted((batches.index(r["batch"]), r["images_per_second"]) for r in table if r["contender"] == name)
        colour, style = colours[name.split()[0]], styles.get(name.split()[-1], "-")
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=colour)
        ends.append([*points[-1], name, colour])
    for column in {e[0] for e in ends}:  # labels at least 9% apart
        last = 0.0
        for place, height, name, colour in sorted(e for e in ends if e[0] == column):
            last = max(height, last * 1.22)
            axes.annotate(
                name,
                (place, last),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
                bbox=behind,
            )
    axes.set(yscale="log", xlabel="batch size", ylabel="images a second", xlim=(-0.2, len(batches) - 0.3))
    axes.set_xticks(range(len(batches)), [str(b) for b in batches])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batches", type=int, nargs="*", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds to wait before each round for a quiet machine"
    )
    parser.add_argument("--only", nargs="+", help="names of contenders, such as 'compiled fp32'")
    parser.add_argument(
        "--with", dest="earlier", type=Path, nargs="+", default=[], help="JSON of other batch sizes, measured before"
    )
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (.svg, .png)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result: dict = {
        "benchmark": "sampling",
        "torch": torch.__version__,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }
    batches = [1, 4] if args.quick else [1, 8, 64]
    result["small"] = cpu(
        "quick" if args.quick else "small", batches if args.batches is None else args.batches,
        2 if args.quick else args.rounds,
        args.only, args.patience, [json.loads(path.read_text())["small"] for path in args.earlier],
    )  # fmt: skip
    if torch.cuda.is_available() and not args.quick:
        result["gpu"] = gpu(["base", "large"], [1, 16, 64, 256], 3)
    if args.plot:
        plot(result["small"]["rows"], args.plot)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
