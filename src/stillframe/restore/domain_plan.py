"""The plan of a libvirt domain from a snapshot, a new one or the same one again: its XML.

The new domain has a name, UUID, MAC addresses, sockets, ports and disks of its own.
"""

from __future__ import annotations

import copy
import os
import secrets
import uuid
from pathlib import Path
from xml.etree import ElementTree

import msgspec

from stillframe.errors import RefusedError, UsageError
from stillframe.machine.libvirt.domain import SYSTEM_URI, session_uri
from stillframe.restore.captured_disks import CapturedDisks, captured_bases
from stillframe.restore.domain_image import has_own_memory, plan_domain_image, put_on_place
from stillframe.restore.domain_xml import note_touches, own_devices, own_disks
from stillframe.restore.ledger import Ledger
from stillframe.restore.places import Places, choose_places
from stillframe.restore.plan import distrust
from stillframe.restore.records import DiskOverlay, ImagePlan, Risk, Touch, streamed_note
from stillframe.restore.run_as import choose_user
from stillframe.restore.show import printable
from stillframe.still.export_libvirt import domain_of_snapshot, parse_domain
from stillframe.still.snapshot import Snapshot

_RAM_NAME = "ram"


class DomainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A new domain before it is started, or the same one again. ``xml``: what libvirt gets.
    ``image``: whether its RAM is on one; ``streamed_xml``: what libvirt gets if that fails.

    ``directory``: to be created for its overlays and sockets. ``revert``: end the domain of that
    UUID first. The rest is as in ``RestorePlan``.
    """

    snapshot: str
    name: str
    uuid: str
    uri: str
    xml: str
    streamed_xml: str
    image: ImagePlan
    directory: str
    touches: tuple[Touch, ...]
    overlays: tuple[DiskOverlay, ...]
    distrust: tuple[str, ...]
    risks: tuple[Risk, ...]
    taken_here: bool
    notes: tuple[str, ...]
    revert: bool = False

    @property
    def ram_path(self) -> Path:
        """The name of the image's file in libvirt's XML."""
        return Path(self.directory, _RAM_NAME)

    @property
    def needs_trust(self) -> tuple[str, ...]:
        """All that the caller must answer for with --trust."""
        if self.taken_here:
            return self.distrust
        named = (f"{risk.option}: {risk.reason}" for risk in self.risks)
        return (*self.distrust, "libvirt would start whatever its XML says, as root", *named)


def plan_domain(
    snapshot: Snapshot,
    *,
    name: str | None = None,
    directory: Path | None = None,
    revert: bool = False,
    stream: bool = False,
) -> DomainPlan:
    """Rewrite the recorded XML so that the new domain shares nothing with the old one.

    Args:
        name: of the new domain. directory: to be created for sockets and overlays; default: the
            usual places.
        revert: the same domain again; only its disks are other ones, overlays beside the snapshot.
        stream: load all of RAM before it runs, even if an image is possible.

    Raises:
        UsageError: the snapshot is not of a domain, or the name is invalid. DataError: its XML is
            malformed. RefusedError: the snapshot is for analysis only, or lacks a disk that another
            VM writes to; or a device of the domain cannot exist twice.
    """
    record = domain_of_snapshot(snapshot)
    snapshot.check_restorable()
    root, live = parse_domain(record.xml), parse_domain(record.live_xml or record.xml)
    old_name = root.findtext("name") or "domain"
    if revert and name is not None:
        raise UsageError("the same domain has the same name", remedy="leave --name out")
    new_name = old_name if revert else name or f"{old_name}-{secrets.token_hex(3)}"
    if "/" in new_name or "\n" in new_name or not new_name.strip():
        raise UsageError(f"'{printable(new_name)}' is no name for a domain")
    identity = record.uuid if revert else str(uuid.uuid4())
    _set_text(root, "name", new_name)
    _set_text(root, "uuid", identity)
    machine = snapshot.manifest.machine
    description = snapshot.description
    if revert and directory is None:  # from now on the domain's disks are there
        directory = Path(f"{description}.reverted-{secrets.token_hex(3)}")
    run_as = choose_user(machine.uid) if machine else None
    disks = choose_places(new_name, directory, run_as=run_as).disks
    places = Places(run=disks, disks=disks)
    ledger = Ledger(places)
    captured = CapturedDisks(
        captured_bases(snapshot.manifest, description), machine.disks if machine else ()
    )
    if revert:
        own_disks(root, live, ledger, captured)
        captured.find("<nvram>", files=[root.findtext("os/nvram") or ""])  # the stream has it
        ledger.note("what the domain had on its disks since is left where it was, and not used")
    else:
        own_devices(root, live, ledger, captured)
    for base in captured.unplaced():
        raise RefusedError(
            f"the snapshot's disk {printable(base.label)} is not in the domain's XML",
            remedy="restore it with --as qemu",
            guest_state="none",
        )
    note_touches(root, ledger)
    words = (machine.command_line or machine.argv)[1:] if machine else ()
    if stream or revert:  # a reverted domain goes on with its own definition
        image = ImagePlan(streamed="as you asked")
    else:
        image = plan_domain_image(words, snapshot.blocks)
    if image.streamed and not (stream or revert):
        ledger.note(streamed_note(image.streamed))
    streamed, size_bytes = root, _ram_bytes(snapshot)
    if not image.streamed:
        streamed = copy.deepcopy(root)
        put_on_place(root, disks / _RAM_NAME, size_bytes)
    if has_own_memory(streamed):  # the domain was on an image: its block keeps its name
        put_on_place(streamed, disks / _RAM_NAME, size_bytes)
    # A recorded URI may run programs (qemu+ext).
    own = session_uri(machine.uid if run_as and machine else os.geteuid())
    uri = SYSTEM_URI if record.uri == SYSTEM_URI else own
    return DomainPlan(
        snapshot=description,
        name=new_name,
        uuid=identity,
        uri=uri,
        xml=ElementTree.tostring(root, encoding="unicode"),
        streamed_xml=ElementTree.tostring(streamed, encoding="unicode"),
        image=image,
        directory=str(disks),
        touches=tuple(ledger.touches),
        overlays=tuple(ledger.overlays),
        distrust=distrust(snapshot),
        risks=tuple(ledger.risks),
        taken_here=snapshot.was_taken_here,
        notes=tuple(ledger.notes),
        revert=revert,
    )


def _ram_bytes(snapshot: Snapshot) -> int:
    """Return the length of the machine's own RAM: the largest block."""
    return max((block.used_length_bytes for block in snapshot.blocks), default=0)


def _set_text(root: ElementTree.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ElementTree.SubElement(root, tag)
    element.text = text
