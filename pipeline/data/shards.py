"""Shards of the webdataset format: `wds/FOLDER`, tar files in which members of one base name are one sample.

A tar file is walked from header to header; of a sample that is not wanted nothing else is read. The library
`webdataset` is not needed: the format is tar's. timm's reader of it passes over what it cannot read, labels below 0 and
damaged shards with a warning, and in training cuts each process off at its share of the count.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.classes import read_lines, spelled
from lowpass.pipeline.data.folders import TEST_NAMES, TRAIN_NAMES
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.data.pictures import EXTENSIONS

INFO_FILES = ("_info.json", "info.json")  # timm's description: splits, files, samples in each
NAMES_FILE = "classnames.txt"  # a name a line, by class number
CLASS = "cls"  # the member that holds the class number
SHOWN = 6  # members that a message names
META = re.compile(r"__[^/]*__($|/)")  # members that are no samples
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # base name and extension, which begins at the first dot


@dataclass(frozen=True)
class Member:
    """Where a member's content lies in its shard, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardSample:
    """A sample of a shard: its picture, and what holds its class; a `field` of that where it is JSON."""

    shard: Path
    key: str
    picture: Member
    label: Member
    field: str | None

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        return f"{self.shard}: {self.key}"

    def read(self) -> tuple[bytes, int]:
        """The picture's file and the class number.

        Raises:
            InputError: the class is no number.
        """
        with self.shard.open("rb") as file:
            picture, label = (_content(file, member) for member in (self.picture, self.label))
        try:
            value = label.decode() if self.field is None else json.loads(label)[self.field]
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return picture, int(value)
        except (ValueError, KeyError, TypeError):
            text = label[:40].decode(errors="backslashreplace")
            said = (text if text.isprintable() and text else repr(text)) if self.field is None else ""
            said = said or f"the JSON field {self.field!r}"
            raise InputError(f"{self.name} has no class number: {said}; name what holds it with --target-key") from None


