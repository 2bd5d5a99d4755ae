"""The report, over real results of tiny models; in a browser where there is one."""

import copy
import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from digit.cli.app import app
from digit.core.config import load_preset, preset_names
from digit.core.errors import DigitError
from digit.core.files import read_json, write_json
from digit.data.token_cache import build_token_cache
from digit.evaluation import paper
from digit.evaluation.metrics.fidelity import FidelityOptions, fidelity
from digit.evaluation.metrics.model_reconstruction import model_reconstruction
from digit.evaluation.metrics.noise import Change
from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, probe, split_off
from digit.evaluation.metrics.stability import stability
from digit.evaluation.metrics.toy import ToyConfig, toy
from digit.evaluation.model_source import SamplingRun, open_images
from digit.evaluation.report import write_report
from digit.evaluation.report.collect import Found, collect
from digit.evaluation.report.curves import Curve, differences, matching, points, save_curve, save_only_run
from digit.evaluation.report.html import Html, join, millions, number, table, tag
from digit.evaluation.report.measures import fidelity_warnings
from digit.evaluation.report.svg import Axis, Circle, Series, bubble_chart, line_chart
from digit.evaluation.studies.prefix import prefix
from digit.evaluation.studies.sweep import Reference, sweep
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
def page(run, tmp_path_factory) -> str:
    return text_of([run], tmp_path_factory.mktemp("page") / "report.html")


def text_of(folders, out: Path, **options) -> str:
    return write_report(folders, out, **options).path.read_text(encoding="utf-8")


# ---- what the page says ----------------------------------------------------------------------------------------------


def test_every_kind_has_its_section_and_nothing_is_unreadable(run, page):
    anchors = re.findall(r'<section id="(\w+)">', page)
    expected = [
        "overview",
        "samples",
        "fidelity",
        "bubbles",
        "stability",
        "probe",
        "sweeps",
        "prefix",
        "reconstruction",
        "toy",
    ]
    assert anchors == [*expected, "training", "paper"]
    assert re.findall(r'href="#(\w+)"', page) == anchors  # the menu
    assert not collect([run]).problems


def test_measured_values_stand_beside_the_papers(run, page):
    values = read_json(run / "fid.json")["values"]
    row = re.search(r'<tr><th scope="row">samples</th>.*?</tr>', page)[0]
    assert f"<td>{values['fid']:.2f}</td><td>{values['is_mean']:.2f}</td>" in row
    assert "<td>732M</td><td>4.59</td><td>141.29</td>" in page
    first = read_json(run / "stability" / "result.json")["values"][0]
    assert f"<span>{first['changed']['mean']:.3f}<small>" in page
    assert "<td>0.114</td><td>0.687</td>" in page  # Table 1 at the levels that were measured, 30 and 1 dB
    probe = read_json(run / "probe" / "result.json")["values"]["layers"]
    best = 100 * max(layer["accuracy"] for layer in probe)
    assert f"<td>{number(best, 3)}</td>" in page
    assert "<td>80.3</td>" in page


def test_hardware_and_settings_of_each_measurement_are_there(run, page):
    made = [path.parent.name for path in run.glob("*/result.json")]
    assert len(made) == 6
    made += ["fid.json", "samples", "prior"]  # and generation.json, and the exported model of the training
    processor = read_json(run / "toy" / "result.json")["hardware"]["processor"]
    assert len(re.findall(f"<dt>(?:hardware.)?processor</dt><dd>{re.escape(processor)}</dd>", page)) == len(made)
    assert "<dt>training.lr</dt>" in page
    assert "<dt>tokens_sha256</dt>" in page


def test_a_foreign_reference_is_called_not_comparable(run, page):
    assert 'class="notice"' in page
    assert "Not comparable with the paper" in page
    assert "12 images against cifar512 (512 images)" in page
    ours = collect([run]).of("fidelity")[0]

    def changed(reference: str, images: int | None, count: int = 50_000) -> Found:
        data = copy.deepcopy(ours.data)
        data["reference"] |= {"name": reference, "images": images}
        data["source"]["images"] = count
        return replace(ours, data=data)

    same = changed("imagenet/val256", 50_000)
    assert fidelity_warnings([same]) == []
    for other in (changed("imagenet/train", 1_281_167), changed("VIRTUAL_imagenet256_labeled.npz", None)):
        assert "Not comparable with the paper" in fidelity_warnings([other])[0]
        assert "may not be compared with each other" in fidelity_warnings([same, other])[1]
    assert "Here: samples: 10,000 images" in fidelity_warnings([changed("imagenet/val256", 50_000, 10_000)])[0]


