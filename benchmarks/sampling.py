"""How fast are tokens sampled on a CPU, beside what else one could run, and beside what the machine allows?

    python benchmarks/sampling.py                      all shapes and contenders, five rounds: an hour
    python benchmarks/sampling.py --isa avx2           the same with the instructions of a processor that has AVX2 alone
    python benchmarks/sampling.py --shapes paper --batches 1 --only "C++ int8" "CTranslate2 int8"
    python benchmarks/sampling.py --busy 1             with the times beside one other busy process
    python benchmarks/sampling.py --quick              a minute: a toy model, to see that it works

One process, the same threads for all. Contenders take turns round after round, so that a busy machine is busy for all
of them; ratios are medians of the ratios within a round. Peers are a GPT-2 of the same shape with random weights:
Hugging Face ``generate`` (plain, and with a static cache as it is and compiled) and CTranslate2 (``pip install
ctranslate2``) in each format that it has for this processor. All draw with the same top-k. Peers have no guidance and
no random numbers for each image; nothing is subtracted for what ours do besides.

The last line printed is JSON; ``--out`` writes it to a file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from digit.core.config import from_dict
from digit.core.environment import hardware
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.sampling import SamplingParams, sample
from digit.sampling.engines.acceleration import accelerate, compile_seconds, engine_name, release

ISA = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "CT2_FORCE_CPU_ISA": "AVX2",
        "DIGIT_NATIVE_MARCH": "x86-64-v3",
    }
}
"""Variables that hold each library to a processor's instructions; read when it is loaded."""
SHAPES = {
    "toy": {"dim": 128, "depth": 2, "heads": 4, "length": 32, "vocab": 128},
    "packaged": {"dim": 128, "depth": 1, "heads": 4, "length": 64, "vocab": 1024},  # the prior of the packaged model
    "paper": {"dim": 512, "depth": 8, "heads": 8, "length": 256, "vocab": 1024},
}
TOP_K = {128: 20, 1024: 200}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORTEST = 0.5
"""Seconds of a measurement."""
LONGEST = 120.0
"""Seconds of a run beyond which a contender is left out of larger batches."""


@dataclass
class Contender:
    """One way to sample a batch.

    Attributes:
        run: returns when the tokens of so many images are there.
        seconds, busy: of its runs, alone and beside other busy processes.
    """

    name: str
    bytes_a_weight: float
    run: Callable[[int], object]
    setup: Callable[[], float] = lambda: 0.0
    free: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    @property
    def family(self) -> str:
        """Whose it is."""
        return next(name for name in ("C++", "HF", "CTranslate2", "") if self.name.startswith(name))


def our_model(shape: dict[str, int]) -> TokenModel:
    """A prior with random weights."""
    torch.manual_seed(0)
    values = {
        "role": "prior",
        "vocab_size": shape["vocab"],
        "length": shape["length"],
        "transformer": {name: shape[name] for name in ("dim", "depth", "heads")},
    }
    return TokenModel(from_dict(TokenModelConfig, values, "benchmark")).eval().requires_grad_(False)


def ours(name: str, shape: dict[str, int], dtype: str, **how: object) -> Contender:
    """Our sampling with an engine."""
    model = our_model(shape).to(DTYPES[dtype])
    accelerate(model, **how)
    params = SamplingParams(top_k=TOP_K[shape["vocab"]])

    def run(batch: int) -> None:
        sample(model, range(batch), 0, params)
        if not name.startswith(engine_name(model)):
            sys.exit(f"{name} was asked for, and the {engine_name(model)} step ran.")

    width = 1 if "quantize" in how else DTYPES[dtype].itemsize
    return Contender(name, width, run, lambda: compile_seconds(model), lambda: release(model))


