"""Which versions bring a reader up to date.

In: the committed versions and their manifests. Out: those to read, in order.

A delta follows a reader that stands at its `previous`; at a base that lies between that and the delta; or at the version that
such a base itself follows, within an epoch: the reader steps over the base, which holds nothing that deltas do not bring.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence

from monolith_jax.sync.manifest import Manifest, Version

ManifestOf = Callable[[Version], Manifest | None]
"""Returns a manifest, None where it is not there or damaged."""


def find_chain(
    versions: Sequence[Version], manifest_of: ManifestOf, after: Version | None, without: Collection[Version] = ()
) -> list[Version]:
    """Returns what a reader applies next, in order; see `DeltaFolder.chain`.

    Args:
        versions: The committed ones, ascending.
        manifest_of: Gives their manifests. For a reader that has nothing, it is asked from the newest down to the newest base.
        after: Where the reader stands, None where it has nothing.
        without: Versions that it could not read.
    """
    later = versions if after is None else versions[bisect_right(versions, after) :]
    found = {version: manifest for version in reversed(later) if (manifest := manifest_of(version))} if after else {}
    if after is None:
        found = _down_to_base(later, manifest_of, without)
    links = _links(versions, found, without)
    start = next((v for v in sorted(found, reverse=True) if found[v].kind == "base" and v not in without), None)
    anew = [] if start is None else _follow(start, found[start], links)
    if after is None:
        return anew
    is_here = len(later) < len(versions) and versions[-len(later) - 1] == after
    here = manifest_of(after) if is_here else None
    on = _follow(after, here, links)[1:]
    places = {on[-1]} if on else _places(after, here)
    if not anew or _is_better(on, anew, places, found):
        return on
    return anew


def find_since(newest: Version, manifest_of: Callable[[Version], Manifest], step: int) -> list[Version]:
    """Returns the deltas that told of states after a step, ascending; see `DeltaFolder.since`.

    Args:
        newest: The newest committed version.
        manifest_of: Gives its manifest and those before; raises ValueError where that cannot be.
        step: Where a trainer goes on.
    """
    manifest = manifest_of(newest)
    if manifest.step < step:
        raise ValueError(
            f"the log ends with {newest.folder} at step {manifest.step}, so it does not tell what changed up to step {step}, "
            "from where the trainer goes on: begin its epoch with a base without `previous`"
        )
    found: list[Version] = []
    while manifest.step > step:
        if manifest.kind == "delta":
            found.append(manifest.version)
        elif manifest.previous is None:
            raise ValueError(
                f"{manifest.version.folder} starts anew at step {manifest.step}, so the log does not tell what changed since "
                f"step {step}, from where the trainer goes on: begin its epoch with a base without `previous`"
            )
        manifest = manifest_of(manifest.previous or manifest.base)
    return found[::-1]


def _down_to_base(
    versions: Sequence[Version], manifest_of: ManifestOf, without: Collection[Version]
) -> dict[Version, Manifest]:
    found: dict[Version, Manifest] = {}
    for version in reversed(versions):
        manifest = manifest_of(version)
        if manifest is not None:
            found[version] = manifest
            if manifest.kind == "base" and version not in without:
                break
    return found


def _links(versions: Sequence[Version], found: dict[Version, Manifest], without: Collection[Version]) -> dict[Version, Version]:
    """Returns for each place of a reader the delta that follows it: the highest, which is of the newest epoch."""
    links: dict[Version, Version] = {}
    for version in sorted(found):
        manifest = found[version]
        if manifest.kind == "base" or version in without:
            continue
        previous = manifest.previous or _implied(version, manifest.base, versions)
        places = {previous}
        if previous < manifest.base:
            places.add(manifest.base)
        while (below := _stepped_over(found.get(previous))) is not None:
            previous = below
            places.add(previous)
        links |= dict.fromkeys(places, version)
    return links


def _implied(version: Version, base: Version, versions: Sequence[Version]) -> Version:
    """Returns what a delta follows that names nothing: its base, or where that is of an older epoch, the last of those."""
    older = [one for one in versions if base < one and one.epoch < version.epoch]
    return older[-1] if base.epoch < version.epoch and older else base


def _stepped_over(manifest: Manifest | None) -> Version | None:
    """Returns where a reader may stand that steps over a base; that of a new epoch has taken rows back, so nowhere."""
    if manifest is None or manifest.kind == "delta" or manifest.previous is None:
        return None
    return manifest.previous if manifest.previous.epoch == manifest.version.epoch else None


def _follow(start: Version, manifest: Manifest | None, links: dict[Version, Version]) -> list[Version]:
    """Returns where a reader starts and the deltas that it can then apply."""
    chain = [start]
    places = _places(start, manifest)
    while ahead := [links[place] for place in places if place in links and links[place] > chain[-1]]:
        chain.append(max(ahead))
        places = {chain[-1]}
    return chain


def _places(version: Version, manifest: Manifest | None) -> set[Version]:
    if manifest is None or manifest.kind == "delta" or manifest.previous is None:
        return {version}
    return {version, manifest.previous}


def _is_better(on: list[Version], anew: list[Version], places: set[Version], found: dict[Version, Manifest]) -> bool:
    """Says whether to apply deltas, which end where a reader has `places`, rather than load a base and what follows it."""
    end = max(places)
    if len(anew) > 1 and end == anew[-1]:
        return sum(found[one].num_bytes for one in on) <= sum(found[one].num_bytes for one in anew)
    if end >= anew[-1]:
        return True
    below = _stepped_over(found[anew[-1]])
    while below is not None and below not in places:
        below = _stepped_over(found.get(below))
    return below is not None
