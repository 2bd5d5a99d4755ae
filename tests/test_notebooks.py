"""The notebooks run from top to bottom, on a tiny model and few steps."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

import tiny

NOTEBOOKS = Path(__file__).parent.parent / "docs" / "notebooks"
SMALL = {"generate": {"COUNT": 3}, "tokens": {"COUNT": 6}, "train": {"STEPS": 4, "DRAWN": 16}}
"""What replaces the values in the cell that is tagged "parameters"."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("notebooks") / "model")


def with_values(book: nbformat.NotebookNode, values: dict[str, int]) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    names = {line.split(" = ")[0] for line in cell.source.splitlines()}
    assert names == set(values)
    cell.source = "\n".join(f"{name} = {value}" for name, value in values.items())
    return book


def test_the_list_is_complete():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_is_stored_with_outputs_of_a_whole_run(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "from top to bottom, once"
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(tmp|home|root)/", path.read_text()), "no paths of the machine that ran it"


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, model, tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_MODEL", str(model))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for variable in ("DIGIT_PHOTOS", "DIGIT_FOLDER"):
        monkeypatch.delenv(variable, raising=False)
    book = with_values(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4), SMALL[name])
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = {kind for cell in book.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert "image/png" in kinds, "it shows pictures"
