"""The classes that folders and rows of labels.csv name: by class names, numbers and synsets, and files passed over."""

import importlib.util
from pathlib import Path

import pytest
from test_data import contents, failure, paint

from clusterq_deploy.errors import DataError
from clusterq_deploy.evaluation.data import load_evaluation
from clusterq_deploy.evaluation.labels import classes_of_folders
from clusterq_deploy.models import InputSpec, LoadedModel
from clusterq_deploy.models.registry import imagenet_names, imagenet_synsets
from clusterq_deploy.stages.evaluate import Graph

SPEC = InputSpec(size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
NAMES = ("yak", "great white shark, white shark", "apple pie")
NAMED = Graph("named", "file", SPEC, 3, NAMES)


def read_folders(folders: list[str], classes: int, names: tuple[str, ...] = ()) -> tuple[dict[str, int], str]:
    """Return the class of each folder, and the note on them."""
    ordered = sorted(folders)
    numbers, note = classes_of_folders(ordered, classes, names)
    return dict(zip(ordered, numbers, strict=True)), note or ""


def test_folders_of_class_names_are_matched_in_any_spelling() -> None:
    folders = ["Apple_Pie", "white shark", "yak"]
    assert read_folders(folders, 3, NAMES) == ({"Apple_Pie": 2, "white shark": 1, "yak": 0}, "")
    numbers, note = read_folders(folders[1:], 3, NAMES)
    assert numbers == {"white shark": 1, "yak": 0}
    assert note == "1 of the model's 3 classes have no folder: apple pie"
    assert read_folders(["1", "2"], 3, ("3", "2", "1"))[0] == {"1": 2, "2": 1}


def test_folders_of_numbers_are_classes_unless_they_count_to_the_number_of_classes() -> None:
    assert read_folders(["0", "2", "10"], 12) == ({"0": 0, "10": 10, "2": 2}, "")
    assert read_folders(["2", "3", "11"], 12)[0] == {"11": 11, "2": 2, "3": 3}
    for folders in ([str(n) for n in range(1, 13)], [f"{n:02}" for n in range(1, 13)], ["3", "12"]):
        numbers, note = read_folders(folders, 12)
        assert numbers == {folder: int(folder) - 1 for folder in folders}
        assert "1..12 are read as classes 0..11" in note
    numbers, note = read_folders([str(n) for n in range(1, 12)], 12)
    assert numbers == {str(n): n for n in range(1, 12)}
    assert "if they count from 1, add an empty folder 12" in note


@pytest.mark.parametrize("pattern", ["class_{}", "{} a thing", "{:03}.Bird", "{}-x"])
@pytest.mark.parametrize("first", [0, 1])
def test_folders_with_all_numbers_in_their_names_are_numbered_by_them(pattern: str, first: int) -> None:
    folders = {pattern.format(n + first): n for n in range(12)}
    numbers, note = read_folders(list(folders), 12)
    assert numbers == folders
    assert "by the number in their names" in note


def test_folders_of_synsets_have_imagenets_order() -> None:
    synsets = imagenet_synsets()
    assert (len(synsets), synsets) == (1000, sorted(set(synsets)))
    assert read_folders(synsets, 1000) == ({synset: n for n, synset in enumerate(synsets)}, "")
    assert read_folders(["n02102040", "n01440764"], 1000) == ({"n01440764": 0, "n02102040": 217}, "")
    assert imagenet_names()[217] == "English springer"
    assert read_folders(["n02102040", "n01440764"], 2, ("English springer", "tench"))[0]["n01440764"] == 1
    assert read_folders(["n02102040", "n01440764"], 2)[0]["n01440764"] == 0


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_synsets_are_those_of_timm() -> None:
    from timm.data import ImageNetInfo

    assert ImageNetInfo("imagenet-1k").label_names() == imagenet_synsets()


def test_other_folders_are_sorted_and_said_or_refused() -> None:
    assert "in the sorted order of their names: a = 0, b = 1, c = 2" in read_folders(["a", "b", "c"], 3)[1]
    assert "a, b, c are not class names" in read_folders(["yak", "a", "b", "c"], 4, ("x", "y", "z", "yak"))[1]
    for folders, message in (
        (["a", "b"], "has 2 class folders, but the model has 3 classes; expected one folder per class"),
        (["yakk", "white shark", "apple pie"], r"not one of the model's class names: yakk \(near: yak\)"),
        (["train", "val", "test"], "parts of a data set and not classes"),
        (["-1", "0"], "has 2 class folders"),
    ):
        with pytest.raises(DataError, match=message):
            read_folders(folders, 3, NAMES)


def test_load_evaluation_counts_files_that_it_passes_over(
    tmp_path: Path, colour: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    paint(tmp_path / "0" / "a.png", 1)
    for name in ("0/b.jfif", "0/deep/c.jfif", "2/d", "e.png", "0/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    data = load_evaluation(tmp_path, colour)
    assert len(data) == 1
    (note,) = data.notes
    assert note.startswith("4 files were passed over: 2 with .jfif, 1 with")
    assert caplog.messages == [f"{tmp_path.name}: {note}"]
    (tmp_path / "0" / "a.png").unlink()
    assert "no images were found" in failure(tmp_path, colour)
    assert "2 with .jfif" in failure(tmp_path, colour)


def test_label_digest_is_of_labels_that_were_read_otherwise_before(tmp_path: Path) -> None:
    for name, folders, before in (
        ("numbers", [str(n) for n in range(12)], True),
        ("padded", [f"{n:02}" for n in range(1, 13)], True),
        ("from one", [str(n) for n in range(1, 13)], False),
        ("sorted", list("abcdefghijkl"), True),
        ("named", list("mlkjihgfedcb"), False),
    ):
        for folder in folders:
            paint(tmp_path / name / folder / "x.png", 0)
        names = tuple("mlkjihgfedcb") if name == "named" else ()
        data = load_evaluation(tmp_path / name, Graph("twelve", "file", SPEC, 12, names))
        assert (data.label_digest is None) == before, name


@pytest.mark.parametrize(
    ("table", "labels"),
    [
        ("file,label\na.png,2.0\nb.png,0.0\n", [2, 0]),
        ("id,label\na,2\nb,0\n", [2, 0]),
        ("a,2\nb,0\n", [2, 0]),
        ("index,file,label\n0,a.png,2\n1,b.png,0\n", [2, 0]),
        (",file_name,Class ID,note\n0,a.png,2,x\n1,b.png,0,y\n", [2, 0]),
        ("label,image\n2,a.png\n0,b.png\n", [2, 0]),
        ("file;label\na.png;2\nb.png;0\n", [2, 0]),
        ("a.png\t2\nb.png\t0\n", [2, 0]),
        ("file,label\na.png,1\nb.png,3\n", [0, 2]),
        ("file,label\na.png,Apple Pie\nb.png,yak\n", [2, 0]),
        ("a.png,what it shows,apple pie\nb.png,nothing,yak\n", [2, 0]),
    ],
)
def test_load_evaluation_reads_tables_of_many_forms(tmp_path: Path, table: str, labels: list[int]) -> None:
    paint(tmp_path / "a.png", 1)
    paint(tmp_path / "images" / "b.png", 2)
    (tmp_path / "labels.csv").write_text(table)
    assert contents(load_evaluation(tmp_path, NAMED)) == ([1, 2], labels)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\na.png,yakk\n", "row 2 is 'a.png,yakk'; expected file,label with a whole number"),
        ("file,label\na.png,\n", "row 2 is 'a.png,'"),
        ("file,label\na.png,1.5\nb.png,1\n", "such as 'cat/001.png,3'"),
        ("a.png,1,2\nb.png,0,1\n", "row 1 is 'a.png,1,2'"),
        ("file,label\nc,1\n", "names 'c', but there is no such file"),
        ("file,label\n", "no images were found"),
    ],
)
def test_load_evaluation_refuses_tables_with_an_example(tmp_path: Path, table: str, message: str) -> None:
    for name in ("a.png", "b.png", "c.png", "c.jpg"):
        paint(tmp_path / name, 0)
    (tmp_path / "labels.csv").write_text(table)
    assert message in failure(tmp_path, NAMED)


def test_load_evaluation_names_the_folder_that_has_the_class_folders(tmp_path: Path, colour: LoadedModel) -> None:
    for number in "012":
        paint(tmp_path / "val" / number / "x.png", 0)
    (tmp_path / "train" / "0").mkdir(parents=True)
    assert f"the class folders seem to be in {str(tmp_path / 'val')!r}" in failure(tmp_path, colour)
