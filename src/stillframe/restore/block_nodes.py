"""Trees of block nodes: what Stillframe knows of them, and what they read on the host.

This is an allow-list: one unknown driver or key, at any depth, makes the whole tree unknown.
Sources: QEMU ``qapi/block-core.json`` (BlockdevOptions), ``block.c`` (bdrv_fill_options).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from stillframe.restore.option_value import read_json

Tree = dict[str, Any]
"""One node: keys and texts; a child is a node's name, or a tree."""

_TUNING_WORDS = """
node-name read-only auto-read-only force-share discard detect-zeroes cache.direct cache.no-flush
cache.writeback aio aio-max-batch locking drop-cache x-check-cache-dropped lazy-refcounts
pass-discard-request pass-discard-snapshot pass-discard-other discard-no-unref overlap-check
l2-cache-size l2-cache-entry-size refcount-cache-size cache-size cache-clean-interval readahead
throttle-group queue-size reconnect-delay open-timeout bottom
"""
_TUNING = frozenset(_TUNING_WORDS.split())
"""Keys that say how an image is opened, not what is in it."""
_WRITABLE = frozenset({"read-only", "auto-read-only"})
_CONTENT = {
    "raw": "offset size",
    "qcow2": "encrypt.format encrypt.key-secret",
    "luks": "key-secret",
    "throttle": "",
    "copy-on-read": "",
    **dict.fromkeys(("qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "dmg", "bochs", "cloop"), ""),
}
_CHILDREN = {"qcow2": "file backing data-file", "qed": "file backing", "vmdk": "file backing"}
_FILTERS = ("throttle", "copy-on-read")
FILES = ("file", "host_device", "host_cdrom")
_URL_KEYS = "url username password-secret proxy-username proxy-password-secret sslverify timeout"
_REMOTE = {
    "nbd": "server.type server.host server.port server.path host port path export tls-hostname"
    " tls-creds",
    **dict.fromkeys(("http", "ftp"), _URL_KEYS),
    **dict.fromkeys(("https", "ftps"), f"{_URL_KEYS} cookie-secret"),
    "ssh": "server.host server.port host port path user host-key-check.mode host-key-check.type"
    " host-key-check.hash",
    "iscsi": "transport portal target lun user password-secret initiator-name header-digest"
    " timeout",
    "nfs": "server.type server.host path user group",
    "rbd": "pool namespace image user",
    "gluster": "volume path",
}
_NOTHING = {"null-co": "size latency-ns read-zeroes", "null-aio": "size latency-ns read-zeroes"}
_REMOTE_URL = re.compile(
    r"(nbd|https?|ftps?|ssh|iscsi|nfs)(\+\w+)?://[^\s\\]+|nbd:[\w./:=-]+|rbd:[\w./-]+",
    re.IGNORECASE,
)
_FAT = re.compile(r"fat:(?:(?:floppy|12|16|32):)*(?!rw:)(?P<path>/?[^:]*)")
_DEPTH = 16
_TEXTS = ("driver", "node-name", "filename")


class UnknownNode(Exception):  # noqa: N818 - it is an answer, not a failure
    """The reason why Stillframe does not know a tree."""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """The image that a tree describes.

    ``base``: path, URL or ``json:{...}``, as QEMU opens it. ``format``: empty if QEMU probes it.
    ``files``: absolute paths; ``remotes``: URLs and the like. ``nothing``: it has no content.
    ``tree``: its nodes reduced to their content; empty if it is one URL.
    """

    base: str
    format: str
    files: tuple[str, ...]
    remotes: tuple[str, ...]
    nothing: bool = False
    tree: Tree = {}


def nested(pairs: Iterable[tuple[str, str]]) -> Tree:
    """Build a tree from keys with dots, as QEMU does.

    Raises:
        UnknownNode: a key has both a value and keys below it, or a text key has keys below it.
    """
    root: Tree = {}
    for key, text in pairs:
        node = root
        *heads, last = key.split(".")
        if len(heads) > 2 * _DEPTH:
            raise UnknownNode("its keys are nested too deeply")
        for head in heads:
            if head in _TEXTS:
                raise UnknownNode(f"{head} is no text")
            node = node.setdefault(head, {})
            if not isinstance(node, dict):
                raise UnknownNode(f"{head} is given twice")
        if isinstance(node.get(last), dict):
            raise UnknownNode(f"{last} is given twice")
        node[last] = text
    return root


class NodeReader:
    """A reader of trees.

    Args:
        named: the trees of the recorded ``-blockdev``, by node name.
        resolve: makes a path absolute.
        only_content: a tree must not say how it is opened, such as for writing: QEMU gets the very
            words that are read here.
    """

    def __init__(
        self,
        named: dict[str, Tree],
        resolve: Callable[[str], str],
        *,
        only_content: bool = False,
    ) -> None:
        self._named = named
        self._resolve = resolve
        self._only_content = only_content

    def image(self, tree: Tree) -> Image:
        """Return the image that a tree describes.

        Raises:
            UnknownNode: something in it is unknown.
        """
        files: list[str] = []
        remotes: list[str] = []
        pure = self._pure(tree, files, remotes, _DEPTH)
        whole = dict(pure)
        if pure.get("backing", "") is None:
            del pure["backing"]
        inner = pure.get("file")
        plain = inner.keys() == {"driver", "filename"} if isinstance(inner, dict) else False
        if pure.keys() <= {"driver", "file"} and plain and files:
            base, image_format = files[0], pure.get("driver", "")
        elif pure.keys() <= {"driver", "file"} and isinstance(inner, str):
            base, image_format = inner, pure.get("driver", "")
        elif pure.get("driver") in FILES:
            base, image_format = files[0], "raw"
        else:
            base = f"json:{json.dumps(pure, separators=(',', ':'))}"
            image_format = pure.get("driver", "")
            image_format = image_format if image_format in _CONTENT else "raw"
        return Image(
            base=base,
            format=image_format,
            files=tuple(files),
            remotes=tuple(remotes),
            nothing=pure.get("driver") in _NOTHING,
            tree=whole,
        )

    def _pure(self, tree: Tree, files: list[str], remotes: list[str], depth: int) -> Tree:
        """Return the tree reduced to its content: without names, filters and tuning."""
        if depth == 0:
            raise UnknownNode("the nodes go in a circle, or too deep")
        driver = tree.get("driver") or ("file" if "filename" in tree else "")
        flat = dict(_flat(tree))
        if self._only_content and (driver in _FILTERS or flat.keys() & _WRITABLE):
            raise UnknownNode("it says how it is opened")
        rest = {key: text for key, text in flat.items() if key not in _TUNING and key != "driver"}
        if driver in FILES:
            self._check_keys(driver, rest, "filename")
            path = rest.get("filename", "")
            if not path or "/dev/fdset/" in path:
                raise UnknownNode("the first VM was given its disk as a file descriptor")
            files.append(self._resolve(path))
            return {"driver": driver, "filename": files[-1]}
        if driver in _REMOTE:
            self._check_keys(driver, rest, _REMOTE[driver])
            words = [f"{key}={text}" for key, text in rest.items()]
            remotes.append(rest.get("url") or " ".join([driver, *words]))
            return {"driver": driver, **nested(rest.items())}
        if driver in _NOTHING:
            self._check_keys(driver, rest, _NOTHING[driver])
            return {"driver": driver, **rest}
        if driver and driver not in _CONTENT:
            raise UnknownNode(f"Stillframe does not know the block driver {driver}")
        children = _CHILDREN.get(driver, "file").split()
        content = {key: text for key, text in rest.items() if key.split(".")[0] not in children}
        self._check_keys(driver, content, _CONTENT.get(driver, ""))
        pure: Tree = {"driver": driver} if driver else {}
        pure |= nested(content.items())
        for child in children:
            if child not in tree:
                continue
            pure[child] = self._child(tree[child], child, files, remotes, depth)
        if "file" not in pure:
            raise UnknownNode("it names no image file")
        if driver in _FILTERS:
            inner = pure["file"]
            return inner if isinstance(inner, dict) else {"driver": "raw", "file": inner}
        return pure

    def _child(
        self, child: Any, name: str, files: list[str], remotes: list[str], depth: int
    ) -> Tree | str | None:
        if isinstance(child, dict):
            return self._pure(child, files, remotes, depth - 1)
        if child in self._named:
            return self._pure(self._named[child], files, remotes, depth - 1)
        if name == "backing" and not child:
            return None
        raise UnknownNode(f"there is no node {child}")

    def from_filename(self, file: str) -> Tree | str:
        """Return the node or URL that a file name of ``-drive`` stands for.

        Raises:
            UnknownNode: malformed JSON, or a protocol that Stillframe does not know.
        """
        if file.startswith("json:"):
            try:
                return nested(_flat(read_json(file.removeprefix("json:"))))
            except (ValueError, AttributeError, RecursionError) as error:
                raise UnknownNode(f"its JSON is malformed ({error})") from error
        for prefix in ("file:", "host_device:", "host_cdrom:"):
            if file.startswith(prefix):
                return {"driver": prefix[:-1], "filename": file.removeprefix(prefix)}
        head = re.split(r"[:/]", file, maxsplit=1)[0]
        if file[len(head) : len(head) + 1] != ":":
            return {"driver": "file", "filename": file}
        if _REMOTE_URL.fullmatch(file) or _FAT.fullmatch(file):
            return file
        raise UnknownNode(f"Stillframe does not know the protocol {head}:")

    def drive_image(self, tree: Tree, file: str) -> Image:
        """Return the image of a ``-drive``. ``file``: its ``file=``, if any; ``tree``: the rest.

        Raises:
            UnknownNode: something in it is unknown.
        """
        if not file:
            return self.image(tree)
        if "file" in tree:
            raise UnknownNode("file is given twice")
        node = self.from_filename(file)
        if isinstance(node, dict):
            if not tree and node.get("driver") not in FILES:
                return self.image(node)
            return self.image({**tree, "file": node})
        if not tree.keys() <= {"driver"} or tree.get("driver", "raw") not in _CONTENT:
            raise UnknownNode("it says more of a URL than its format")
        image_format = tree.get("driver", "")
        if fat := _FAT.fullmatch(node):
            path = self._resolve(fat["path"])
            start = node[: fat.start("path")]
            return Image(base=start + path, format=image_format, files=(path,), remotes=())
        return Image(base=node, format=image_format, files=(), remotes=(node,))

    @staticmethod
    def _check_keys(driver: str, keys: Iterable[str], known: str) -> None:
        unknown = sorted(set(keys) - set(known.split()))
        if unknown:
            raise UnknownNode(f"it describes the image by {', '.join(unknown)}")


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return (key with dots, text) of all leaves, in the texts of QEMU's options."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += _flat(value, f"{name}.")
        elif isinstance(value, list):
            found += _flat(dict(zip(map(str, range(len(value))), value, strict=True)), f"{name}.")
        else:
            text = ("off", "on")[value] if isinstance(value, bool) else value
            found.append((name, "" if text is None else str(text)))
    return found