def gpt2(shape: dict[str, int]):
    """Hugging Face's model of this shape."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape["vocab"] + 1, n_positions=shape["length"] + 1, n_embd=shape["dim"], n_layer=shape["depth"],
        n_head=shape["heads"], bos_token_id=shape["vocab"], eos_token_id=None, pad_token_id=shape["vocab"],
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def hugging_face(name: str, shape: dict[str, int], dtype: str, cache: str = "", compiled: bool = False) -> Contender:
    """``generate`` of Hugging Face."""
    model = gpt2(shape).to(DTYPES[dtype])
    if compiled:
        model.forward = torch.compile(model.forward)
    more = {"cache_implementation": cache} if cache else {}

    @torch.inference_mode()
    def run(batch: int) -> None:
        start = torch.full((batch, 1), shape["vocab"])
        out = model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=TOP_K[shape["vocab"]],
            max_new_tokens=shape["length"], min_new_tokens=shape["length"], **more,
        )  # fmt: skip
        assert out.shape[1] == shape["length"] + 1

    return Contender(name, DTYPES[dtype].itemsize, run)


def ctranslate2(name: str, shape: dict[str, int], format: str) -> Contender:
    """CTranslate2's generator, converted from Hugging Face's model of this shape."""
    from ctranslate2 import Generator
    from ctranslate2.converters.transformers import GPT2Loader
    from ctranslate2.specs import TransformerDecoderModelSpec

    words = [*(str(i) for i in range(shape["vocab"])), "<s>"]

    class Words:
        bos_token = eos_token = unk_token = "<s>"

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {word: number for number, word in enumerate(words)}

    spec: TransformerDecoderModelSpec = GPT2Loader()(gpt2(shape), Words())
    with tempfile.TemporaryDirectory() as folder:
        spec.validate()
        spec.optimize(quantization=None)
        spec.save(folder)
        threads = torch.get_num_threads()
        generator = Generator(folder, device="cpu", compute_type=format, intra_threads=threads, inter_threads=1)

    def run(batch: int) -> None:
        out = generator.generate_batch(
            [["<s>"]] * batch, max_length=shape["length"], min_length=shape["length"], end_token=[],
            sampling_topk=TOP_K[shape["vocab"]], include_prompt_in_result=False,
        )  # fmt: skip
        assert all(len(one.sequences_ids[0]) == shape["length"] for one in out)

    return Contender(name, {"int8": 1, "int16": 2, "bfloat16": 2}.get(format.split("_")[0], 4), run)


def contenders(shape: dict[str, int]) -> dict[str, Callable[[str], Contender]]:
    """What there is to run, by name."""
    every: dict[str, Callable[[str], Contender]] = {
        "C++ int8": lambda name: ours(name, shape, "bf16", quantize="int8", native=True),
        "C++ bf16": lambda name: ours(name, shape, "bf16", native=True),
        "C++ fp32": lambda name: ours(name, shape, "fp32", native=True),
        "compiled bf16": lambda name: ours(name, shape, "bf16", native=False, compile=True),
        "compiled fp32": lambda name: ours(name, shape, "fp32", native=False, compile=True),
        "plain bf16": lambda name: ours(name, shape, "bf16", native=False),
        "plain fp32": lambda name: ours(name, shape, "fp32", native=False),
    }
    for dtype in DTYPES:
        every[f"HF generate {dtype}"] = lambda name, dtype=dtype: hugging_face(name, shape, dtype)
        every[f"HF static cache {dtype}"] = lambda name, dtype=dtype: hugging_face(name, shape, dtype, "static")
        every[f"HF compiled {dtype}"] = lambda name, dtype=dtype: hugging_face(name, shape, dtype, "static", True)
    try:
        from ctranslate2 import get_supported_compute_types
    except ImportError:
        print("CTranslate2 is not installed, so it is left out: pip install ctranslate2")
    else:
        for format in sorted(get_supported_compute_types("cpu") - {"int8"}):  # int8 means int8_float32 on a CPU
            every[f"CTranslate2 {format}"] = lambda name, format=format: ctranslate2(name, shape, format)
    return every


def machine() -> dict[str, float]:
    """What the machine gives now: bytes/s of reading, and flops/s of square matrix products."""
    numbers = torch.ones(1 << 26)  # 256 MB, beyond most caches

    def best(work: Callable[[], object], count: int) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    found = {"read": 4 * len(numbers) / best(numbers.sum, 6)}
    for name, dtype in DTYPES.items():
        a = torch.randn(512, 512, dtype=dtype)
        found[f"flops_{name}"] = 2 * 512**3 / best(functools.partial(torch.mm, a, a), 4)
    return found


def step_weights(model: TokenModel) -> int:
    """Weights that one step reads: the matrices of all blocks and the head; of the tables a few rows."""
    return sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)


class Others:
    """How much of the processors other programs use."""

    def __init__(self) -> None:
        self.began, self.system, self.own = time.perf_counter(), *self._now()

    def _now(self) -> tuple[float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        return sum(times) - times.idle - times.iowait, own.user + own.system

    def share(self) -> float:
        """Of all cores, since the object was made."""
        system, own = self._now()
        elapsed = time.perf_counter() - self.began
        return max(0.0, (system - self.system) - (own - self.own)) / (elapsed * psutil.cpu_count())


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other processes that compute without a pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def timed(contender: Contender, batch: int) -> float:
    """Seconds of a run; the mean of as many as take half a second, for the system gives cores away for milliseconds."""
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() - began < SHORTEST:
        contender.run(batch)
        count += 1
    return (time.perf_counter() - began) / count


def measure(entrants: list[Contender], batch: int, rounds: int, others: int) -> list[dict[str, float]]:
    """Let the contenders take turns; the machine's own speed and what others took of it, round by round."""
    for c in entrants:
        c.seconds.clear()
        c.busy.clear()
        c.run(batch)  # builds, compiles and chooses
        print(f"  ready: {c.name}", flush=True)
    found = []
    for _ in range(rounds):
        found.append(machine())
        meter = Others()
        for c in entrants:
            c.seconds.append(timed(c, batch))
        found[-1]["others"] = meter.share()
    if others:  # a block of its own: what begins or ends beside a run must not count for the next one
        with busy(others):
            for c in entrants * rounds:
                c.busy.append(timed(c, batch))
    return found


