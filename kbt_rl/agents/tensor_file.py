"""A safetensors file of ours: numbers and a JSON header that states their SHA-256, so that reading one runs no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kbt_rl.arguments import shown


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        name: What the header calls it.
        version: Raised by one when a file can no longer be read as before.
        stated: Entries of the header that its digest covers, beside the tensors.
    """

    name: str
    version: int
    stated: tuple[str, ...]

    def digest(self, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
        """SHA-256 over what the header states, and the name, shape, dtype and bytes of each tensor."""
        layout = sorted((name, list(value.shape), str(value.dtype)) for name, value in tensors.items())
        stated = [header[name] for name in ("format_version", *self.stated)]
        found = hashlib.sha256(json.dumps([stated, layout]).encode())
        for name, *_ in layout:
            array: Any = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(array)
        return found.hexdigest()

    def content(self, stated: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
        """The bytes of a file.

        Raises:
            ImportError: The package safetensors is missing.
        """
        header = {"format": self.name, "format_version": str(self.version), **stated}
        whole: bytes = library().save(dict(tensors), header | {"sha256": self.digest(header, tensors)})
        return whole

    def read(self, content: bytes, name: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Header and tensors of a file that is whole.

        Raises:
            ValueError: It is not, or something else; the message says what.
            ImportError: The package safetensors is missing.
        """
        loader = library()
        from safetensors import SafetensorError

        try:
            tensors = loader.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        except (SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype that PyTorch lacks
            raise ValueError(f"{name} is truncated or no safetensors file: {error}") from error
        missing = {"format", "format_version", "sha256", *self.stated} - header.keys()
        if header.get("format") != self.name or missing & {"format", "format_version"}:
            raise ValueError(
                f"{name} is a safetensors file but no {self.name.replace('kbt_rl ', '')} of kbt_rl: its "
                f"header lacks {sorted(missing)}"
            )
        if header["format_version"] != str(self.version):
            raise ValueError(
                f"{name} has format version {header['format_version']}; this version of kbt_rl reads {self.version}"
            )
        if missing or self.digest(header, tensors) != header["sha256"]:
            raise ValueError(f"{name} is damaged: its content has not the SHA-256 that its header states")
        return header, tensors


def library() -> ModuleType:
    """The package safetensors.

    Raises:
        ImportError: It is missing.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('safetensors files need an extra: pip install "kbt_rl[export]"') from error
    module: ModuleType = safetensors.torch
    return module


def with_suffix(path: str | Path) -> Path:
    """The path of a file that is to be written.

    Raises:
        TypeError: It is no path.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path is {shown(path)}; expected a path")
    return Path(path) if Path(path).suffix else Path(f"{path}.safetensors")


def existing(path: str | Path, writer: str) -> Path:
    """The file that a path means, with or without the suffix.

    Raises:
        FileNotFoundError: There is none; the message says that ``writer`` writes one.
    """
    full = with_suffix(path)
    candidates = dict.fromkeys((Path(path), full))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no file {' or '.join(map(str, candidates))}; {writer} writes one")
