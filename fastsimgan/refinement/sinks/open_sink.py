"""What a run is to write, as a sink."""

from __future__ import annotations

from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.sinks.arrays import ArraysSink
from fastsimgan.refinement.sinks.base import Sink
from fastsimgan.refinement.sinks.folder import FolderSink
from fastsimgan.refinement.sinks.packed import PackedSink
from fastsimgan.refinement.sinks.shards import ShardsSink
from fastsimgan.refinement.sources.base import Source


def open_sink(run: RunDirectory, source: Source, to: str, *, link: bool) -> Sink:
    """The sink of ``run``.

    Args:
        run: whose output it is.
        source: what is refined, as `Source.towards` has made it for ``to``.
        to: "folder", "shards", "npz", "npy" or "hdf5".
        link: make hard links to labels instead of copies, where ``to`` is a folder.
    """
    if to == "folder":
        return FolderSink(run, source, link=link)
    if to == "shards":
        return ShardsSink(run, source)
    if source.array_file is not None:
        return ArraysSink(run, source.array_file, to)
    return PackedSink(run, source, to)
