"""What comes in files of unknown origin: whatever stands in them, a valid result or one of our own errors."""

import json
import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sample_reports import build

from clusterq_deploy.config.run_config import RunConfig, make_config
from clusterq_deploy.config.toml import read_settings
from clusterq_deploy.errors import ConfigError, DataError, ModelError, ReportError, RunDirectoryError, WeightsError
from clusterq_deploy.evaluation.data import load_evaluation
from clusterq_deploy.models import InputSpec, load_model
from clusterq_deploy.report import Report, read_report, to_html, to_markdown
from clusterq_deploy.report.compare import compare, read_reports
from clusterq_deploy.run.directory import RunDirectory
from clusterq_deploy.stages.evaluate import Graph

quick = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
few = settings(quick, max_examples=15)

THREE = Graph("three", "file", InputSpec(size=(3, 4, 4), mean=(0.0,) * 3, std=(1.0,) * 3), 3)
REPORT: dict[str, Any] = json.loads(build().to_json())
CONFIG: dict[str, Any] = RunConfig(model="digits", data=Path("data"), keep={"fc": 8}, max_drop=1.0).model_dump(
    mode="json", exclude_none=True
)
MODEL = {"name": "digits", "weights_sha256": "0" * 64}
STAGE = {
    "inputs": "1" * 64,
    "upstream": {},
    "files": {"images": "2" * 64},
    "result": {"loss": math.nan},
    "seconds": 1.5,
}
TUNED = {**STAGE, "upstream": {"synthesize": "3" * 64}, "files": {}}
MANIFEST = {"schema": 1, "model": MODEL, "stages": {"synthesize": STAGE, "quantize/w4a4": TUNED}}

