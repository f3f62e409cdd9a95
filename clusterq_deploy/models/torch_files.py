"""Files of weights, read without running code from them."""

import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from clusterq_deploy.errors import WeightsError
from clusterq_deploy.models.weights import first_line, printable

_MAGIC = 0x1950A86A20F9469CFC6C
"""The number that a torch file from before torch 1.6 starts with."""
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_ONLY_TENSORS = (
    "but only tensors are read; save the state_dict as safetensors, or with torch.save(model.state_dict(), FILE)"
)
_AGAIN = "download or copy it again"
_HEADS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself; get it with git lfs pull",
    b"<": f"is a web page; {_AGAIN}",
    b"\x89HDF": "is an HDF5 file; save the weights of a torch model with torch.save(model.state_dict(), FILE)",
}
"""What files start with that are often found where weights should be, and what to do."""


class Inert:
    """An object of a file that is neither a tensor nor plain data: it has been replaced by this, and does nothing.

    Attributes:
        kind: the class or function that the file asks for, such as `argparse.Namespace`.
        is_module: whether it was an `nn.Module`.
    """

    kind = ""
    is_module = False

    def __init__(self, *_: object, **__: object) -> None:
        """Ignore what it would have been made of."""

    def __call__(self, *_: object, **__: object) -> "Inert":
        """Return itself for whatever a call would have returned."""
        return self

    def __setitem__(self, key: object, value: object) -> None:
        """Ignore an item of a dictionary."""

    def append(self, item: object) -> None:
        """Ignore an item of a list or set."""

    extend = add = update = append


def read_file(path: Path) -> tuple[object, list[str]]:
    """Read the tensors and plain data of a .safetensors or torch file onto the CPU.

    Returns:
        Its content, in which every other object is `Inert`, and the names of what was replaced.

    Raises:
        WeightsError: the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weights file {str(path)!r}; expected a .safetensors or a torch file")
    with path.open("rb") as file:
        head = file.read(64)
    for start, reason in _HEADS.items():
        if head.lstrip().startswith(start):
            raise WeightsError(f"cannot read the weights in {str(path)!r}: it {reason}")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise WeightsError(f"cannot read the weights in {str(path)!r}: its end is missing; {_AGAIN}")
    try:
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            return load_file(path), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol of a pickle, which torch then refuses
            return torch.load(path, map_location="cpu", weights_only=True), []
    except pickle.UnpicklingError:
        return _read_other(path)
    except Exception as error:  # damage shows wherever the parser meets it
        problem, advice = f" ({first_line(error)})", "expected a .safetensors or a torch file"
        if "TorchScript" in str(error):
            problem, advice = ": it is a TorchScript file", "save torch.jit.load(FILE).state_dict() with torch.save"
        raise WeightsError(f"cannot read the weights in {str(path)!r}{problem}; {advice}") from error


def _read_other(path: Path) -> tuple[object, list[str]]:
    """Read a torch file whose pickle asks for more than torch allows with `weights_only`."""
    skipped: dict[str, None] = {}
    try:
        return (_read_zip if zipfile.is_zipfile(path) else _read_legacy)(path, skipped), list(skipped)
    except Exception as error:
        what = f"its pickle asks for {', '.join(skipped)}" if skipped else "it is not a plain torch file"
        raise WeightsError(f"refused to load {str(path)!r}: {what}, {_ONLY_TENSORS}") from error


def refusal(path: Path, inert: Inert) -> WeightsError:
    """Return the error of a file whose weights are in an object that is not read."""
    if inert.is_module:
        return WeightsError(
            f"refused to load {str(path)!r}: it holds a whole model, {inert.kind}, and no code of a file is run "
            "here; where it loads, save its weights with torch.save(model.state_dict(), FILE)"
        )
    return WeightsError(f"refused to load {str(path)!r}: its pickle asks for {inert.kind}, {_ONLY_TENSORS}")


class _Reader(pickle._Unpickler):
    """Unpickles tensors and plain data; every class and function of the file becomes one of ours or `Inert`.

    Python's own unpickler is used, not the one in C, because its instructions can be replaced: none sets attributes.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, file: IO[bytes], storage: Callable[..., object], skipped: dict[str, None]) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self._storage, self._skipped = storage, skipped

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function; nothing is imported."""
        path = f"{module}.{name}"
        if path in _REBUILDERS:
            return _REBUILDERS[path]
        if module.startswith("torch") and name.removesuffix("Storage") in _STORAGES:
            return _STORAGES[name.removesuffix("Storage")]
        kind = printable(path)
        self._skipped[kind] = None
        return type("Inert", (Inert,), {"kind": kind})

    def persistent_load(self, pid: Any) -> object:
        """Return the storage of a tensor, one-dimensional; or the class of a module, which old files store likewise."""
        return pid[1] if pid[0] == "module" else self._storage(*pid)

    def load_build(self) -> None:
        """Drop the state of an object, instead of setting its attributes."""
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, Inert) and isinstance(state, dict) and "_parameters" in state:
            value.is_module = True

    dispatch[pickle.BUILD[0]] = load_build


def _tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    return storage.as_strided(size, stride, offset) if isinstance(storage, Tensor) else Inert()


def _first(value: object, *_: object) -> object:
    return value


def _subclass(rebuild: Callable[..., object], _: object, arguments: tuple[Any, ...], *__: object) -> object:
    return rebuild(*arguments)


_REBUILDERS: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}


def _read_zip(path: Path, skipped: dict[str, None]) -> object:
    """Read an archive as `torch.save` writes it: a pickle, and one uncompressed file for each storage."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")

        def content(name: str) -> bytes:
            if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            return archive.read(name)

        @cache
        def storage_bytes(key: str) -> Tensor:
            data = bytearray(content(f"{folder}data/{key}"))
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

        def storage(_: object, dtype: object, key: str, *__: object) -> object:
            return storage_bytes(key).view(dtype) if isinstance(dtype, torch.dtype) else Inert()

        if f"{folder}byteorder" in archive.namelist() and content(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(pickled) as file:
            return _Reader(file, storage, skipped).load()


def _read_legacy(path: Path, skipped: dict[str, None]) -> object:
    """Read a file as torch wrote it before 1.6: five pickles, and then the storages in the order of the last one."""
    size, storages = path.stat().st_size, dict[str, Tensor]()

    def storage(_: object, dtype: torch.dtype, key: str, __: object, count: int, view: Any = None) -> Tensor:
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"storage {key} is larger than the file")
        if key not in storages:
            storages[key] = torch.zeros(count * dtype.itemsize, dtype=torch.uint8)
        whole = storages[key].view(dtype)
        return whole if view is None else whole[view[1] : view[1] + view[2]]

    with path.open("rb") as file:

        def load() -> Any:
            return _Reader(file, storage, skipped).load()

        if load() != _MAGIC:
            raise ValueError("it is no torch file")
        load(), load()  # the version of the format, the sizes of C's integers
        content = load()
        for key in load():
            file.seek(8, os.SEEK_CUR)  # the length, which the tensors have named
            data = storages[key].numpy().data
            if file.readinto(data) != len(data):
                raise ValueError(f"storage {key} is cut off")
        return content
