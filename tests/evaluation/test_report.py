"""The report, over real results of tiny models; in a browser where there is one."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from digit.cli.app import app
from digit.core.config import load_preset
from digit.core.errors import DigitError
from digit.core.files import read_json, write_json
from digit.data.token_cache import build_token_cache
from digit.evaluation.metrics.fidelity import FidelityOptions, fidelity
from digit.evaluation.metrics.noise import Change
from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, probe, split_off
from digit.evaluation.metrics.reconstruction import model_reconstruction
from digit.evaluation.metrics.stability import stability
from digit.evaluation.metrics.toy import ToyConfig, toy
from digit.evaluation.model_source import SamplingRun, open_images
from digit.evaluation.report import save_only_run, write_report
from digit.evaluation.report.beside import Bubbles, Model, conditional, understanding, warnings
from digit.evaluation.report.runs import Collection, Curve, collect, differences, matching, points
from digit.evaluation.results import Result, is_numeric, millions, shown
from digit.evaluation.studies.points import Reference, prefix, robustness
from digit.evaluation.studies.sweep import sweep
from digit.pipeline.generation import generate_folder
from digit.training.build import build_task
from digit.training.loop import train


@pytest.fixture(scope="module")
def run(pipe, vq_pipe, pooling, cifar512, tmp_path_factory) -> Path:
    """A run folder with a result of every kind, each made by the code that makes it for users."""
    out = tmp_path_factory.mktemp("report") / "demo"
    images = open_images(cifar512, num=48)
    generate_folder(pipe, out / "samples", 12)
    measured = fidelity(
        str(out / "samples"), str(cifar512), extractor=pooling, options=FidelityOptions(metrics=("fid", "isc", "prc"))
    )
    write_json(out / "fid.json", measured.to_dict())
    changes = [Change(kind="noise", level=30), Change(kind="noise", level=1), Change(kind="shift", level=1)]
    stability(pipe, images, changes).save(out / "stability")
    options = ProbeOptions(epochs=2, neighbours=3)
    probe(pipe, ProbeData(*split_off(images, 0.25)), out / "probe", options).save(out / "probe")
    reference = Reference.of(str(cifar512), pooling, FidelityOptions(metrics=("fid", "prc")), "train")
    axes = {"top_k": [0, 2, 6], "decoder_top_p": [0.5, 1.0]}
    sweep(SamplingRun(pipe, 12), axes, reference, out / "sweep").save(out / "sweep")
    runs = {"tiny": SamplingRun(pipe, 1), "tiny-vq": SamplingRun(vq_pipe, 1)}
    prefix(runs, open_images(cifar512, num=12), reference, out / "prefix", (0.0, 0.5, 1.0)).save(out / "prefix")
    robustness(SamplingRun(pipe, 12), reference, out / "robustness", rates=(0, 0.5)).save(out / "robustness")
    few = open_images(cifar512, num=8)
    found = model_reconstruction(pipe, few, pooling, None, perturb=True, shares=(0.5, 0.9))
    found.save(out / "reconstruction")
    toy(ToyConfig(samples=40, repeats=2)).save(out / "toy")
    _train(pipe, images, out, "prior")
    return out


def _train(pipe, images, out: Path, name: str, *overrides: str) -> None:
    if not (out / "tokens").exists():
        build_token_cache(pipe, images, out / "tokens")
    few = ("training.steps=6", "training.batch_size=8", "training.log_every=1", "training.validate_every=3")
    small = ("model.transformer.dim=16", "model.transformer.depth=1", "model.transformer.heads=2", "data.held_out=8")
    preset = load_preset("cifar10-tiny-prior", [*few, *small, *overrides])
    task, config = build_task("prior", preset, out / "tokens", "cifar10-tiny-prior")
    train(task, config, out / name, show=False)


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(run, tmp_path / "demo"))


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Path:
    """The page of the whole run."""
    write_report([run], out := tmp_path_factory.mktemp("page") / "report.html")
    return out


@pytest.fixture(scope="module")
def page(written) -> str:
    return written.read_text(encoding="utf-8")


def text_of(folders, out: Path, **options) -> str:
    write_report(folders, out, **options)
    return out.read_text(encoding="utf-8")


# ---- what the page says ----------------------------------------------------------------------------------------------


def row_of(text: str, first: str) -> list[str]:
    """The cells of the table row whose first cell is ``first``."""
    row = re.search(rf"<tr[^>]*>\s*<th scope=\"row\"[^>]*>{re.escape(first)}</th>.*?</tr>", text, re.DOTALL)
    return re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row[0])


def section_of(text: str, anchor: str) -> str:
    return re.search(rf'<section id="{anchor}">.*?</section>', text, re.DOTALL)[0]


SECTIONS = ["overview", "samples", "fidelity", "understanding", "stability", "probe", "sweeps", "prefix", "robustness"]
SECTIONS += ["reconstruction", "toy", "training", "paper"]


def test_every_kind_has_its_section_and_nothing_is_unreadable(run, page):
    anchors = re.findall(r'<section id="(\w+)">', page)
    assert anchors == SECTIONS
    assert re.findall(r'<li><a href="#(\w+)"', page) == anchors  # the menu
    assert not collect([run]).problems


def test_measured_values_stand_beside_the_papers(run, page):
    values = read_json(run / "fid.json")["values"]
    assert row_of(page, "samples")[2:4] == [f"{values['fid']:.2f}", f"{values['is_mean']:.2f}"]
    large = re.findall(r"DiGIT\+VQGAN \(AR\)</th>\s*<td>732M</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", page)
    assert large == [("4.59", "141.29"), ("3.39", "205.96")]
    first = read_json(run / "stability" / "result.json")["values"][0]
    assert f"<td>{first['changed']['mean']:.3f} ±" in page
    stable = section_of(page, "stability")
    assert "<td>0.1140</td>" in stable  # Table 1 at the levels that were measured, 30 and 1 dB
    assert "<td>0.6870</td>" in stable
    best = 100 * max(layer["accuracy"] for layer in read_json(run / "probe" / "result.json")["values"]["layers"])
    assert row_of(section_of(page, "probe"), "tiny")[4] == shown(best, 3)
    assert "<td>80.3</td>" in page


def test_each_result_says_what_it_depends_on(run, page):
    """Number of images, reference, network, labels, guidance under each table; hardware and settings on demand."""
    made = [path.parent.name for path in run.glob("*/result.json")]
    assert len(made) == 7
    made += ["fid.json", "samples", "prior"]  # and generation.json, and the exported model of the training
    processor = read_json(run / "toy" / "result.json")["hardware"]["processor"]
    assert page.count(f"<dt>processor</dt><dd>{processor}</dd>") == len(made)
    assert "<dt>training.lr</dt>" in page
    assert "<dt>tokens_sha256</dt>" in page
    for place in run.glob("*/result.json"):
        told = json.loads(place.read_text())["provenance"]
        assert place.parent.name == "toy" or re.search(r"\(\d+ images", told)
        assert told.replace("'", "&#39;") in page
    told = json.loads((run / "sweep" / "result.json").read_text())["provenance"]
    for fact in (
        "12 generated images",
        "ar decoder",
        "labels all in turns",
        "no guidance",
        "reference ",
        "weights 000",
    ):
        assert fact in told


def test_a_foreign_reference_is_called_not_comparable(run, page):
    assert 'class="notice"' in page
    assert "Not comparable with the paper" in page
    assert "12 images against cifar512 (512 images)" in page
    ours = collect([run]).of("fidelity")[0].result

    def changed(reference: str, images: int | None, count: int = 50_000) -> Result:
        source, against = ({**copy.deepcopy(side), **new} for side, new in (
            (ours.source, {"images": count}), (ours.reference, {"name": reference, "images": images})
        ))  # fmt: skip
        return replace(ours, source=source, reference=against)

    same = changed("imagenet/val256", 50_000)
    assert warnings([same]) == []
    for other in (changed("imagenet/train", 1_281_167), changed("VIRTUAL_imagenet256_labeled.npz", None)):
        assert "Not comparable with the paper" in warnings([other])[0]
        assert "may not be compared with each other" in warnings([same, other])[1]
    assert "Here: samples: 10,000 images" in warnings([changed("imagenet/val256", 50_000, 10_000)])[0]


def test_figure_1_pairs_probe_and_fid_of_one_model(run, page):
    fid = read_json(run / "fid.json")["values"]["fid"]
    part = section_of(page, "understanding")
    assert row_of(part, "tiny")[2] == shown(fid)
    assert row_of(part, "DiGIT 732M")[1:4] == ["80.30", "4.590", "732M"]
    models = (Model("a", 1, 2, 219, ""), Model("b", 2, 1, 732, "", here=True), Model("c", 2, 3, None, ""))
    axes = Bubbles(title="t", values=models, axes=("x", "y")).figure().axes[0]
    sizes = [float(circle.get_sizes()[0]) for circle in axes.collections[:3]]
    assert (sizes[1] - 12) / (sizes[0] - 12) == pytest.approx(732 / 219)  # areas, not radii
    assert np.allclose(axes.collections[1].get_offsets(), [[2, 1]])
    assert [text.get_text() for text in axes.texts] == ["b", "a", "c"]  # ours gets its place first


def test_a_logarithmic_axis_has_plain_numbers_enough_to_read(run):
    models = tuple(Model(str(y), x, y, 219, "") for x, y in enumerate((3.4, 9.1, 74.0)))
    figure = Bubbles(title="t", values=models, axes=("accuracy", "FID")).figure()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    ticks = [
        tick.get_text() for y, tick in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if low <= y <= high
    ]
    assert axes.get_yscale() == "log"
    assert ticks == ["2", "5", "10", "20", "50", "100"]


def test_figure_1b_is_of_models_with_labels(run):
    (found,) = collect([run]).of("fidelity")  # generation.json beside the samples says that they have labels
    rows = conditional(Collection([found])).rows()
    assert (rows[0]["Model"], rows[0]["From"]) == ("tiny", "Measured here")
    assert {"DiGIT+MaskGIT 219M", "DiGIT+VQGAN 732M"} <= {row["Model"] for row in rows}
    without = replace(found.result, sampling={**found.result.sampling, "labels": "none"})
    assert conditional(Collection([replace(found, result=without)])) is None


def test_without_the_fid_of_the_same_model_there_is_no_bubble(copied, tmp_path):
    # nothing says now whose images these are; they lie in the same folder
    (copied / "samples" / "generation.json").unlink()
    write_json(copied / "fid.json", {**read_json(copied / "fid.json"), "sampling": None})
    assert understanding(collect([copied])) is not None
    shutil.copytree(copied, tmp_path / "other" / "demo")
    shutil.rmtree(tmp_path / "other" / "demo" / "probe")
    (copied / "fid.json").unlink()
    assert understanding(collect([copied, tmp_path / "other"])) is None


# ---- what must never happen ------------------------------------------------------------------------------------------


def test_hostile_names_are_text(copied, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    for path in (copied / "samples" / "generation.json", copied / "fid.json", copied / "probe" / "result.json"):
        data = read_json(path)
        if "num" in data:
            data |= {"model": evil, "labels": [evil], "settings": {evil: evil}}
        elif data.get("model"):
            data["model"]["name"] = evil
            data["notes"] = [evil]
        else:
            data["source"]["name"] = evil
        write_json(path, data)
    sweep = read_json(copied / "sweep" / "result.json")
    sweep["values"]["points"][0]["settings"]["top_k"] = sweep["values"]["axes"]["top_k"][0] = evil
    write_json(copied / "sweep" / "result.json", sweep)
    (copied / "prior" / "config.yaml").write_text(json.dumps({"component": evil, "model": {evil: "$x$"}}))
    (copied / "toy").rename(copied / "a <b> folder")
    text = text_of([copied], tmp_path / "report.html", title=evil)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert 'onerror="' not in text
    assert "<b>" not in text
    assert text.count("&lt;script&gt;alert(1)") > 6
    assert "a &lt;b&gt; folder" in text


def test_broken_and_missing_files_are_named_and_the_rest_is_shown(copied, tmp_path):
    whole = (copied / "stability" / "result.json").read_text()
    (copied / "stability" / "result.json").write_text(whole[: len(whole) // 2])
    (copied / "probe" / "result.json").write_text('{"kind": "probe", "title": "t", "values": {"layers": 3}}')
    (copied / "prefix" / "result.json").write_text("[1, 2]")
    (copied / "samples" / "grid.png").write_bytes((copied / "samples" / "grid.png").read_bytes()[:200])
    sweep = read_json(copied / "sweep" / "result.json")
    write_json(copied / "odd" / "result.json", {**sweep, "kind": "unheard-of", "plots": ["../samples/00000.png", 7]})
    with open(copied / "prior" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo\n{"step": 9, "loss": 1.0}\n')
    (copied / "prior" / "config.yaml").write_text("{: [")
    (copied / "notes.json").write_bytes(b"\xff\xfe{")
    report = write_report([copied], tmp_path / "report.html")
    named = {problem.place for problem in report.problems}
    expected = [
        "stability/result.json",
        "probe/result.json",
        "prefix/result.json",
        "samples/grid.png",
        "odd/../samples/00000.png",
    ]
    expected += ["odd/7", "prior/metrics.jsonl", "prior/config.yaml", "notes.json"]
    assert named == {f"demo/{name}" for name in expected}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in named:
        assert f'<th scope="row">{name}</th>' in text
    assert f"{len(named)} files could not be read" in text
    assert {"samples", "fidelity", "sweeps", "toy", "others", "training", "problems"} <= set(
        re.findall(r'<section id="(\w+)">', text)
    )
    assert str(copied) not in text  # the page is for others too


def test_nothing_to_report_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DigitError, match=r"Nothing to report under .*empty; expected what"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(DigitError, match="There is no folder"):
        write_report([tmp_path / "missing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_folders_given_twice_count_once(run):
    assert len(collect([run, run / "toy", run]).found) == len(collect([run]).found)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_reference_run_is_recognised_by_what_it_trains(run, pipe, cifar512, tmp_path):
    (tmp_path / "curves").mkdir()
    save_only_run([run / "prior"], tmp_path / "curves" / "small.json")
    text = text_of([run / "prior"], tmp_path / "a.html", curves=[tmp_path / "curves"])
    assert "Reference small: the same data and training settings." in text
    assert len(re.findall(r"stroke-dasharray: [^;]*; stroke-dashoffset: 0; stroke: var\(--c0\)", text)) > 2
    shutil.copytree(run / "tokens", tmp_path / "tokens")
    _train(pipe, open_images(cifar512, num=48), tmp_path, "slower", "training.lr=0.0001")
    text = text_of([tmp_path / "slower"], tmp_path / "b.html", curves=[tmp_path / "curves"])
    assert re.search(r"Reference small: it differs in.*training\.lr: [\d.]+, here 0\.0001", text)
    _train(pipe, open_images(cifar512, num=48), tmp_path, "wider", "model.transformer.dim=24")
    assert "Reference small" not in text_of([tmp_path / "wider"], tmp_path / "c.html", curves=[tmp_path / "curves"])


def test_an_option_that_the_reference_is_too_old_for_is_a_difference():
    old = Curve("old", {"component": "prior", "model": {"dim": 8}, "training": {"lr": 1, "workers": 2}}, {})
    new = {"component": "prior", "model": {"dim": 8, "novelty": 3}, "training": {"lr": 1, "workers": 4}}
    assert matching(new, [old]) == [old]
    assert differences(new, old.config) == ["model.novelty: not known, here 3"]
    assert matching({**new, "model": {"dim": 16}}, [old]) == []
    assert matching({}, [old]) == []


def test_only_a_finished_run_can_be_a_reference(copied, tmp_path):
    shutil.rmtree(copied / "prior" / "model")
    with pytest.raises(DigitError, match="not a finished training run"):
        save_only_run([copied], tmp_path / "curve.json")
    assert "not finished: step 6 of 6" in text_of([copied / "prior"], tmp_path / "report.html")
    with pytest.raises(DigitError, match="found: none"):
        save_only_run([copied / "toy"], tmp_path / "curve.json")
    write_json(tmp_path / "odd" / "curve.json", {"metrics": 3})
    with pytest.raises(DigitError, match="not a reference curve"):
        write_report([copied], tmp_path / "report.html", curves=[tmp_path / "odd"])


def test_long_logs_are_averaged():
    lines = [{"step": step, "loss": float(step), "word": "x"} for step in range(1, 1001)]
    found = points(lines, most=100)
    assert list(found) == ["loss"]
    assert found["loss"][0] == (10, 5.5)
    assert len(found["loss"]) == 100


def test_save_curve_keeps_every_metric(run, tmp_path):
    curve = read_json(save_only_run([run], tmp_path / "curve.json"))
    logged = {name for line in (run / "prior" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert set(curve["metrics"]) == logged - {"step"}


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.59134, "7.591"),
        (0.00001234, "1.23e-05"),
        (12345, "12,345"),
        (1234567.8, "1.23e+06"),
        (0.0, "0.000"),
        (True, "True"),
    ],
)
def test_numbers_are_readable(value, text):
    assert shown(value) == text
    assert shown(None) == "\u2013"
    assert shown(float("nan")) == "nan"


def test_parameters_are_readable():
    assert [millions(v) for v in (0.0271, 219, 13500, None)] == ["27.1K", "219M", "13.5B", "\u2013"]


def test_numbers_are_aligned_to_the_right():
    rows = [{"a": 3, "b": "0.1 ±0.02", "c": "219M", "d": "16x16", "e": "not measured"}, {"e": 4.5, "d": "3 classes"}]
    assert [is_numeric(rows, name) for name in "abcde"] == [True, True, True, False, True]


def test_the_command(run, tmp_path):
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(run), str(run / "toy"), "--out", str(out), "--title", "Mine & yours"])
    assert done.exit_code == 0, done.output
    assert "10 results" in done.output
    assert "<h1>Mine &amp; yours</h1>" in out.read_text(encoding="utf-8")
    curve = tmp_path / "curve.json"
    done = CliRunner().invoke(app, ["report", str(run), "--save-curve", str(curve)])
    assert done.exit_code == 0
    assert curve.exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "light"),
        (1440, "dark"),
        pytest.param(390, "dark", marks=pytest.mark.slow),  # each width and each scheme is in one of those above
        pytest.param(1440, "light", marks=pytest.mark.slow),
    ],
)
def test_the_page_in_a_browser(browser, written, width, scheme):
    window = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = window.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 1  # the grid; all else is drawn
    assert min(sizes) > 0
    assert tab.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    drawn = tab.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(drawn) > 15
    assert min(drawn) > 200
    # text stands out from what is behind it, in both schemes
    colors = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    text, ground = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in tab.evaluate(colors))
    assert (text < 200 < 600 < ground) if scheme == "light" else (ground < 200 < 600 < text)
    window.close()


def test_the_page_prints(browser, written, tmp_path):
    """On paper everything is open, and white even for readers of dark pages."""
    window = browser.new_context(color_scheme="dark")
    tab = window.new_page()
    tab.goto(written.as_uri())
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.querySelector('details dl').getBoundingClientRect().height") > 20
    tab.set_viewport_size({"width": 720, "height": 1000})  # about A4 without margins
    assert tab.evaluate("document.documentElement.scrollWidth") == 720  # nothing is cut off
    tab.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    window.close()
