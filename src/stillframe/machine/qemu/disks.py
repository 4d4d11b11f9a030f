"""The disks of a running QEMU, from its live block graph.

Sources: QEMU ``qapi/block-core.json`` (query-block, query-named-block-nodes,
x-debug-query-block-graph: the only command that shows which node is whose child).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from stillframe.machine.process.inspection import ask
from stillframe.model import DiskRecord, ImageRecord
from stillframe.qmp.client import QmpClient
from stillframe.qmp.replies import as_list, as_map

_CHAIN_MAX = 256
_FILTER_WORDS = """
throttle copy-on-read blkdebug blkverify blklogwrites copy-before-write preallocate
mirror_top commit_top backup-top snapshot-access compress
"""
_FILTERS = frozenset(_FILTER_WORDS.split())
_JOB_FILTERS = frozenset({"copy-before-write", "backup-top", "mirror_top", "commit_top"})
_UNNAMED = "#"


def read_disks(qmp: QmpClient, fd_targets: Set[str]) -> tuple[DiskRecord, ...]:
    """Return all block devices, in the order of ``query-block``. The guest is not touched.

    Args:
        fd_targets: what the process's descriptors point to.

    Raises:
        MachineError: the monitor went away.
    """
    graph = _Graph(qmp)
    return tuple(
        _disk(as_map(entry), graph, fd_targets) for entry in as_list(qmp.execute("query-block"))
    )


class _Graph:
    """The nodes by name, and each node's children by role."""

    def __init__(self, qmp: QmpClient) -> None:
        found = as_list(ask(qmp, "query-named-block-nodes", {"flat": True}))
        self.nodes = {str(as_map(node).get("node-name")): as_map(node) for node in found}
        self.children: dict[str, dict[str, str]] = {}
        graph = as_map(ask(qmp, "x-debug-query-block-graph"))
        names = {
            as_map(n).get("id"): str(as_map(n).get("name")) for n in as_list(graph.get("nodes"))
        }
        for edge in map(as_map, as_list(graph.get("edges"))):
            parent = names.get(edge.get("parent"), "")
            child = names.get(edge.get("child"), "")
            self.children.setdefault(parent, {})[str(edge.get("name"))] = child

    def below_jobs(self, name: str) -> str:
        """Return the node below the filters that running block jobs have put on top of it."""
        for _ in range(_CHAIN_MAX):
            of_job = self.nodes.get(name, {}).get("drv") in _JOB_FILTERS
            if not of_job or not name.startswith(_UNNAMED):
                break
            below = self.children.get(name, {})
            name = below.get("file") or below.get("backing", "")
        return name

    def images(self, name: str) -> Iterator[ImageRecord]:
        """Yield the image that a node shows, and the images below it."""
        for _ in range(_CHAIN_MAX):
            node, below = self.nodes.get(name), self.children.get(name, {})
            if node is None:
                return
            if node.get("drv") in _FILTERS:
                name = below.get("file") or below.get("backing", "")
                continue
            source = self._source(name)
            yield ImageRecord(
                node_name=name,
                driver=str(source.get("drv")),
                format="raw" if source is node and self.children else str(node.get("drv")),
                filename=str(source.get("file") or ""),
                read_only=node.get("ro") is True,
                size_bytes=_size_bytes(node),
            )
            name = below.get("backing", "")

    def _source(self, name: str) -> Mapping[str, object]:
        """Return the node at the end of the ``file`` children: what QEMU opens on the host."""
        for _ in range(_CHAIN_MAX):
            below = self.children.get(name, {}).get("file", "")
            if below not in self.nodes:
                break
            name = below
        return self.nodes[name]


def _size_bytes(node: Mapping[str, object]) -> int:
    size = as_map(node.get("image")).get("virtual-size")
    return size if isinstance(size, int) else 0


def _disk(entry: Mapping[str, object], graph: _Graph, fd_targets: Set[str]) -> DiskRecord:
    medium = as_map(entry.get("inserted"))
    node_name = graph.below_jobs(str(medium.get("node-name") or ""))
    images = tuple(graph.images(node_name))
    # bdrv_append_temp_snapshot (QEMU block.c) deletes its file as soon as it has opened it.
    temporary = len(images) > 1 and f"{images[0].filename} (deleted)" in fd_targets
    named = images[1 if temporary else 0] if images else None
    return DiskRecord(
        device=str(entry.get("device") or ""),
        qdev=str(entry.get("qdev") or ""),
        node_name=node_name,
        filename=named.filename if named else str(medium.get("file") or ""),
        driver=named.format if named else str(medium.get("drv") or ""),
        read_only=medium.get("ro") is True,
        removable=entry.get("removable") is True,
        images=images,
        temporary=temporary,
    )
