import errno
import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.core.files import read_json, read_tensors
from digit.training import checkpoint, health
from digit.training.logs import Averages
from digit.training.loop import Interrupted, train
from digit.training.task import Batch, Loss, Step, Stream, TrainingConfig
from runs import curve, fell, lines, same


class Regression:
    """A network with dropout learns the sum of four numbers; a stand-in for components, in the real loop."""

    examples = 100
    score = ""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.modules = nn.ModuleDict({"net": self.net})
        self.description: Mapping[str, Any] = {"component": "regression", "model": {"width": width}}
        self.spoil_at = self.stop_at = -1
        self.steps: list[int] = []

    def parameters_by_optimizer(self) -> dict[str, list[dict[str, Any]]]:
        return {
            "model": [
                {"params": list(self.net[0].parameters())},
                {"params": list(self.net[3].parameters()), "lr_scale": 0.5},
            ]
        }

    def to_device(self, device: str) -> None:
        self.modules.to(device)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        for step in range(stream.start, stream.stop):
            x = torch.randn(stream.batch_size, 4, generator=torch.Generator().manual_seed(step))
            if step == self.spoil_at:
                x[3] = float("nan")
            yield {"x": x[stream.rows], "index": torch.arange(stream.batch_size)[stream.rows] + 100 * step}

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        error = self.modules["net"](batch["x"])[:, 0] - batch["x"].sum(1)
        yield Loss("model", error.square().mean(), {"bias": error.detach().mean()})

    def after_step(self, step: Step) -> None:
        self.steps.append(step.index)
        if step.index == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def validate(self) -> dict[str, float]:
        assert not self.net.training
        assert not torch.is_grad_enabled()
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(12345))
        return {"error": float((self.net(x)[:, 0] - x.sum(1)).square().mean())}

    def sample(self, step: Step) -> Image.Image | None:
        return Image.new("RGB", (4, 4), (round(255 * step.progress), 0, int(torch.randint(256, ()))))

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.net.state_dict(), folder / "net.pt")
        (folder / "provenance.json").write_text(json.dumps(provenance))


def config(**values: object) -> TrainingConfig:
    values = {"steps": 40, "batch_size": 16, "lr": 5e-2, "warmup_steps": 5, "log_every": 5, **values}
    return from_dict(TrainingConfig, {"validate_every": 10, "checkpoint_every": 10, **values}, "test")


def run(out: Path, task: Regression | None = None, resume: bool = False, **values: object) -> Regression:
    task = task or Regression()
    train(task, config(**values), out, resume=resume, device="cpu", show=False)
    return task


def exported(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model" / "net.pt", weights_only=True)


def weights(task: Regression) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in task.modules.parameters()])


def test_a_run_leaves_what_it_says(tmp_path: Path) -> None:
    task = run(tmp_path, sample_every=20, keep_checkpoints=2)
    assert task.steps == list(range(40))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000030", "step-0000040"]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step-0000020.png", "step-0000040.png"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["lr"] == 5e-2
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(5, 41, 5))
    assert set(logged[0]) == {"step", "loss", "bias", "gradient_norm", "lr"}
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    checks = [line for line in lines(tmp_path) if "validation/error" in line]
    assert [line["step"] for line in checks] == [10, 20, 30, 40]
    provenance = read_json(tmp_path / "model" / "provenance.json")
    assert (provenance["steps"], provenance["examples_seen"], provenance["component"]) == (40, 640, "regression")
    assert provenance["metrics"]["error"] == checks[-1]["validation/error"]
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_run_keeps_the_precision_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, steps in ((False, 10), (True, 20)):  # begun on one processor, continued on another
        monkeypatch.setattr(health, "bf16_is_fast", lambda _, fast=fast: fast)
        train(
            Regression(),
            config(precision="auto", steps=steps),
            tmp_path,
            resume=True,
            device="cpu",
            show=False,
            extend=True,
        )
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["precision"] == "no"


def test_samples_have_the_same_random_state_every_time(tmp_path: Path) -> None:
    run(tmp_path, sample_every=10)
    pictures = [Image.open(p) for p in sorted((tmp_path / "samples").iterdir())]
    assert len({picture.getpixel((0, 0))[2] for picture in pictures}) == 1