def test_the_bubble_chart_pairs_probe_and_fid_of_one_model(run, page):
    fid = read_json(run / "fid.json")["values"]["fid"]
    chart = re.search(r"<figcaption>FID against linear probe</figcaption>.*?</figure>", page)[0]
    assert f"FID {number(fid)}</title>" in chart
    assert "DiGIT 732M: 80.30 %, FID 4.590" in chart
    sizes = {m[2]: float(m[1]) for m in re.finditer(r'r="([\d.]+)" class="bubble \w+"><title>([^:]+):', chart)}
    assert sizes["DiGIT 732M"] ** 2 / sizes["DiGIT 219M"] ** 2 == pytest.approx(732 / 219, rel=0.02)  # areas, not radii


def test_without_the_fid_of_the_same_model_there_is_no_bubble(copied, tmp_path):
    (
        copied / "samples" / "generation.json"
    ).unlink()  # nothing says now whose pictures these are; they lie in the same folder
    assert 'id="bubbles"' in text_of([copied], tmp_path / "a.html")
    shutil.copytree(copied, tmp_path / "other" / "demo")
    shutil.rmtree(tmp_path / "other" / "demo" / "probe")
    (copied / "fid.json").unlink()
    assert 'id="bubbles"' not in text_of([copied, tmp_path / "other"], tmp_path / "b.html")


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
    (copied / "toy" / "pca-lda.png").unlink()
    sweep = read_json(copied / "sweep" / "result.json")
    write_json(copied / "odd" / "result.json", {**sweep, "kind": "unheard-of", "plots": ["../samples/00000.png", 7]})
    with open(copied / "prior" / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo\n{"step": 9, "loss": 1.0}\n')
    (copied / "prior" / "config.yaml").write_text("{: [")
    (copied / "notes.json").write_bytes(b"\xff\xfe{")
    report = write_report([copied], tmp_path / "report.html")
    named = {problem.place.rstrip("/") for problem in report.problems}
    expected = [
        "stability/result.json",
        "probe",
        "prefix/result.json",
        "samples/grid.png",
        "toy/pca-lda.png",
        "odd/../samples/00000.png",
    ]
    expected += ["odd/7", "prior/metrics.jsonl", "prior/config.yaml", "notes.json"]
    assert named == {f"demo/{name}" for name in expected}
    text = report.path.read_text(encoding="utf-8")
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
    text = text_of([run], tmp_path / "a.html", curves=[tmp_path / "curves"])
    assert "Reference small: the same data and training settings." in text
    assert text.count('class="line c0 dashed"') > 2
    shutil.copytree(run / "tokens", tmp_path / "tokens")
    _train(pipe, open_images(cifar512, num=48), tmp_path, "slower", "training.lr=0.0001")
    text = text_of([tmp_path / "slower"], tmp_path / "b.html", curves=[tmp_path / "curves"])
    assert re.search(r"Reference small: it differs in.*training\.lr: [\d.]+, here 0\.0001", text)
    _train(pipe, open_images(cifar512, num=48), tmp_path, "wider", "model.transformer.dim=24")
    assert "Reference small" not in text_of([tmp_path / "wider"], tmp_path / "c.html", curves=[tmp_path / "curves"])


def test_an_option_that_the_reference_is_too_old_for_is_a_difference():
    old = Curve("old", {"component": "prior", "model": {"dim": 8}, "training": {"lr": 1, "workers": 2}}, {}, {}, {})
    new = {"component": "prior", "model": {"dim": 8, "novelty": 3}, "training": {"lr": 1, "workers": 4}}
    assert matching(new, [old]) == [old]
    assert differences(new, old.config) == ["model.novelty: not known, here 3"]
    assert matching({**new, "model": {"dim": 16}}, [old]) == []
    assert matching({}, [old]) == []


def test_only_a_finished_run_can_be_a_reference(copied, tmp_path):
    shutil.rmtree(copied / "prior" / "model")
    with pytest.raises(DigitError, match="not a finished training run"):
        save_only_run([copied], tmp_path / "curve.json")
    assert "not finished: step 6 of 6" in text_of([copied], tmp_path / "report.html")
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
    curve = read_json(save_curve(collect([run]).of("training")[0], tmp_path / "curve.json"))
    logged = {name for line in (run / "prior" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert set(curve["metrics"]) == logged - {"step"}


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_strings_are_escaped_and_markup_is_not():
    assert tag("a", "<i>", Html("<b></b>"), href='"x"', class_="k", hidden=True, title=None) == (
        '<a href="&quot;x&quot;" class="k" hidden>&lt;i&gt;<b></b></a>'
    )
    assert join(["a<", None, 3, Html("<br>")]) == "a&lt;3<br>"
    assert 'class="ours"' in table(["", "n"], {"*here": [["a", 1]]})


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
    assert number(value) == text
    assert number(None) == "\u2013"
    assert number(float("nan")) == "nan"


def test_parameters_are_readable():
    assert [millions(v) for v in (0.0271, 219, 13500, None)] == ["27.1K", "219M", "13.5B", "\u2013"]


def test_axes_have_round_ticks_in_the_right_places():
    axis = Axis([0, 100], 50, 250, pad=0)
    assert axis.ticks() == [0, 20, 40, 60, 80, 100]
    assert (axis(0), axis(100), axis(25)) == (50, 250, 100)
    assert Axis([1, 1000], 0, 90, log=True, pad=0)(10) == pytest.approx(30)
    assert Axis([3, 3], 0, 1).low < 3 < Axis([3, 3], 0, 1).high
    assert all(float(v).is_integer() for v in Axis([0, 1, 2], 0, 1).ticks())  # layers have no halves


def test_a_line_is_drawn_where_its_values_are():
    chart = line_chart("t", [Series("s", [0, 1, 2], [0, float("nan"), 10], markers=False)], "x", "y")
    line = re.search(r'<polyline points="([^"]+)"', chart)[1].split()
    assert len(line) == 2  # the value that is no number is left out
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line)
    assert x0 < x1
    assert y0 > y1  # larger values stand higher


def test_names_of_bubbles_do_not_cover_each_other():
    chart = bubble_chart("t", [Circle(f"model {i}", 70 + i / 10, 9, 100, False) for i in range(4)], "x", "y")
    places = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="name">', chart)
    assert len(set(places)) == 4


def test_the_papers_tables_agree_with_each_other():
    table_3 = {(row.method, row.parameters, row.epochs): (row.fid, row.inception) for row in paper.UNCONDITIONAL}
    steps = paper.ADDITIVE
    assert (steps[0].fid, steps[0].inception) == table_3["VQGAN", 214, "200"]
    assert (steps[2].fid, steps[2].inception) == table_3["DiGIT+VQGAN", 219, "400"]
    assert (steps[3].fid, steps[3].inception) == table_3["DiGIT+VQGAN", 732, "200"]
    assert (paper.ENCODERS[-1].fid, paper.ENCODERS[-1].inception) == table_3["VQGAN", 214, "200"]
    probes = {row.parameters: row.accuracy for row in paper.PROBE if row.method == "DiGIT"}
    for bubble in paper.BUBBLES[:2]:
        assert bubble.accuracy == probes[bubble.parameters]
        assert bubble.fid == min(
            row.fid for row in paper.UNCONDITIONAL if row.parameters == bubble.parameters and row.family == "AR"
        )
    for values in (values for space in paper.STABILITY.values() for values in space.values()):
        assert len(values) == len(paper.SNRS)
        assert list(values) in (sorted(values), sorted(values, reverse=True))  # more noise, always less stable


def test_the_command(run, tmp_path):
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(run), str(run / "toy"), "--out", str(out), "--title", "Mine & yours"])
    assert done.exit_code == 0, done.output
    assert "9 results" in done.output
    assert "<h1>Mine &amp; yours</h1>" in out.read_text(encoding="utf-8")
    curve = tmp_path / "curve.json"
    done = CliRunner().invoke(app, ["report", str(run), "--save-curve", str(curve)])
    assert done.exit_code == 0
    assert curve.exists()


