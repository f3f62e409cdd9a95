"""Files of unknown origin: whatever is in them, the result is valid or one of our own errors."""

import argparse
import functools
import io
import json
import math
import pickle
import struct
import tomllib
import zipfile
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
from support import edited_stages

from clusterq_deploy.config.run_config import RunConfig, make_config
from clusterq_deploy.config.toml import read_settings
from clusterq_deploy.errors import ConfigError, DataError, ModelError, ReportError, RunDirectoryError, WeightsError
from clusterq_deploy.evaluation.data import load_evaluation
from clusterq_deploy.models import InputSpec, load_model, torch_files
from clusterq_deploy.models.checkpoints import read_weights
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
json_values = st.recursive(scalars, lambda item: st.lists(item, max_size=3) | st.dictionaries(text, item, max_size=3))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value in nested dictionaries and lists, for a list only to the first two."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """Return a copy with another value in one place."""
    if not path:
        return change
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], change)
    return copy


def like(value: Any) -> st.SearchStrategy[Any]:
    """Return values of the type of another one; for lists and dictionaries, it with something missing or repeated."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return numbers
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return st.integers(0, 3).map(lambda count: value[:count] or value * count)
    if isinstance(value, dict):
        fewer = [{k: v for k, v in value.items() if k != key} for key in value]
        return st.sampled_from([*fewer, {}]) | text.map(lambda name: {**value, name: 1})
    return json_values


@st.composite
def changes(draw: st.DrawFn, whole: dict[str, Any]) -> Any:
    """Draw a valid file's content with one value replaced, more often than not by one of its own type."""
    path = draw(st.sampled_from(list(places(whole))))
    value = like(functools.reduce(lambda parent, key: parent[key], path, whole))
    return replaced(whole, path, draw(st.one_of(value, value, value, json_values)))


def bytes_near(whole: bytes) -> st.SearchStrategy[bytes]:
    """Return any bytes, and a valid file's with some of them replaced, cut out, or cut off."""

    def spliced(start: int, end: int, middle: bytes) -> bytes:
        return whole[:start] + middle + whole[end:]

    place = st.integers(0, len(whole))
    return st.binary(max_size=200) | st.builds(spliced, place, place, st.binary(max_size=20))


def allow(error: type[Exception], call: Callable[[], object]) -> object:
    """Return the result of a call, or None if it raises the error that it may raise, with a message."""
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
def test_read_settings_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    allow(ConfigError, lambda: make_config(read_settings(tmp_path / "run.toml")))


@quick
@given(values=st.dictionaries(st.sampled_from(list(RunConfig.model_fields)) | text, json_values, max_size=4))
def test_make_config_of_any_values(values: dict[str, Any]) -> None:
    allow(ConfigError, lambda: make_config(values))
    allow(ConfigError, lambda: make_config({"model": "digits", **values}))


@quick
@given(path=st.sampled_from(list(places(CONFIG))), change=json_values)
@example(path=("synthesis",), change={"generator": {"steps": {"deeper": 1}}})
@example(path=("synthesis", "refine"), change={"step": 1})
@example(path=("synthesis", "generator"), change={"": {"": 1}})
@example(path=("data",), change="\udcff")
@example(path=("keep",), change={"layer": {"bits": 3}})
@example(path=("finetune", "steps"), change=-(10**5000))
@example(path=("seed",), change=10**5000)
def test_make_config_with_one_value_changed(path: tuple[Any, ...], change: Any) -> None:
    changed = replaced(CONFIG, path, change)
    if not isinstance(changed, dict):
        return
    config = allow(ConfigError, lambda: make_config(changed))
    if isinstance(config, RunConfig):
        allow(ConfigError, lambda: config.scaled_to(1e9))
        written = tomllib.loads(config.to_toml().encode().decode())
        assert make_config(written).to_toml() == config.to_toml()  # paths are absolute in it


PATHS = {
    "model": "model = '{}/net.py:make'",
    "weights": "model = 'resnet18'\nweights = '{}/w.pth'",
    "data": "model = 'digits'\ndata = '{}/images'",
    "timing_cache": "model = 'digits'\n[build]\ntiming_cache = '{}/cache'",
}


@pytest.mark.parametrize("name", PATHS)
def test_read_settings_keeps_paths_in_the_files_folder(
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
    allow(ConfigError, lambda: read("circle"))
    file.write_text(PATHS[name].replace("'", '"').format("\\u0000"))
    with pytest.raises(ConfigError, match="is not a path"):
        read_settings(file)


def test_read_settings_keeps_a_file_of_several_weights_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.pth").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.pth").symlink_to(tmp_path / "secret.pth")
    file = folder / "run.toml"
    file.write_text("model = 'resnet18'\nweights = 'link.pth:ema'")
    with pytest.raises(ConfigError, match="leads out of the file's folder"):
        read_settings(file)
    file.write_text("model = 'resnet18'\nweights = 'inside.pth:ema'")
    assert read_settings(file)["weights"] == f"{folder}/inside.pth:ema"