def rows(entrants: list[Contender], speeds: list[dict[str, float]], shape: str, batch: int) -> list[dict]:
    """The results of a shape and batch size."""
    length, weights = SHAPES[shape]["length"], step_weights(our_model(SHAPES[shape]))
    best = {}
    for family in ("HF", "CTranslate2"):
        its = [c for c in entrants if c.family == family]
        best[family] = min(its, key=lambda c: statistics.median(c.seconds)) if its else None
    out = []
    for c in entrants:
        row = {
            "shape": shape,
            "batch": batch,
            "contender": c.name,
            "seconds_per_image": statistics.median(c.seconds) / batch,
            "milliseconds_per_step": 1e3 * statistics.median(c.seconds) / length,
            "weight_bandwidth_share": statistics.median(
                weights * c.bytes_a_weight * length / v["read"] / t for v, t in zip(speeds, c.seconds, strict=True)
            ),
            "setup_seconds": c.setup(),
            "seconds": c.seconds,
        }
        for family, peer in best.items():
            if peer is not None:
                row[f"times_{family}"] = statistics.median(a / b for a, b in zip(peer.seconds, c.seconds, strict=True))
        if c.busy:
            row["busy_ratio"] = statistics.median(c.busy) / statistics.median(c.seconds)
        out.append(row)
    return out


def show(table: list[dict]) -> None:
    """Print it for people."""
    heads = ["shape", "batch", "contender", "s/image", "images/s", "ms/step", "x best HF", "x best CTranslate2",
             "of reading the weights", "beside busy ones"]  # fmt: skip
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    for r in table:
        ratios = (format(r[name], ".2f") if name in r else "" for name in ("times_HF", "times_CTranslate2"))
        beside = f"{r['busy_ratio']:.2f} x" if "busy_ratio" in r else ""
        print(
            f"| {r['shape']} | {r['batch']} | {r['contender']} | {r['seconds_per_image']:.4f} | "
            f"{1 / r['seconds_per_image']:.2f} | {r['milliseconds_per_step']:.3f} | {' | '.join(ratios)} | "
            f"{r['weight_bandwidth_share']:.0%} | {beside} |"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["packaged", "paper"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", choices=list(ISA), help="instructions that every library is held to")
    parser.add_argument("--busy", type=int, default=0, help="other busy processes, beside which all run again")
    parser.add_argument("--only", nargs="+", help="names of contenders, such as 'compiled fp32'")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.isa and any(os.environ.get(name) != value for name, value in ISA[args.isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ISA[args.isa]})
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.shapes, args.batches, args.rounds = ["toy"], [1, 4], 2
    table: list[dict] = []
    speeds: list[dict[str, float]] = []
    for shape in args.shapes:
        slow: set[str] = set()
        for batch in args.batches:
            makers = contenders(SHAPES[shape])
            if unknown := set(args.only or ()) - set(makers):
                parser.error(f"no contender is called {', '.join(sorted(unknown))}; there are: {', '.join(makers)}")
            wanted = [name for name in args.only or makers if name not in slow]
            print(f"{shape}, batch {batch}", flush=True)
            entrants = [makers[name](name) for name in wanted]
            speeds += (now := measure(entrants, batch, args.rounds, args.busy))
            table += (new := rows(entrants, now, shape, batch))
            show(new)  # what takes an hour may end early
            slow |= {c.name for c in entrants if statistics.median(c.seconds) > LONGEST / 8}
            for c in entrants:
                c.free()
    found = {name: statistics.median(v[name] for v in speeds) for name in speeds[0]}
    instructions = args.isa or torch.backends.cpu.get_cpu_capability()
    print(
        f"\n{hardware()['processor']}, {instructions}, {torch.get_num_threads()} threads; reads "
        f"{found['read'] / 1e9:.1f} GB/s, {found['flops_fp32'] / 1e9:.0f} GFLOP/s fp32, "
        f"{found['flops_bf16'] / 1e9:.0f} bf16; other programs took {found['others']:.0%} of the processors"
    )
    result = {
        "benchmark": "sampling",
        "torch": torch.__version__,
        "hardware": hardware(),
        "instructions": instructions,
        "machine": found,
        "busy": args.busy,
        "rows": table,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
