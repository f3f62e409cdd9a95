"""A torchvision classifier as an INT8 graph, and that graph by itself in ONNX Runtime.

    python examples/torchvision_int8.py PHOTO --model resnet18

`make_graph` needs this project, and no data. The functions below it need only numpy, Pillow and ONNX Runtime: they are
all that a service with this model needs.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from PIL import Image

Spec = dict[str, Any]


def make_graph(model: str, out: Path, **settings: Any) -> Path:
    """Quantize a model to INT8 in the run directory `out`. Return the graph for ONNX Runtime.

    `settings` are those of a run.toml, on top of `effort = "fast"`: nothing is fine-tuned, INT8 rarely needs it.
    """
    from clusterq_deploy import Pipeline, RunConfig

    config = RunConfig.model_validate({"model": model, "bits": ["w8a8"], "effort": "fast", **settings})
    pipeline = Pipeline(config, out)
    pipeline.write_config()
    pipeline.synthesize()
    for bits in config.widths:
        pipeline.quantize(bits)
    pipeline.export("w8a8")
    return out / "w8a8/model.ort.onnx"


def open_graph(graph: Path, threads: int = 0) -> tuple[onnxruntime.InferenceSession, Spec]:
    """Open a session, and read from the graph's metadata how its input is made; 0 threads is one per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return session, json.loads(session.get_modelmeta().custom_metadata_map["clusterq.input"])


def preprocess(image: Image.Image, spec: Spec) -> np.ndarray:
    """Return an image of any size as (channels, height, width) float32, normalized."""
    channels, height, width = spec["size"]
    image = image.convert("L" if channels == 1 else "RGB")
    enlargement = (spec["resize"] or min(height, width)) / min(image.size)
    size = (max(width, int(image.width * enlargement)), max(height, int(image.height * enlargement)))
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    image = image.resize(size, filters[spec["interpolation"]])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / np.float32(255)
    normalized = (pixels.reshape(height, width, channels) - np.float32(spec["mean"])) / np.float32(spec["std"])
    return normalized.transpose(2, 0, 1)


def classify(session: onnxruntime.InferenceSession, images: np.ndarray, best: int = 5) -> list[list[tuple[int, float]]]:
    """Return the likeliest classes of each image (N, channels, height, width), with their probabilities."""
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :best]
    return [[(int(c), float(row[c])) for c in likeliest] for likeliest, row in zip(order, probabilities, strict=True)]


@click.command(help=__doc__.splitlines()[0])
@click.argument("photo", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", default="resnet18", show_default=True, help="A torchvision classifier with BatchNorm.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/example"), show_default=True)
def main(photo: Path, model: str, out: Path) -> None:
    from torchvision.models import get_model_weights

    session, spec = open_graph(make_graph(model, out))
    names = get_model_weights(model).DEFAULT.meta["categories"]
    for label, probability in classify(session, preprocess(Image.open(photo), spec)[None])[0]:
        print(f"{100 * probability:5.1f} %  {names[label]}")


if __name__ == "__main__":
    main()