def test_run_toml_means_the_same_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"model": "net.py:make", "weights": "w.pth", "data": "../images", "build": {"timing_cache": "cache"}}
    (tmp_path / "run/manifest.json").touch()
    (tmp_path / "run/run.toml").write_text(make_config(values).to_toml())
    monkeypatch.chdir(tmp_path / "run")
    config = make_config(read_settings(Path("run.toml")))
    assert (config.model, config.weights) == (f"{tmp_path}/net.py:make", f"{tmp_path}/w.pth")
    assert (config.data, config.build.timing_cache) == (tmp_path / "../images", tmp_path / "cache")
    plain = make_config({"model": "timm:resnet18", "weights": "none", "build": {"timing_cache": "none"}})
    (tmp_path / "run/run.toml").write_text(plain.to_toml())
    assert make_config(read_settings(Path("run.toml"))) == plain


# ---- manifest.json ----


def open_all(folder: Path) -> None:
    """Open a run directory, and look at all that it says is finished."""
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
def test_run_directory_with_any_bytes_as_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    allow(RunDirectoryError, lambda: open_all(tmp_path))


def test_run_directory_refuses_a_stage_that_builds_on_itself(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    open_all(tmp_path)
    circle = replaced(MANIFEST, ("stages", "synthesize", "upstream"), {"quantize/w4a4": ""})
    (tmp_path / "manifest.json").write_text(json.dumps(circle))
    with pytest.raises(RunDirectoryError, match="is not the manifest of a run"):
        open_all(tmp_path)


def test_run_directory_does_not_count_an_altered_result_as_finished(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, MODEL, ["clusterq", "run"])
    run.perform("evaluate", {}, lambda: ({"top1": {1: 70.0, 10: 90.0}}, []))
    again = RunDirectory(tmp_path, MODEL)
    assert again.finished("evaluate") is not None
    assert again.last_command == ["clusterq", "run"]
    with edited_stages(tmp_path) as stages:
        stages["evaluate"]["result"]["top1"]["1"] = 99.0
    assert RunDirectory(tmp_path, MODEL).finished("evaluate") is None


def test_run_directory_removes_what_a_killed_write_left(tmp_path: Path) -> None:
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
def test_load_evaluation_with_any_bytes_as_labels(labelled: Path, content: bytes) -> None:
    (labelled / "labels.csv").write_bytes(content)
    data = allow(DataError, lambda: load_evaluation(labelled, THREE))
    if data is not None:
        assert data.labels.min() >= 0
        assert data.labels.max() < 3


@quick
@given(content=st.data())
def test_load_evaluation_of_any_bytes_as_archive(tmp_path: Path, content: st.DataObject) -> None:
    whole = tmp_path / "whole.npz"
    if not whole.exists():
        np.savez(whole, images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, 2]))
    file = tmp_path / "set.npz"
    file.write_bytes(content.draw(bytes_near(whole.read_bytes())))
    allow(DataError, lambda: load_evaluation(file, THREE))


# ---- report.json ----


def make_tables(report: Report) -> None:
    """Make everything but the page of a report that was read."""
    to_markdown(report)
    compared = compare({"one": report})
    compared.to_csv()
    compared.to_markdown()


@quick
@given(content=bytes_near(json.dumps(REPORT).encode()))
@example(content=b"[" * 100_000)
@example(content=b'{"schema": ' + b"9" * 5000 + b"}")
@example(content=b"\xef\xbb\xbf{}")
def test_read_reports_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    allow(ReportError, lambda: read_reports([tmp_path]))


def make_from(content: Any, file: Path, make: Callable[[Report], object]) -> None:
    """Make something of a report with this content, if it is read."""
    file.write_text(json.dumps(content), encoding="utf-8")
    report = allow(ReportError, lambda: read_report(file))
    if isinstance(report, Report):
        make(report)


@quick
@given(content=changes(REPORT))
def test_tables_of_a_report_with_one_value_changed(tmp_path: Path, content: Any) -> None:
    make_from(content, tmp_path / "report.json", make_tables)


@few
@given(content=changes(REPORT))
def test_to_html_of_a_report_with_one_value_changed(tmp_path: Path, content: Any) -> None:
    make_from(content, tmp_path / "report.json", to_html)


# ---- weights ----

