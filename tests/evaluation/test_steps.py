import pytest

from digit.core.files import write_bytes
from digit.evaluation.steps import Steps


def test_a_step_is_done_once_for_all_that_it_depends_on(tmp_path):
    steps, done = Steps(tmp_path, {"model": "a"}), []

    def work(folder):
        done.append(folder)
        return {"fid": 0.1 + 0.2}

    first = steps.run("points", {"x": 1, "y": 2}, work)
    again = Steps(tmp_path, {"model": "a"}).run("points", {"y": 2, "x": 1}, work)
    assert (first.value, first.reused) == ({"fid": 0.1 + 0.2}, False)
    assert (again.value, again.reused, again.folder) == (first.value, True, first.folder)
    steps.run("points", {"x": 1, "y": 3}, work)
    Steps(tmp_path, {"model": "b"}).run("points", {"x": 1, "y": 2}, work)
    steps.run("tokens", {"x": 1, "y": 2}, work)
    assert len(set(done)) == len(done) == 4


def test_an_interrupted_step_goes_on_in_its_folder(tmp_path):
    def stops(folder):
        write_bytes(folder / "half", b"1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path).run("train", {}, stops)
    assert not list(tmp_path.rglob("*.json"))
    step = Steps(tmp_path).run("train", {}, lambda folder: (folder / "half").read_text())
    assert (step.value, step.reused) == ("1", False)