@pytest.mark.parametrize("stop", [0, 6, 9, 10, 33, 38])
def test_interrupted_and_resumed_is_the_same_run(tmp_path: Path, stop: int) -> None:
    settings = {"ema_decay": 0.9, "accumulation": 2, "clip_norm": 0.5, "sample_every": 7}
    whole = run(tmp_path / "whole", **settings)
    before = signal.getsignal(signal.SIGTERM)
    first = Regression()
    first.stop_at = stop
    with pytest.raises(Interrupted, match=rf"SIGTERM after step {stop + 1} of 40; the checkpoint is") as caught:
        run(tmp_path / "parts", first, **settings)
    assert caught.value.exit_code == 143
    last = checkpoint.latest(tmp_path / "parts")
    assert caught.value.checkpoint == last == checkpoint.path_of(tmp_path / "parts", stop + 1)
    assert signal.getsignal(signal.SIGTERM) is before
    second = run(tmp_path / "parts", resume=True, **settings)
    assert second.steps == list(range(stop + 1, 40))
    assert torch.equal(weights(second), weights(whole))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    ends = [checkpoint.load(checkpoint.path_of(tmp_path / name, 40)) for name in ("whole", "parts")]
    for file, tensors in ends[0].tensors.items():
        assert same(ends[1].tensors[file], tensors)
    assert same(*(exported(tmp_path / name) for name in ("whole", "parts")))


