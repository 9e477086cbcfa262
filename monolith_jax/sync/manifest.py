"""The manifest of a version: what a delta or base holds, and that it is whole.

In: what a publisher knows. Out: JSON of one line, with the checksum of all before it as its last entry, and back.

A publisher holds to this, so that a reader has at each version what the trainer had there:

* a delta has every row that changed since its `previous`, whatever base came between;
* a base is of the state of its `previous`, so a delta of the same step, with dense weights, comes first. The base may be
  committed later than deltas above it;
* the first delta of a new epoch has the dense weights, and every id of the deltas that `DeltaFolder.since(step)` names, all as
  they are in the restored state. Where that cannot name them, the epoch begins with a base without `previous`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

from monolith_jax.sync.quantise import Format, check_format
from monolith_jax.sync.storage import checksum

SCHEMA = 1
"""Version of the layout; a reader refuses any other."""
_NAME = re.compile(r"(\d{8,})-(\d{10,})")


class Version(NamedTuple):
    """Names a delta or base. Ordered: readers never go to a lower one."""

    epoch: int
    """Grows with each start of a trainer."""
    sequence: int
    """Grows within an epoch; numbers may be left out."""

    @property
    def folder(self) -> str:
        """The name of its folder; sorts like the version while epochs have 8 digits and sequences 10."""
        return f"{self.epoch:08d}-{self.sequence:010d}"

    @classmethod
    def of_folder(cls, name: str) -> Version | None:
        """Returns the version that a folder's name stands for, None for any other name."""
        return _version_of(name)


@functools.lru_cache(maxsize=1 << 16)  # readers list the same names again and again
def _version_of(name: str) -> Version | None:
    found = _NAME.fullmatch(name)
    return Version(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one version holds; written last, so that it commits the version."""

    kind: Literal["base", "delta"]
    """A base has every live row and every dense weight, a delta what changed since `previous`."""
    version: Version
    """Of a base: the next after its `previous`, when its state is taken, however late it is committed."""
    previous: Version | None
    """Of a delta: the delta before it, across epochs; None where there is only its base. Of a base: the delta of the same
    state, since nothing could take back what no delta has told; None where it starts anew: no reader steps over it."""
    base: Version
    """The newest base when a delta was written; of a base, itself."""
    step: int
    """The training step whose state this is."""
    event_time_ms: int
    """The watermark: events up to here have had their effect."""
    created_ms: int
    """Wall time, milliseconds since 1970, UTC."""
    position: Sequence[Any]
    """Where the stream stood, of each partition: anything that JSON holds."""
    format: Format
    """Of the vectors."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Floats of a vector, by table. From here to `files`, `commit` fills in what the parts say."""
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Rows and deleted ids, by table."""
    files: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Bytes and xxh3 of each file beside the manifest, by name."""
    config: str = ""
    """The configuration (gin) of the run; of a base only."""
    schema: int = SCHEMA

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files, without this manifest."""
        return sum(size for size, _ in self.files.values())

    @property
    def has_dense(self) -> bool:
        """Whether it has the dense weights."""
        return any(name.startswith("dense-") for name in self.files)


def check_manifest(manifest: Manifest) -> None:
    """Raises ValueError where a manifest contradicts itself."""
    check_format(manifest.format)
    version, previous, base = manifest.version, manifest.previous, manifest.base
    if manifest.kind not in ("base", "delta"):
        raise ValueError(f"kind of {version.folder} is {manifest.kind!r}; expected 'base' or 'delta'")
    if previous is not None and previous >= version:
        raise ValueError(f"{version.folder} names {previous.folder} as previous; expected a lower version")
    if (base != version) if manifest.kind == "base" else (base >= version):
        wanted = "itself" if manifest.kind == "base" else "a lower version"
        raise ValueError(f"{manifest.kind} {version.folder} names {base.folder} as its base; expected {wanted}")
    if manifest.kind == "base" and previous is not None and previous.epoch != version.epoch:
        raise ValueError(
            f"base {version.folder} names {previous.folder} as previous; expected a delta of its own epoch, of the same "
            "state, or None: then readers load it whole"
        )


def sealed(content: Mapping[str, Any]) -> bytes:
    """Returns JSON of a mapping that is not empty, with a checksum of its own.

    Raises:
        ValueError: It has something in it that JSON does not hold.
    """
    try:
        text = json.dumps(content, allow_nan=False, ensure_ascii=True)
    except TypeError as error:
        raise ValueError(
            f"{error}: expected what JSON holds; of numpy's numbers make int or float, of its arrays lists"
        ) from None
    body = text[:-1].encode()
    return body + _seal(body)


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """Returns what `sealed` was given.

    Args:
        data: All bytes of a file.
        name: Names the file in errors.

    Raises:
        ValueError: A bit of it has changed, or an end is missing.
    """
    length = len(_seal(b""))
    body, seal = data[:-length], data[-length:]
    if not body or seal != _seal(body):
        raise ValueError(
            f"{name} is damaged: expected it to end in {_seal(body).decode().strip()}, got {len(data)} bytes that end in "
            f"{seal.decode(errors='replace').strip()!r}"
        )
    content = json.loads(data)
    del content["xxh3"]
    return content


def _seal(body: bytes) -> bytes:
    return f', "xxh3": "{checksum(body)}"}}\n'.encode()


def to_bytes(manifest: Manifest) -> bytes:
    """Returns a manifest as its file holds it.

    Raises:
        ValueError: Its position has something in it that JSON does not hold.
    """
    return sealed(asdict(manifest))


def from_bytes(data: bytes, name: str) -> Manifest:
    """Returns the manifest that a file holds.

    Args:
        data: All bytes of the file.
        name: Names the file in errors.

    Raises:
        ValueError: It is damaged, or of another layout than this reader knows.
    """
    content = unsealed(data, name)
    names = {one.name for one in fields(Manifest)}
    if content.get("schema") != SCHEMA or content.keys() != names:
        raise ValueError(
            f"{name} is of layout {content.get('schema')}, this reader knows {SCHEMA}: install the version of "
            "monolith_jax that wrote it"
        )
    for key in ("version", "previous", "base"):
        content[key] = content[key] and Version(*content[key])
    return Manifest(**content)
