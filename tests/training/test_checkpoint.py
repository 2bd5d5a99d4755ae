import errno
import os
from pathlib import Path

import pytest
import torch

from digit.core.errors import DigitError
from digit.core.files import read_json, write_json
from digit.training import checkpoint
from digit.training.checkpoint import Checkpoint

RUN = {
    "component": "prior",
    "model": {"dim": 8},
    "training": {"lr": 0.1, "log_every": 5, "steps": 9, "schedule": "constant"},
}


def example(step: int) -> Checkpoint:
    tensors = {
        "modules": {"w": torch.arange(6.0).view(2, 3) + step},
        "optimizers": {"model/w/step": torch.tensor(float(step))},
    }
    return Checkpoint(step, tensors, RUN, {"averages": {"loss": [0.1 + 0.2, 3]}})


def test_round_trip_is_exact(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, example(100), keep=1)
    assert folder == tmp_path / "checkpoints" / "step-0000100" == checkpoint.latest(tmp_path)
    loaded = checkpoint.load(folder)
    assert (loaded.step, loaded.run, loaded.numbers) == (100, RUN, {"averages": {"loss": [0.1 + 0.2, 3]}})
    assert torch.equal(loaded.tensors["modules"]["w"], example(100).tensors["modules"]["w"])
    assert loaded.tensors["optimizers"]["model/w/step"] == 100


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9_999_990, 9_999_999, 10_000_000, 123_456_789):
        checkpoint.save(tmp_path, example(step), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-10000000", "step-123456789"]
    assert checkpoint.latest(tmp_path).name == "step-123456789"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None


def fail_with(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def replace_fails_for(name: str):
    real = os.replace

    def replace(source: str, target: str) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    return replace


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("os.replace", replace_fails_for("optimizers.safetensors")),
        ("os.replace", replace_fails_for("state.json")),
        ("os.rename", fail_with(errno.ENOSPC)),
        ("safetensors.torch.save_file", fail_with(errno.ENOSPC)),
        ("os.fsync", fail_with(errno.EDQUOT)),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what
) -> None:
    checkpoint.save(tmp_path, example(1), keep=1)
    monkeypatch.setattr(where, what)
    with pytest.raises(
        DigitError,
        match=r"after step 2 was not written.*(disk is full|quota).*step-0000001; go on from it with --resume",
    ):
        checkpoint.save(tmp_path, example(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
    assert torch.equal(
        checkpoint.load(checkpoint.latest(tmp_path)).tensors["modules"]["w"], example(1).tensors["modules"]["w"]
    )
    checkpoint.save(tmp_path, example(2), keep=1)
    assert checkpoint.latest(tmp_path).name == "step-0000002"


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, example(1), keep=1)
    half = tmp_path / "checkpoints" / ".step-0000002.ab12cd34.tmp"
    half.mkdir()
    (half / "modules.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step-0000001"
    checkpoint.remove_unfinished(tmp_path)
    assert not half.exists()


@pytest.mark.parametrize("size", [0, 7, 60])
def test_a_truncated_checkpoint_gets_a_sentence(tmp_path: Path, size: int) -> None:
    folder = checkpoint.save(tmp_path, example(1), keep=1)
    file = folder / "modules.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DigitError, match=r"modules\.safetensors is not a readable safetensors file"):
        checkpoint.load(folder)


def test_another_format_gets_a_sentence(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, example(1), keep=1)
    write_json(folder / "state.json", {**read_json(folder / "state.json"), "format": 99})
    with pytest.raises(DigitError, match="not a checkpoint of format 1"):
        checkpoint.load(folder)


def changed(**training: object) -> dict:
    return {**RUN, "training": {**RUN["training"], **training}}


def test_speed_and_logs_may_change(tmp_path: Path) -> None:
    checkpoint.check_same_run(RUN, changed(log_every=1, workers=8, accumulation=4, steps=20), tmp_path)


def test_another_run_is_named_field_by_field(tmp_path: Path) -> None:
    other = {**changed(lr=0.2), "model": {"dim": 16, "depth": 2}}
    with pytest.raises(
        DigitError, match=r"model\.depth is 2, was 'absent'; model\.dim is 16, was 8; training\.lr is 0\.2, was 0\.1"
    ):
        checkpoint.check_same_run(RUN, other, tmp_path)


def test_a_cosine_run_cannot_change_its_length(tmp_path: Path) -> None:
    with pytest.raises(DigitError, match=r"training\.steps is 20, was 9"):
        checkpoint.check_same_run(changed(schedule="cosine"), changed(schedule="cosine", steps=20), tmp_path)


def test_a_length_that_is_asked_for_may_change_in_any_schedule(tmp_path: Path) -> None:
    checkpoint.check_same_run(changed(schedule="cosine"), changed(schedule="cosine", steps=20), tmp_path, extend=True)


def test_fields_that_came_later_are_as_they_were_before(tmp_path: Path) -> None:
    newer = {**RUN, "model": {"dim": 8, "init": "normal"}}
    checkpoint.check_same_run(RUN, newer, tmp_path)
    with pytest.raises(DigitError, match=r"model\.init is 'authors', was 'normal'"):
        checkpoint.check_same_run(RUN, {**RUN, "model": {"dim": 8, "init": "authors"}}, tmp_path)