def _content(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


@dataclass(frozen=True)
class Shards:
    """One split: its tar files, and the samples that its description says each has (None: nobody says)."""

    name: str
    files: tuple[Path, ...]
    said: tuple[int, ...] | None
    input_key: str | None
    target_key: str | None

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Samples in each shard: as its description says, or counted, from header to header."""
        if self.said is not None:
            return self.said
        return tuple(sum(1 for _ in _grouped(file)) for file in track(self.files, f"counting {self.name}"))

    def samples(self, shard: int) -> Iterator[ShardSample]:
        """Those of one shard, in the order in which they lie.

        Raises:
            InputError: the file is missing or damaged, lacks a picture or a class, or has not as many as it should.
        """
        count, file = 0, self.files[shard]
        for key, members in _grouped(file):
            yield self._sample(file, key, members)
            count += 1
        if count != self.lengths[shard]:
            raise InputError(
                f"{file} holds {count} samples, but should hold {self.lengths[shard]}; copy it anew, or mend the "
                "description beside it"
            )

    def _sample(self, file: Path, key: str, members: dict[str, Member]) -> ShardSample:
        picture = _picture(members, self.input_key)
        if picture is None:
            raise InputError(
                f"{file}: {key} has no single picture but {_some(members)}; name its extension with --input-key (a "
                "sample's name ends at the first dot)"
            )
        wanted = self.target_key or CLASS
        label, field = (wanted, None) if wanted in members or self.target_key is None else ("json", wanted)
        if label not in members:
            raise InputError(
                f"{file}: {key} has no class: no .{wanted} among {_some(members)}; name what holds it, an "
                "extension or a field of .json, with --target-key"
            )
        return ShardSample(file, key, members[picture], members[label], field)


def _some(members: dict[str, Member]) -> str:
    return ", ".join(list(members)[:SHOWN]) + (" and so on" if len(members) > SHOWN else "")


def _picture(members: dict[str, Member], asked: str | None) -> str | None:
    """The extension of a sample's picture: the first there is of those asked for (`jpg;png`), or the only one."""
    if asked is not None:
        return next((name for name in asked.split(";") if name in members), None)
    found = [name for name in members if f".{name}" in EXTENSIONS]
    return found[0] if len(found) == 1 else None


def _grouped(file: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar file: base name, and members by extension, in lower case."""
    key, members = "", dict[str, Member]()
    for header in _headers(file):
        named = MEMBER.fullmatch(header.name)
        if not header.isreg() or META.match(header.name) or named is None:
            continue
        base, extension = named.group(1), named.group(2).lower()
        if base != key and members:
            yield key, members
            members = {}
        key = base
        if extension in members:
            raise InputError(f"{file} holds {header.name} twice")
        members[extension] = Member(header.offset_data, header.size)
    if members:
        yield key, members


def _headers(file: Path) -> Iterator[tarfile.TarInfo]:
    """Every header of a tar file, of which one is held at a time.

    Raises:
        InputError: it is missing, no tar file, or cut off, which `tarfile` takes for its end.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                yield header
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("it is cut off or damaged")
    except OSError as error:
        raise InputError(f"cannot read the shard {file}: {error.strerror}") from None
    except tarfile.TarError as error:
        raise InputError(f"cannot read the shard {file}: {error}; copy it anew") from None


def read_shards(spec: str, options: DataOptions) -> tuple[Shards, Shards, tuple[str, ...] | None]:
    """The shards to train and to test on, and the names of their classes by number, if anybody says.

    Raises:
        InputError: there is no such folder, or its splits are not understood.
    """
    root = Path(spec.partition("/")[2])
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; --data wds/FOLDER takes a folder of tar files")
    info = _info(root)
    splits = _described(root, info) if "splits" in info else _by_name(root)
    parts = []
    for what, names in (("train", TRAIN_NAMES), ("test", TEST_NAMES)):
        name = next((name for name in names if name in splits), None)
        if name is None:
            raise InputError(
                f"{spec} has no shards to {what} on: its splits are {', '.join(splits) or 'none'}, and one should be "
                f"called {' or '.join(names)} (in {INFO_FILES[0]}, as a folder, or within the names of the tar files)"
            )
        files, said = splits[name]
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"there is no shard {missing[0]}, which {INFO_FILES[0]} lists; copy it, or mend the list")
        parts.append(Shards(f"{spec} ({name})", files, said, options.input_key, options.target_key))
    return parts[0], parts[1], _class_names(root, info)


Splits = dict[str, tuple[tuple[Path, ...], tuple[int, ...] | None]]


def _info(root: Path) -> dict[str, Any]:
    path = next((root / name for name in INFO_FILES if (root / name).is_file()), None)
    if path is None:
        return {}
    try:
        info = json.loads(path.read_bytes())
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise InputError(f"{path} is no JSON object; mend or remove it")
    return info


def _described(root: Path, info: dict[str, Any]) -> Splits:
    """The splits of timm's description."""
    try:
        return {
            name.lower(): (
                tuple(root / str(file) for file in split["filenames"]),
                tuple(map(int, lengths)) if _fit(lengths := split.get("shard_lengths"), split["filenames"]) else None,
            )
            for name, split in info["splits"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{root / INFO_FILES[0]} describes splits otherwise than timm does (filenames, shard_lengths); mend or "
            "remove it"
        ) from None


def _fit(lengths: Any, files: Sequence[Any]) -> bool:
    return lengths is not None and len(lengths) == len(files)


def _by_name(root: Path) -> Splits:
    """The splits of folders or files that are called like splits."""
    found: dict[str, list[Path]] = {}
    for file in sorted([*root.glob("*.tar"), *root.glob("*/*.tar")]):
        text = file.stem if file.parent == root else file.parent.name
        words = {word for word in re.split(r"[^a-z]+", text.lower()) if word in (*TRAIN_NAMES, *TEST_NAMES)}
        if len(words) != 1:
            raise InputError(
                f"{file} does not tell its split: its folder or its name should have one of "
                f"{', '.join((*TRAIN_NAMES, *TEST_NAMES))} in it, or {INFO_FILES[0]} should list it"
            )
        found.setdefault(words.pop(), []).append(file)
    return {name: (tuple(files), None) for name, files in found.items()}


def _class_names(root: Path, info: dict[str, Any]) -> tuple[str, ...] | None:
    """A list `classes` of the description, or a file of names.

    Raises:
        InputError: one of them stands there twice.
    """
    names, path = info.get("classes"), root / NAMES_FILE
    if not isinstance(names, list):
        if not path.is_file():
            return None
        names = read_lines(path)
    names = [spelled(str(name)) for name in names]
    if len(set(names)) != len(names):
        raise InputError(f"{root} names a class twice, in {INFO_FILES[0]} or {NAMES_FILE}; mend it")
    return tuple(names)