text = st.text(max_size=8) | st.sampled_from(["", "nan", "-1", "1e999", "\0", "\ud800", "9" * 5000, "../x", "w8a8"])
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 10**30, 10**400, 2**63, 1e308, -1e308])
scalars = st.none() | st.booleans() | numbers | text
json_values = st.recursive(scalars, lambda own: st.lists(own, max_size=3) | st.dictionaries(text, own, max_size=3))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested dictionaries and lists; of a long list to the first two."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, own in items:
        yield from places(own, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy with another value in one place."""
    if not path:
        return change
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], change)
    return copy


@st.composite
def changes(draw: st.DrawFn, whole: dict[str, Any]) -> Any:
    """A valid file's content with one value replaced, more often than not by one of its own type."""
    path = draw(st.sampled_from(list(places(whole))))
    value: Any = whole
    for key in path:
        value = value[key]
    own: st.SearchStrategy[Any] = json_values
    if isinstance(value, bool):
        own = st.booleans()
    elif isinstance(value, int | float):
        own = numbers
    elif isinstance(value, str):
        own = text
    elif isinstance(value, list):
        own = st.integers(0, 3).map(lambda count: value[:count] or value * count)
    elif isinstance(value, dict):
        own = (
            st.sampled_from(list(value)).map(lambda key: {k: v for k, v in value.items() if k != key})
            | text.map(lambda name: {**value, name: 1})
            if value
            else st.just({"": 1})
        )
    return replaced(whole, path, draw(st.one_of(own, own, own, json_values)))


def bytes_near(whole: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, and a valid file's with some of them replaced, cut out, or cut off."""

    def spliced(start: int, end: int, middle: bytes) -> bytes:
        return whole[:start] + middle + whole[end:]

    place = st.integers(0, len(whole))
    return st.binary(max_size=200) | st.builds(spliced, place, place, st.binary(max_size=20))


def is_ours(error: type[Exception], call: Callable[[], object]) -> object:
    """The result of a call, or None where it raises the error that it may raise, with a message."""
    try:
        return call()
    except error as raised:
        if not str(raised):
            raise
        return None


# ---- the configuration ----


@quick
@given(content=bytes_near(tomli_w.dumps(CONFIG).encode()))
@example(content=b"[[[" * 2000)
@example(content=b"x=" + b"[" * 20_000)
@example(content=b"seed=" + b"9" * 5000)
@example(content=b"model='digits'\nseed=nan")
def test_any_bytes_as_a_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    is_ours(ConfigError, lambda: make_config(read_settings(tmp_path / "run.toml")))


@quick
@given(values=st.dictionaries(st.sampled_from(list(RunConfig.model_fields)) | text, json_values, max_size=4))
def test_any_values_as_a_config(values: dict[str, Any]) -> None:
    is_ours(ConfigError, lambda: make_config(values))
    is_ours(ConfigError, lambda: make_config({"model": "digits", **values}))


@quick
@given(path=st.sampled_from(list(places(CONFIG))), change=json_values)
@example(path=("synthesis",), change={"generator": {"steps": {"deeper": 1}}})
@example(path=("synthesis", "refine"), change={"step": 1})
@example(path=("synthesis", "generator"), change={"": {"": 1}})
@example(path=("data",), change="\udcff")
@example(path=("keep",), change={"layer": {"bits": 3}})
@example(path=("finetune", "steps"), change=-(10**5000))
@example(path=("seed",), change=10**5000)
def test_a_config_with_another_value_in_one_place(path: tuple[Any, ...], change: Any) -> None:
    changed = replaced(CONFIG, path, change)
    if not isinstance(changed, dict):
        return
    found = is_ours(ConfigError, lambda: make_config(changed))
    if isinstance(found, RunConfig):
        is_ours(ConfigError, lambda: found.scaled_to(1e9))
        written = tomllib.loads(found.to_toml().encode().decode())
        assert make_config(written).to_toml() == found.to_toml()  # paths are absolute in it


PATHS = {
    "model": "model = '{}/net.py:make'",
    "weights": "model = 'resnet18'\nweights = '{}/w.pth'",
    "data": "model = 'digits'\ndata = '{}/images'",
    "timing_cache": "model = 'digits'\n[build]\ntiming_cache = '{}/cache'",
}


@pytest.mark.parametrize("name", PATHS)
def test_a_configs_relative_paths_stay_in_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "inside").mkdir(parents=True)
    outside.mkdir()
    monkeypatch.chdir(outside)
    (folder / "link").symlink_to(outside)
    file = folder / "run.toml"

    def read(place: str | Path) -> str:
        file.write_text(PATHS[name].format(place))
        return make_config(read_settings(file)).to_toml()

    assert f"{folder}/inside/" in read("inside")
    assert f"{folder}/inside/../inside/" in read("inside/../inside")
    assert f"{folder}/inside/" in read(folder / "inside")
    for place in (outside, "..", "../outside", "inside/../../outside", "link", "../folder2"):
        with pytest.raises(ConfigError, match=f"{name} in .*leads out of the file's folder"):
            read(place)
    with pytest.raises(ConfigError, match="leads out of"):  # a name makes no run
        read(outside)
    (folder / "manifest.json").touch()
    assert f"{outside}/" in read(outside)
    with pytest.raises(ConfigError, match="leads out of"):
        read("../outside")
    (folder / "circle").symlink_to(folder / "circle")
    is_ours(ConfigError, lambda: read("circle"))
    file.write_text(PATHS[name].replace("'", '"').format("\\u0000"))
    with pytest.raises(ConfigError, match="is no path"):
        read_settings(file)


def test_run_toml_holds_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"model": "net.py:make", "weights": "w.pth", "data": "../images", "build": {"timing_cache": "cache"}}
    (tmp_path / "run/manifest.json").touch()
    (tmp_path / "run/run.toml").write_text(make_config(values).to_toml())
    monkeypatch.chdir(tmp_path / "run")
    found = make_config(read_settings(Path("run.toml")))
    assert found.model == f"{tmp_path}/net.py:make"
    assert found.weights == f"{tmp_path}/w.pth"
    assert found.data == tmp_path / "../images"
    assert found.build.timing_cache == tmp_path / "cache"
    plain = make_config({"model": "timm:resnet18", "weights": "none", "build": {"timing_cache": "none"}})
    (tmp_path / "run/run.toml").write_text(plain.to_toml())
    assert make_config(read_settings(Path("run.toml"))) == plain


# ---- manifest.json ----


def opened(folder: Path) -> None:
    """Read a run directory, and look at all that it says is finished."""
    run = RunDirectory(folder, MODEL)
    for stage in ("synthesize", "quantize/w4a4"):
        run.finished(stage)


@quick
@given(
    content=changes(MANIFEST).map(lambda value: json.dumps(value).encode()) | bytes_near(json.dumps(MANIFEST).encode())
)
@example(content=b"[" * 20_000)
@example(content=b'{"schema": 2}')
@example(content=json.dumps(replaced(MANIFEST, ("stages", "synthesize", "files"), {"9" * 5000: "", "\0": ""})).encode())
def test_any_bytes_as_a_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    is_ours(RunDirectoryError, lambda: opened(tmp_path))


