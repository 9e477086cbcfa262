"""S3 for `etils.epath`, by pyarrow's own client: nothing to install, and no quarrel about fsspec's version with the lake.

In: `s3://bucket/key`, and the environment variables of S3 clients (`AWS_ENDPOINT_URL`, `AWS_REGION`, ...). Out: the file system
that fsspec has for `s3` where there is no `s3fs` (`storage` tells it).
"""

from __future__ import annotations

from typing import Any

from fsspec.implementations.arrow import ArrowFSWrapper

from monolith_jax.stream.remote import s3_files


class S3Files(ArrowFSWrapper):
    """All buckets that one set of keys opens."""

    cachable = False

    def __init__(self, **_: Any) -> None:
        """Reads the environment."""
        super().__init__(s3_files())

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("s3://").strip("/")