LEGACY_HEAD = b"".join(pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
LEGACY_TAIL = pickle.dumps([], protocol=2)
TARGET = {"weight": torch.zeros(2, 2)}


def pickle_of(command: str) -> dict[str, bytes]:
    """Return pickles that run a command or change torch, one for each instruction that could do it."""
    text = pickle.BINUNICODE + struct.pack("<I", len(command)) + command.encode()
    reduced = b"cos\nsystem\n" + text + b"\x85R"
    return {
        "reduce": b"\x80\x02" + reduced + b".",
        "by a name on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "instance": b"(" + text + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + text + b"o.",
        "new object": b"\x80\x02csubprocess\nPopen\n" + text + b"\x85\x81.",
        "eval": b"cbuiltins\neval\n" + text + b"\x85R.",
        "a dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x1fOrderedDict.__init__.__globals__\x93.",
        "attribute of an attribute": b"cbuiltins\ngetattr\n(cos\n__dict__\n" + text + b"tR(tR.",
        "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}(V__code__\nI1\nV__doc__\nI1\nutb.",
        "state of a class": b"ccollections\nOrderedDict\n(N}(V__len__\nI1\nutb.",
        "nested loading": b"ctorch.storage\n_load_from_bytes\n" + text + b"\x85R.",
        "as a tensor's subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + text + b"\x85NtR.",
        "many": b"(lp0\n(" + reduced + b"cpickle\nloads\n" + text + b"\x85Rl.",
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", pickle_of(""))
def test_read_weights_runs_nothing_and_changes_nothing(attack: str, zipped: bool, tmp_path: Path) -> None:
    trace, file = tmp_path / "executed", tmp_path / "net.pth"
    content = pickle_of(f"touch {trace}")[attack]
    if zipped:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    else:
        file.write_bytes(LEGACY_HEAD + content + LEGACY_TAIL)
    before = [dict(vars(thing)) for thing in (torch_files._tensor, torch_files.Inert, torch._utils._rebuild_tensor_v2)]
    documentation = torch_files._tensor.__doc__
    with pytest.raises(WeightsError):
        read_weights(str(file), TARGET)
    assert not trace.exists()
    after = [dict(vars(thing)) for thing in (torch_files._tensor, torch_files.Inert, torch._utils._rebuild_tensor_v2)]
    assert after == before
    assert torch_files._tensor.__doc__ == documentation
    assert not torch_files.Inert.is_module
    if attack in ("reduce", "by a name on the stack", "instance", "object"):
        pickle.loads(content)
        assert trace.exists(), "the attack must work if nothing stops it"


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a file that torch's own reader refuses."""
    file = tmp_path_factory.mktemp("checkpoint") / "net.pth"
    content = {"state_dict": {"weight": torch.ones(2, 2)}, "args": argparse.Namespace(a=np.float64(1)), "list": [1]}
    torch.save(content, file, _use_new_zipfile_serialization=request.param)
    return file.read_bytes()


@quick
@given(data=st.data())
def test_read_weights_of_any_bytes(tmp_path: Path, checkpoint: bytes, data: st.DataObject) -> None:
    (tmp_path / "net.pth").write_bytes(data.draw(bytes_near(checkpoint)))
    allow(WeightsError, lambda: read_weights(str(tmp_path / "net.pth"), TARGET))


@quick
@given(data=st.data())
def test_read_weights_of_any_pickle_in_an_archive(tmp_path: Path, checkpoint: bytes, data: st.DataObject) -> None:
    if not checkpoint.startswith(b"PK"):
        return
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as whole, zipfile.ZipFile(tmp_path / "net.pth", "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, data.draw(bytes_near(content)) if name.endswith("data.pkl") else content)
    allow(WeightsError, lambda: read_weights(str(tmp_path / "net.pth"), TARGET))


values = st.recursive(
    scalars | st.just(torch.ones(2, 2)) | st.just(torch.ones(3)),
    lambda item: (
        st.lists(item, max_size=3) | st.dictionaries(text | st.sampled_from(["weight", "ema"]), item, max_size=3)
    ),
)


@quick
@given(content=values)
def test_read_weights_of_any_content(tmp_path: Path, content: Any) -> None:
    try:
        torch.save(content, tmp_path / "net.pth")
    except UnicodeEncodeError:
        return
    allow(WeightsError, lambda: read_weights(str(tmp_path / "net.pth"), TARGET))


def test_read_weights_shows_no_control_characters(tmp_path: Path) -> None:
    file = tmp_path / "net.pth"
    torch.save({"\x1b[31m\n": TARGET, "\ud800": {"weight": torch.ones(2, 2)}}, file)
    with pytest.raises(WeightsError) as caught:
        read_weights(str(file), TARGET)
    assert str(caught.value).isprintable()
    torch.save({"\x1b[31m\n": TARGET}, file)
    assert read_weights(str(file), TARGET)[1].isprintable()


def test_read_weights_of_a_circle(tmp_path: Path) -> None:
    circle: dict[str, Any] = {"weight": torch.ones(2, 2), "list": []}
    circle["list"] += [circle, circle["list"]]
    torch.save(circle, tmp_path / "net.pth")
    state, _ = read_weights(str(tmp_path / "net.pth"), TARGET)
    assert torch.equal(state["weight"], torch.ones(2, 2))


# ---- code ----


def test_load_model_runs_a_module_only_if_its_factory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef make(): return None\n"
    (tmp_path / "net.py").write_text(source)
    for name in ("net.py", str(tmp_path / "net.py"), "net", "net:make", "net.py:", ":make", "timm:net.py", "./net"):
        allow(ModelError, functools.partial(load_model, name, device=torch.device("cpu")))
        assert not (tmp_path / "ran").exists(), name
    with pytest.raises(WeightsError):
        load_model("digits", weights="net.py", device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="made a NoneType"):
        load_model("net.py:make", device=torch.device("cpu"))
    assert (tmp_path / "ran").exists(), "it runs where it is asked for"