# ---- the map of the paper --------------------------------------------------------------------------------------------

MAP = Path(__file__).parents[2] / "docs" / "paper.md"


def _commands() -> list[list[str]]:
    text = MAP.read_text(encoding="utf-8")
    found = re.findall(r"^(digit .*)$", text, re.MULTILINE) + re.findall(r"`(digit [^`]+)`", text)
    return [shlex.split(command.split("#")[0])[1:] for command in found]


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_the_commands_of_the_map_exist(words):
    """Each subcommand is there and knows the options and presets that docs/paper.md gives it."""
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known
    for option, value in itertools.pairwise(words):
        assert option != "--preset" or value in preset_names()


def test_the_map_has_every_table_and_figure():
    text = MAP.read_text(encoding="utf-8")
    for part in (
        "Table 1",
        "Table 2",
        "Tables 3 and 4",
        *(f"Figure {n}" for n in ("1", "2", "3a", "3b", "4a", "4b", "5", "6")),
    ):
        assert f"### {part}: " in text
    assert set(re.findall(r"`((?:imagenet256|cifar10)-(?:base|large|tiny|linear|encoder|vqgan)[\w-]*)`", text)) <= set(
        preset_names()
    )


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(browser, run, tmp_path, width, scheme):
    out = write_report([run], tmp_path / "report.html").path
    window = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = window.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(out.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [out.as_uri()]
    sizes = tab.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 2
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


def test_the_page_prints(browser, run, tmp_path):
    """On paper everything is open, and white even for readers of dark pages."""
    out = write_report([run], tmp_path / "report.html").path
    window = browser.new_context(color_scheme="dark")
    tab = window.new_page()
    tab.goto(out.as_uri())
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.querySelector('details dl').getBoundingClientRect().height") > 20
    tab.set_viewport_size({"width": 720, "height": 1000})  # about A4 without margins
    assert tab.evaluate("document.documentElement.scrollWidth") == 720  # nothing is cut off
    tab.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    window.close()