def test_a_manifest_that_is_whole_and_one_whose_stage_builds_on_itself(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    opened(tmp_path)
    circle = replaced(MANIFEST, ("stages", "synthesize", "upstream"), {"quantize/w4a4": ""})
    (tmp_path / "manifest.json").write_text(json.dumps(circle))
    with pytest.raises(RunDirectoryError, match="is no manifest of a run"):
        opened(tmp_path)


def test_a_result_that_was_altered_is_made_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, MODEL, ["clusterq", "run"])
    run.perform("evaluate", {}, lambda: ({"top1": {1: 70.0, 10: 90.0}}, []))
    again = RunDirectory(tmp_path, MODEL)
    assert again.finished("evaluate") is not None
    assert again.made_by == ["clusterq", "run"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["stages"]["evaluate"]["result"]["top1"]["1"] = 99.0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert RunDirectory(tmp_path, MODEL).finished("evaluate") is None


def test_what_a_killed_write_left_is_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.deadbeef.tmp").write_text("half")
    run = RunDirectory(tmp_path, MODEL)
    run.write_config("")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "manifest.json", "run.toml"]


# ---- labels.csv ----


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrusted") / "set"
    folder.mkdir()
    (folder / "x.png").write_bytes(b"an image is not needed to read labels")
    (folder.parent / "secret.png").write_bytes(b"out of reach")
    return folder


names = text | st.sampled_from(["x.png", "./x.png", "../secret.png", "/etc/hosts", "x" * 300, "a/" * 3000, ".", "~"])
rows = st.lists(st.tuples(names, numbers | text | st.sampled_from([0, 2])), max_size=4)


def csv_of(table: list[tuple[Any, Any]]) -> bytes:
    return "".join(f"{name},{label}\n" for name, label in table).encode(errors="surrogatepass")


@quick
@given(content=bytes_near(b"file,label\nx.png,0\nx.png,2\n") | rows.map(csv_of))
@example(content=b"\0,1\n")
@example(content=b'"' + b"x" * 200_000 + b'",1\n')
@example(content=b"x" * 300 + b",1\n")
@example(content=b"a/" * 3000 + b"x.png,1\n")
@example(content=b"x.png," + b"9" * 5000)
@example(content=b"x.png,1_0\n")
def test_any_bytes_as_labels(labelled: Path, content: bytes) -> None:
    (labelled / "labels.csv").write_bytes(content)
    data = is_ours(DataError, lambda: load_evaluation(labelled, THREE))
    if data is not None:
        assert data.labels.min() >= 0
        assert data.labels.max() < 3


@quick
@given(content=st.data())
def test_any_bytes_as_an_archive(tmp_path: Path, content: st.DataObject) -> None:
    whole = tmp_path / "whole.npz"
    if not whole.exists():
        np.savez(whole, images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, 2]))
    file = tmp_path / "set.npz"
    file.write_bytes(content.draw(bytes_near(whole.read_bytes())))
    is_ours(DataError, lambda: load_evaluation(file, THREE))


# ---- report.json ----


def shown(report: Report) -> None:
    """Everything that is made of a report that was read."""
    to_markdown(report)
    compared = compare({"one": report})
    compared.to_csv()
    compared.to_markdown()


@quick
@given(content=bytes_near(json.dumps(REPORT).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"schema": ' + b"9" * 5000 + b"}")
@example(content=b"\xef\xbb\xbf{}")
def test_any_bytes_as_a_report(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    is_ours(ReportError, lambda: read_reports([tmp_path]))


def made_of(content: Any, file: Path, make: Callable[[Report], object]) -> None:
    """Make something of a report with this content, if it is read."""
    file.write_text(json.dumps(content), encoding="utf-8")
    report = is_ours(ReportError, lambda: read_report(file))
    if isinstance(report, Report):
        make(report)


@quick
@given(content=changes(REPORT))
def test_a_report_with_another_value_in_one_place(tmp_path: Path, content: Any) -> None:
    made_of(content, tmp_path / "report.json", shown)


@few
@given(content=changes(REPORT))
def test_the_page_of_such_a_report(tmp_path: Path, content: Any) -> None:
    made_of(content, tmp_path / "report.json", to_html)


# ---- code ----


def test_a_module_runs_only_where_a_factory_of_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef make(): return None\n"
    (tmp_path / "net.py").write_text(source)
    for name in ("net.py", str(tmp_path / "net.py"), "net", "net:make", "net.py:", ":make", "timm:net.py", "./net"):
        is_ours(ModelError, lambda name=name: load_model(name, device=torch.device("cpu")))  # type: ignore[misc]
        assert not (tmp_path / "ran").exists(), name
    with pytest.raises(WeightsError):
        load_model("digits", weights="net.py", device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="made a NoneType"):
        load_model("net.py:make", device=torch.device("cpu"))
    assert (tmp_path / "ran").exists(), "it runs where it is asked for"
