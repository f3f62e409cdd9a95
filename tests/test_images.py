"""Images of evaluation data that cannot be read, or have odd modes: converted, or left out, counted and named."""

import io
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import json_of, output_of, small_config
from test_data import contents, failure, paint

from calib.support.progress import SILENT
from clusterq_deploy.errors import DataError, UnreadableImageError
from clusterq_deploy.evaluation.accuracy import predictions, score
from clusterq_deploy.evaluation.data import load_evaluation
from clusterq_deploy.evaluation.images import read_image
from clusterq_deploy.models import InputSpec, LoadedModel
from clusterq_deploy.pipeline import Pipeline
from clusterq_deploy.report import read_report
from clusterq_deploy.runtimes.runners import TorchRunner

RGB = InputSpec(size=(3, 4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
GREY = InputSpec(size=(1, 4, 4), mean=(0.0,), std=(1.0,))


def encoded(form: str, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a file of noise, which no format compresses."""
    stream, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(stream, form)
    return stream.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Return a whole and valid PNG of black pixels, small on disk."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "text.png": (b"not an image", "not an image of these formats"),
    "empty.jpg": (b"", "not an image of these formats"),
    "header.png": (encoded("PNG")[:60], "OSError"),
    "cut.png": (encoded("PNG")[:-4000], "truncated"),
    "cut.jpg": (encoded("JPEG")[:-800], "truncated"),
    "cut.bmp": (encoded("BMP")[:-800], "truncated"),
    "cut.tif": (encoded("TIFF")[:-4000], ""),
    "cut.webp": (encoded("WEBP")[:-800], ""),
    "warned.png": (huge_png(10_000, 9_000), "decompression bomb"),  # Pillow only warns of it
    "refused.png": (huge_png(20_000, 9_000), "decompression bomb"),
    "ghostscript.png": (encoded("EPS"), "not an image of these formats"),
    "thread.png": (huge_png(1, 12_000), "would be resized to"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_read_image_says_why_it_cannot_in_one_line(tmp_path: Path, name: str) -> None:
    content, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    spec = InputSpec(size=(3, 224, 224), mean=(0.0,) * 3, std=(1.0,) * 3, resize=256)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(tmp_path / name, f"0/{name}", spec)
    assert caught.value.file == f"0/{name}"
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_read_image_leaves_the_filter_of_warnings_unchanged(tmp_path: Path) -> None:
    (tmp_path / "warned.png").write_bytes(huge_png(10_000, 9_000))
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(tmp_path / "warned.png", "warned.png", RGB)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(tmp_path / "warned.png").close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.timeout(20)
def test_read_image_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImageError, match="not a plain file"):
        read_image(tmp_path / "pipe.png", "pipe.png", RGB)
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_image(tmp_path / "absent.png", "absent.png", RGB)


# ---- modes ----


def shades(mode: str) -> Image.Image:
    """Return an image whose left half is black and right half white, in a mode."""
    half = Image.fromarray(np.array([[0, 0, 255, 255]] * 4, np.uint8))
    return half.convert("RGB").convert(mode) if mode in ("CMYK", "P") else half.convert(mode)


@pytest.mark.parametrize("spec", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "gif"), ("P", "png"), ("RGBA", "png"), ("CMYK", "tif")],
)
def test_read_image_converts_modes_of_known_range(tmp_path: Path, spec: InputSpec, mode: str, suffix: str) -> None:
    file = tmp_path / f"x.{suffix}"
    shades(mode).save(file)
    assert np.rint(read_image(file, "x", spec)[0]).tolist() == [[0, 0, 1, 1]] * 4


@pytest.mark.parametrize("spec", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_read_image_scales_sixteen_bits_without_clipping(tmp_path: Path, spec: InputSpec, suffix: str) -> None:
    levels = np.array([[0, 257, 32768, 65535]] * 4, np.uint16)
    Image.fromarray(levels).save(tmp_path / f"x.{suffix}")
    pixels = np.rint(read_image(tmp_path / f"x.{suffix}", "x", spec) * 255)
    assert pixels[0, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_read_image_refuses_pixels_of_unknown_range(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32).astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImageError, match="no known range"):
        read_image(tmp_path / "x.tif", "x.tif", RGB)


# ---- counted and named, up to a limit ----


def spoil(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded("PNG")[:-4000])


def paint_many(folder: Path, count: int, spoilt: tuple[int, ...] = (), classes: int = 1) -> None:
    """Write images 000.png and so on of their number's grey value to class folders, those in `spoilt` truncated."""
    for number in range(count):
        file = folder / str(number % classes) / f"{number:03}.png"
        if number in spoilt:
            spoil(file)
        else:
            paint(file, number % 256)


def test_batches_leave_out_unreadable_images_with_their_labels(
    tmp_path: Path, colour: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    paint_many(tmp_path, 200, spoilt=(3, 100), classes=3)
    data = load_evaluation(tmp_path, colour)
    names = sorted(f"{value % 3}/{value:03}" for value in range(200) if value not in (3, 100))
    expected = [int(name[2:]) for name in names], [int(name[0]) for name in names]
    with caplog.at_level(logging.WARNING):
        assert contents(data, batch_size=7) == expected
        assert contents(data, batch_size=200) == expected
    assert (len(data), len(data.readable), len(data.unreadable)) == (200, 198, 2)
    assert data.labels[data.readable].tolist() == expected[1]
    (message,) = caplog.messages
    assert "2 of the 200 images" in message
    assert "0/003.png (OSError: image file is truncated" in message
    assert data.unreadable.summary()["count"] == 2
    assert [file["file"] for file in data.unreadable.summary()["files"]] == ["0/003.png", "1/100.png"]


def test_batches_end_with_more_than_one_unreadable_image_in_a_hundred(tmp_path: Path, colour: LoadedModel) -> None:
    paint_many(tmp_path, 200, spoilt=(5, 6, 7))
    message = failure(tmp_path, colour)
    assert "more than 2 of the 200 images" in message
    assert all(f"0/{name}.png" in message for name in ("005", "006", "007"))


@pytest.mark.parametrize(("total", "spoilt", "fits"), [(2, 1, True), (4, 2, False), (1, 1, False), (99, 1, True)])
def test_batches_of_a_small_set_may_lose_one_image_but_not_all(
    tmp_path: Path, colour: LoadedModel, total: int, spoilt: int, fits: bool
) -> None:
    paint_many(tmp_path, total, spoilt=tuple(range(spoilt)))
    if fits:
        assert len(contents(load_evaluation(tmp_path, colour))[0]) == total - spoilt
    else:
        assert "cannot be read" in failure(tmp_path, colour)


def test_unreadable_logs_the_first_names_and_a_count(
    tmp_path: Path, colour: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    paint_many(tmp_path, 700, spoilt=tuple(range(7)))
    data = load_evaluation(tmp_path, colour)
    list(data.batches(50))
    assert caplog.messages[0].endswith("; 2 more")
    assert "0/004.png" in caplog.messages[0]
    assert "0/005.png" not in caplog.messages[0]
    assert len(data.unreadable.summary()["files"]) == 5


def test_subset_shares_the_limit_of_the_whole_set(tmp_path: Path, colour: LoadedModel) -> None:
    paint_many(tmp_path, 300, spoilt=(0, 1))
    data = load_evaluation(tmp_path, colour)
    part = data.subset(np.array([4, 1, 2, 0]))
    assert contents(part) == ([4, 2], [0, 0])
    assert part.readable.tolist() == [0, 2]
    assert len(data.readable) == 298  # what the part found, the whole set knows


def test_score_counts_what_was_read(tmp_path: Path, colour: LoadedModel) -> None:
    for value in range(4):
        paint(tmp_path / str(value % 3) / f"{value}.png", 60 * value)
    data = load_evaluation(tmp_path, colour)
    with TorchRunner(colour.module) as runner:
        every = predictions(runner, data, 2)
        spoil(tmp_path / "0" / "3.png")  # the second file of four
        again = load_evaluation(tmp_path, colour)
        readable = predictions(runner, again, 2, SILENT)
    np.testing.assert_array_equal(readable, every[[0, 2, 3]])
    right = 100 * float((every[[0, 2, 3], 0] == data.labels[[0, 2, 3]]).mean())
    assert score("torch", readable, readable, again).top1 == pytest.approx(right)
    with pytest.raises(DataError, match="do not fit"):
        score("torch", readable, every, again)


def test_unreadable_escapes_a_name_that_does_not_print(tmp_path: Path, colour: LoadedModel) -> None:
    paint(tmp_path / "0" / "a.png", 1)
    try:
        spoil(tmp_path / "0" / os.fsdecode(b"\x1b[31m\n\xff.png"))
    except OSError:
        pytest.skip("the file system takes no such name")
    data = load_evaluation(tmp_path, colour)
    list(data.batches(2))
    (entry,) = data.unreadable.summary()["files"]
    assert entry["file"] == r"0/\x1b[31m\n\udcff.png"
    json.dumps(entry, ensure_ascii=False).encode()


def test_load_evaluation_refuses_an_npz_of_images_that_cannot_be_resized(tmp_path: Path, colour: LoadedModel) -> None:
    file = tmp_path / "set.npz"
    np.savez(file, images=np.zeros((2, 6_000_000, 1, 3), np.uint8), labels=np.zeros(2, int))
    assert "would be resized" in failure(file, colour)


# ---- through a run ----


@pytest.mark.slow
def test_run_reports_what_it_could_not_read(tmp_path: Path) -> None:
    for value in range(20):
        paint(tmp_path / "data" / str(value % 10) / f"{value:02}.png", 10 * value, (8, 8))
    spoil(tmp_path / "data" / "7" / "17.png")
    report = Pipeline(small_config(data=str(tmp_path / "data"), bits=["w8a8"]), tmp_path / "out").run()
    assert (report.evaluation.images, report.evaluation.unreadable) == (19, 1)
    (note,) = report.evaluation.unreadable_files
    assert note.file == "7/17.png"
    assert "truncated" in note.reason
    assert read_report(tmp_path / "out/report.json") == report
    for accuracy in (accuracy for variant in report.variants for accuracy in variant.accuracy):
        assert accuracy.top1 * 19 / 100 == pytest.approx(round(accuracy.top1 * 19 / 100))  # a share of 19 images
    for page in ("report.md", "report.html"):
        assert "1 of 20 images of data could not be read and are not counted: 7/17.png" in (
            tmp_path / "out" / page
        ).read_text(encoding="utf-8")
    reported = output_of("report", tmp_path / "out")  # its stages are finished: nothing is read
    assert "1 of 20 images of data could not be read" in " ".join(reported.split())
    (row,) = json_of("evaluate", tmp_path / "out/fp32/model.onnx", "--data", tmp_path / "data")
    assert (row["images"], row["unreadable"]) == (19, 1)