def test_a_killed_run_forgets_what_it_did_after_the_checkpoint(tmp_path: Path) -> None:
    """As after kill -9: lines beyond the checkpoint and a line cut in two are in the log, a checkpoint is half
    written."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", steps=20)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 25, "loss": 0.5}\n{"step": 30, "lo')
    (tmp_path / "parts" / "checkpoints" / ".step-0000030.12345678.tmp").mkdir()
    resumed = run(tmp_path / "parts", resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert [line["step"] for line in lines(tmp_path / "parts")] == [line["step"] for line in lines(tmp_path / "whole")]
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))


def test_resume_before_the_first_checkpoint_begins(tmp_path: Path) -> None:
    assert run(tmp_path, resume=True).steps == list(range(40))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    task = run(tmp_path / "run")
    before = lines(tmp_path / "run")
    (tmp_path / "run" / "model").rename(tmp_path / "gone")
    again = run(tmp_path / "run", resume=True)
    assert again.steps == []
    assert torch.equal(weights(again), weights(task))
    assert lines(tmp_path / "run") == before
    assert (tmp_path / "run" / "model" / "net.pt").is_file()


def test_the_exported_model_has_the_averaged_weights(tmp_path: Path) -> None:
    task = run(tmp_path, ema_decay=0.9)
    found = exported(tmp_path)
    average = read_tensors(tmp_path / "checkpoints" / "step-0000040" / "ema.safetensors")
    assert all(torch.equal(found[name], average[f"net.{name}"]) for name in found)
    assert not torch.equal(found["0.weight"], task.net[0].weight)


def test_accumulation_has_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    whole = run(tmp_path / "1", Regression(dropout=0.0), steps=20)
    parts = run(tmp_path / "2", Regression(dropout=0.0), steps=20, accumulation=2)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(whole), weights(Regression()))


class Overfit(Regression):
    """Its held-out error falls until step 30 and rises from there."""

    score = "error"

    def validate(self) -> dict[str, float]:
        return {"error": abs(len(self.steps) - 30) + 1.0 if self.steps else 99.0}


@pytest.mark.parametrize("stop", [-1, 33, 38])
def test_patience_ends_a_run_and_exports_the_best(tmp_path: Path, stop: int) -> None:
    """Interrupted or not: at steps 40 and 50 nothing is better than at 30."""
    settings = {"steps": 100, "patience": 2, "ema_decay": 0.9}
    task = Overfit()
    task.stop_at = stop
    if stop > 0:
        with pytest.raises(Interrupted):
            run(tmp_path, task, **settings)
        done, task = task.steps, Overfit()
        task.steps = list(done)
        run(tmp_path, task, resume=True, **settings)
    else:
        run(tmp_path, task, **settings)
    assert task.steps == list(range(50))
    assert read_json(tmp_path / "model" / "provenance.json")["steps"] == 30
    assert read_json(tmp_path / "model" / "provenance.json")["metrics"] == {"error": 1.0}
    run(tmp_path / "30", Overfit(), **{**settings, "steps": 30})
    assert same(exported(tmp_path), exported(tmp_path / "30"))
    again = run(tmp_path, Overfit(), resume=True, **settings)
    assert again.steps == []


def test_patience_needs_something_to_go_by(tmp_path: Path) -> None:
    with pytest.raises(DigitError, match=r"patience is for token models"):
        run(tmp_path, patience=2)
    with pytest.raises(DigitError, match=r"patience needs held-out images"):
        run(tmp_path, type("Blind", (Regression,), {"score": "nll"})(), patience=2)


def test_a_group_may_have_a_slower_rate(tmp_path: Path) -> None:
    before, after = Regression(), run(tmp_path, steps=1, warmup_steps=1, warmup_from=1e-2, weight_decay=0)
    moved = [(after.net[i].weight - before.net[i].weight).abs().max().item() for i in (0, 3)]
    assert moved == pytest.approx([1e-2, 5e-3], rel=1e-3)  # Adam's first step is the rate itself


def test_bf16_learns_with_float32_weights(tmp_path: Path) -> None:
    task = run(tmp_path, precision="bf16")
    assert task.net[0].weight.dtype == torch.float32
    assert fell(curve(tmp_path), over=1) < 0.5


class Duel(Regression):
    """Two optimizers in a step, as a GAN has them."""

    def __init__(self) -> None:
        super().__init__()
        self.modules["critic"] = nn.Linear(1, 1)
        self.biases: list[float] = []
        self.slopes: list[float] = []

    def parameters_by_optimizer(self) -> dict[str, list[dict[str, Any]]]:
        groups = {"model": [{"params": list(self.net.parameters())}]}
        return {**groups, "discriminator": [{"params": list(self.modules["critic"].parameters())}]}

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        made = self.modules["net"](batch["x"])
        yield Loss("model", 100 * self.modules["critic"](made).mean(), {})
        self.biases.append(self.net[3].bias.item())
        verdict = self.modules["critic"](made.detach())
        self.slopes.append(-verdict.sign().mean().item() / 2)
        yield Loss("discriminator", -verdict.abs().mean() / 2, {})


def test_a_second_loss_sees_moved_parameters_and_has_its_own_gradient_only(tmp_path: Path) -> None:
    task = Duel()
    before = [task.net[3].bias.item(), task.modules["critic"].bias.item()]
    run(tmp_path, task, steps=1, accumulation=2, warmup_steps=1, warmup_from=1e-2, clip_norm=0, weight_decay=0)
    after = [task.net[3].bias.item(), task.modules["critic"].bias.item()]
    assert task.biases == [after[0], after[0]] != [before[0], before[0]]
    logged = lines(tmp_path)[0]
    assert {"loss", "discriminator/loss", "gradient_norm", "discriminator/gradient_norm"} <= logged.keys()
    # the first loss left 100 at the critic's bias; its own loss has at most 1/2 there, and at most |x| / 2 at its
    # weight
    own = sum(task.slopes) / 2
    assert 0 < abs(own) <= 0.5
    assert abs(own) <= logged["discriminator/gradient_norm"] < 5
    # Adam's first step has the length of the rate, against the sign of the gradient
    assert after[1] - before[1] == pytest.approx(-1e-2 if own > 0 else 1e-2, rel=1e-3)


# -- what goes wrong


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, steps=10)
    with pytest.raises(DigitError, match=r"already holds a run \(the newest checkpoint is step-0000010\).*--resume"):
        run(tmp_path, steps=10)


def test_another_config_is_refused_by_field(tmp_path: Path) -> None:
    run(tmp_path, steps=10)
    with pytest.raises(DigitError, match=r"belongs to another run: training\.lr is 0\.5, was 0\.05"):
        run(tmp_path, resume=True, steps=20, lr=0.5)
    with pytest.raises(DigitError, match=r"model\.width is 16, was 8"):
        run(tmp_path, Regression(width=16), resume=True, steps=20)


def test_fewer_steps_than_were_done(tmp_path: Path) -> None:
    run(tmp_path, steps=10)
    with pytest.raises(DigitError, match="10 steps into a run that is now asked to take 5"):
        run(tmp_path, resume=True, steps=5)


def test_nan_stops_at_the_next_log_line_and_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    task = Regression()
    task.spoil_at = 17
    with pytest.raises(DigitError, match=r"loss became nan at step 17, on the images 1700, 1701.*step-0000010"):
        run(tmp_path, task)
    assert task.steps[-1] == 19
    last = checkpoint.latest(tmp_path)
    assert last.name == "step-0000010"
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(last).tensors["modules"].values())
    assert read_json(tmp_path / "diverged.json")["images"] == list(range(1700, 1716))
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 10, 15]


def test_what_went_wrong_is_neither_saved_nor_validated(tmp_path: Path) -> None:
    task = Regression()
    task.spoil_at = 17
    with pytest.raises(DigitError, match=r"loss became nan at step 17"):
        run(tmp_path, task, log_every=100, validate_every=100)
    assert task.steps[-1] == 19
    assert checkpoint.latest(tmp_path).name == "step-0000010"


def test_a_spike_stops_at_the_next_log_line(tmp_path: Path) -> None:
    """And so it does in a run that was resumed just before, for the losses so far are in the checkpoint."""

    class Jump(Regression):
        def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
            for loss in super().losses(batch, step):
                yield loss._replace(value=loss.value + (1000 if step.index == 33 else 0))

    for resume in (False, True):
        task = Jump()
        with pytest.raises(
            DigitError, match=r"jumped to .*max_spike=9 .*at step 33, on the images 3300, 3301.*step-0000030"
        ):
            run(tmp_path, task, resume=resume, max_spike=9)
        assert task.steps == list(range(30 if resume else 0, 35))
    kept = checkpoint.load(checkpoint.latest(tmp_path)).numbers["recent"]
    assert len(kept) == 30
    assert run(tmp_path, Jump(), resume=True, max_spike=0).steps == list(range(30, 40))


class Transfers(TorchDispatchMode):
    """The steps at which a value is read from the device (here all that ``.item()``, ``float`` and ``bool`` end in)."""

    def __init__(self, task: Regression) -> None:
        super().__init__()
        self.task, self.steps = task, set[int]()

    def note(self) -> None:
        self.steps.add(len(self.task.steps))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note()
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_two_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Regression()
    reading = Transfers(task)

    def counted(method: Any) -> Any:
        def read(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            reading.note()
            return method(tensor, *args, **more)

        return read

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    with reading:  # fused, as on a GPU: else AdamW reads its own step count, which lies on the CPU
        run(tmp_path, task, steps=20, log_every=5, validate_every=10, checkpoint_every=10, ema_decay=0.9,
            accumulation=2,
            max_spike=9, fused=True)  # fmt: skip
    assert reading.steps - {0} == {5, 10, 15, 20}


def test_an_infinite_gradient_stops_too(tmp_path: Path) -> None:
    class Root(Regression):
        def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
            value = self.net(batch["x"]).square().mean() * 0
            yield Loss("model", value.sqrt(), {})  # 0, with the slope of a root at 0

    with pytest.raises(DigitError, match=r"gradient became nan at step 0.*No checkpoint was saved"):
        run(tmp_path, Root())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    real = os.replace

    def replace(source: str, target: str) -> None:
        if "step-0000030" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    words = r"after step 30 was not written.*disk is full.*step-0000020; go on from it with --resume"
    with pytest.raises(DigitError, match=words):
        run(tmp_path / "parts")
    monkeypatch.undo()
    assert torch.equal(weights(run(tmp_path / "parts", resume=True)), weights(whole))


def test_tensors_of_another_shape_get_a_sentence(tmp_path: Path) -> None:
    run(tmp_path, steps=10)

    class Lying(Regression):
        def __init__(self) -> None:
            super().__init__(width=16)
            self.description = Regression().description

    with pytest.raises(DigitError, match="do not fit this model"):
        run(tmp_path, Lying(), resume=True, steps=20)


@pytest.mark.parametrize(
    ("device", "values", "words"),
    [
        ("cpu", {"precision": "fp16"}, "fp16' needs a CUDA device"),
        ("cuda:77", {}, "cannot be used here"),
        ("abacus", {}, "abacus"),
    ],
)
def test_devices_that_are_not_there(tmp_path: Path, device: str, values: dict[str, object], words: str) -> None:
    with pytest.raises(DigitError, match=words):
        train(Regression(), config(**values), tmp_path, device=device)


def test_averages_go_on_exactly_from_their_state() -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole, first = Averages(), Averages()
    for value in values:
        whole.add({"x": value})
    for value in values[:7]:
        first.add({"x": value})
    second = Averages(json.loads(json.dumps(first.state())))
    for value in values[7:]:
        second.add({"x": value})
    assert second.take() == whole.take()
    assert whole.take() == {}
