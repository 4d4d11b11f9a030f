"""Break the code on purpose, one way at a time, and see a test catch it.

Works on a copy of the checkout in a temp directory. A mutation that no test catches, or that no
longer applies, is reported and makes the exit code 1. Run it with the environment of the tests::

    make break-invariants            # all; takes several minutes
    python tools/break_invariants.py claim-ignored
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TEST_TIMEOUT_S = 600
FAULT_LOOP = "src/stillframe/capture/_faults.pxd"
CLAIMS = "src/stillframe/capture/_claims.pxd"
TAKE = "tests/integration/test_take.py"
PROCESS = "tests/integration/test_capture_process.py"
OWN = "tests/integration/test_own_memory.py"
DISKS = "tests/integration/test_disks.py"
QUIESCE = "tests/integration/test_quiesce.py"
FORMS = "tests/integration/test_disk_forms.py"
FAULTS = "tests/fault/test_fault_points.py"
DIRTY = "src/stillframe/capture/_dirty.pxd"
EVENTS = "src/stillframe/capture/_events.pxd"
HISTORY = "tests/property/test_store_history.py"
INTERLEAVED = "tests/property/test_store_interleaved.py"
FORK = "tests/integration/test_fork_live.py"
FORK_DISKS = "tests/integration/test_fork_disks.py"
CGROUP = "tests/integration/test_memory_cgroup.py"
IMAGES = "tests/integration/test_image_cache.py"
TAKE_IMAGE = "tests/integration/test_take_image.py"
HARDSHIP = "tests/integration/test_image_hardship.py"
WATCHED = "tests/integration/test_capture_watched.py"


class Mutation(NamedTuple):
    """``old`` is replaced by ``new`` in ``file``; ``tests`` must then fail."""

    name: str
    invariant: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "unreadable-pin-is-none",
        11,
        "src/stillframe/disks/pins.py",
        "        return _UNREADABLE",
        "        return None",
        ("tests/unit/disks/test_pins.py::test_a_pin_that_cannot_be_read_holds",),
    ),
    Mutation(
        "late-answer-of-an-agent-is-the-next-ones",
        11,
        "src/stillframe/disks/agent_channel.py",
        "        self._socket.sendall(mark + text if was_owed else text)\n        if was_owed:",
        "        self._socket.sendall(text)\n        if False:",
        (
            "tests/unit/disks/test_guest_agent.py::"
            "test_an_answer_that_comes_late_is_not_taken_for_the_next_ones",
        ),
    ),
    Mutation(
        "restored-guest-stays-frozen",
        7,
        "src/stillframe/restore/start.py",
        "        if snapshot.manifest.quiesced:\n",
        "        if False:\n",
        (f"{QUIESCE}::test_what_is_restored_or_forked_is_thawed",),
    ),
    Mutation(
        "guard-does-not-thaw",
        4,
        "src/stillframe/snapshot/guard_process.py",
        '        thaw(will["agent"])\n',
        "        pass\n",
        (f"{QUIESCE}::test_kill_9_while_the_guest_runs_frozen",),
    ),
    Mutation(
        "asks-what-aborts-qemu",
        4,
        "src/stillframe/machine/qemu/disk_requests.py",
        '"x-query-virtio-queue-status", where',
        '"x-query-virtio-status", where',
        ("tests/unit/machine/test_disk_requests.py",),
    ),
    Mutation(
        "not-protected-before-devices",
        8,
        "src/stillframe/snapshot/instant.py",
        "    ram.protect_written()\n",
        "    pass\n",
        (f"{TAKE}::test_nothing_is_written_while_the_guest_stands",),
    ),
    Mutation(
        "swapped-in-for-good",
        4,
        "src/stillframe/capture/_swap.pxd",
        "        sf_swap_out_process(core.pidfd, b.hva + offset, swapped)\n",
        "        pass\n",
        (f"{CGROUP}::test_what_is_in_swap_stays_there",),
    ),
    Mutation(
        "noted-forgotten",
        1,
        "src/stillframe/capture/ram_capture.py",
        "        self._core.set_phase(_capture.PHASE_ACTIVE)\n",
        "        self._core.set_phase(_capture.PHASE_RELEASE)\n",
        (f"{TAKE}::test_never_torn_under_full_load[memfd]",),
    ),
    Mutation(
        "faults-wait-for-the-gil",
        3,
        FAULT_LOOP,
        "                rc = _fault(core, address, phase)\n",
        "                with gil:\n                    rc = _fault(core, address, phase)\n",
        (f"{PROCESS}::test_faults_are_served_while_somebody_keeps_the_gil",),
    ),
    Mutation(
        "population-learned-in-the-downtime",
        6,
        "src/stillframe/snapshot/instant.py",
        "    ram.protect_written()\n",
        "    ram.learn_population()\n    ram.protect_written()\n",
        (f"{TAKE}::test_what_grows_with_ram_is_done_while_the_guest_runs",),
    ),
    Mutation(
        "claim-ignored",
        2,
        CLAIMS,
        "won = mask & ~sf_fetch_or(&b.claim[word], mask)",
        "won = mask | (0 & sf_fetch_or(&b.claim[word], mask))",
        ("tests/property", f"{TAKE}::test_numbers_add_up"),
    ),
    Mutation(
        "un-protected-before-the-copy",
        2,
        FAULT_LOOP,
        "        _window(core, b, page, &first, &pages)\n",
        "        unprotect(core, b, page, 1, True)\n"
        "        _window(core, b, page, &first, &pages)\n",
        (f"{OWN}::test_never_torn_in_our_own_process",),
    ),
    Mutation(
        "kernel-writes-left-to-fail",
        7,
        "src/stillframe/board/memory/_guest_memory_sys.h",
        "if (n < 0 && errno == EFAULT) {",
        "if (0) {",
        (f"{OWN}::test_the_kernel_reads_into_protected_ram",),
    ),
    Mutation(
        "guard-never-armed",
        4,
        "src/stillframe/snapshot/guard.py",
        'self._send(b"A")',
        'self._send(b"D")',
        (f"{FAULTS}::test_kill[stopped]",),
    ),
    Mutation(
        "named-before-it-is-complete",
        5,
        "src/stillframe/store/backends/local.py",
        'os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, _MODE, dir_fd=directory_fd)',
        'os.open("early", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE, dir_fd=directory_fd)',
        (f"{FAULTS}::test_kill[swept]", "tests/contract"),
    ),
    Mutation(
        "dropped-ram-unnoticed",
        7,
        "src/stillframe/capture/ram_capture.py",
        "        if lost:\n",
        "        if False:\n",
        (PROCESS,),
    ),
    Mutation(
        "writes-while-stopped-unseen",
        8,
        "src/stillframe/capture/ram_capture.py",
        "        runs = self._core.noted_runs()\n",
        "        runs: list[tuple[int, int, int]] = []\n",
        (PROCESS,),
    ),
    Mutation(
        "spill-without-limit-check",
        9,
        FAULT_LOOP,
        "index = ring_take(&spill.empty)\n    if index < 0:\n        began",
        "index = 0\n    if index < 0:\n        began",
        ("tests/property", PROCESS),
    ),
    Mutation(
        "increment-forgets-what-is-noted",
        7,
        "src/stillframe/capture/_dirty.pxd",
        "        _capture_anew(core, b, word, bits)\n        while bits:\n",
        "        while bits:\n",
        ("tests/integration/test_changed_pages.py",),
    ),
    Mutation(
        "clone-forgets-what-it-wrote",
        7,
        "src/stillframe/image/own_pages.py",
        "        return private_pages(self._pid, block)\n",
        "        return private_pages(self._pid, block)[1:]\n",
        ("tests/integration/test_increments.py::test_of_a_clone_only_what_it_wrote_is_read",),
    ),
    Mutation(
        "chain-reads-the-oldest",
        7,
        "src/stillframe/still/chain.py",
        "            age = [sources[i] >> 32 for i in order]",
        "            age = [-(sources[i] >> 32) for i in order]",
        ("tests/unit/still/test_chain.py",),
    ),
    Mutation(
        "disks-after-the-instant",
        1,
        "src/stillframe/snapshot/instant.py",
        "    disks.in_stop()\n",
        "    own = machine.cont\n"
        "    machine.cont = lambda: (own(), time.sleep(0.03), disks.in_stop())\n",
        (f"{DISKS}::test_ram_and_disks_show_one_instant[copy-raw-blk-True]",),
    ),
    Mutation(
        "faults-of-the-dead-filler-not-told-again",
        10,
        "src/stillframe/image/filler.py",
        "                clone.waiting.wake_all()\n",
        "                pass\n",
        ("tests/integration/test_image.py::test_faults_that_the_dead_one_had_read_are_told_again",),
    ),
    Mutation(
        "folded-into-an-image-that-a-snapshot-needs",
        11,
        "src/stillframe/disks/folding.py",
        "        holder = None if also_pinned else pinned_by(overlay)\n",
        "        holder = None\n",
        (f"{FORMS}::test_commit_leaves_what_a_snapshot_needs",),
    ),
    Mutation(
        "overlay-behind-libvirts-back",
        12,
        "src/stillframe/disks/refusals.py",
        "    if frozen and managed_by:\n",
        "    if False:\n",
        ("tests/integration/test_libvirt_disks.py::test_an_overlay_is_refused_by_name",),
    ),
    Mutation(
        "saved-page-not-kept-protected",
        7,
        CLAIMS,
        "if core.staying and not by_fault:",
        "if False:",
        (f"{WATCHED}::test_an_increment_holds_what_was_written_and_nothing_else",),
    ),
    Mutation(
        "write-to-a-saved-page-not-noted",
        7,
        FAULT_LOOP,
        "        rc = let_pass(core, b, page, _done_ahead(core, b, page))\n",
        "        rc = unprotect(core, b, page, 1, True)\n",
        (f"{WATCHED}::test_a_write_while_the_instant_is_saved_is_of_the_next_one",),
    ),
    Mutation(
        "saving-fault-not-noted",
        7,
        CLAIMS,
        "            sf_fetch_or(&b.noted[word], won)\n",
        "            pass\n",
        (f"{WATCHED}::test_a_write_while_the_instant_is_saved_is_of_the_next_one",),
    ),
    Mutation(
        "armed-fault-not-noted",
        7,
        DIRTY,
        "        sf_fetch_or(&b.noted[first >> 6], (((<uint64_t>1) << pages) - 1)",
        "        sf_fetch_or(&b.noted[first >> 6], 0 * (((<uint64_t>1) << pages) - 1)",
        (f"{WATCHED}::test_an_increment_holds_what_was_written_and_nothing_else",),
    ),
    Mutation(
        "faulted-of-the-job-before-left",
        2,
        DIRTY,
        "    sf_fetch_and(&b.faulted[word], ~bits)",
        "    pass",
        (f"{WATCHED}::test_the_chain_is_ram_at_each_instant",),
    ),
    Mutation(
        "given-back-while-saving-forgotten",
        7,
        EVENTS,
        "            sf_fetch_or(&b.removed[page >> 6], (<uint64_t>1) << (page & 63))\n",
        "            if phase == ARMED:\n"
        "                sf_fetch_or(&b.removed[page >> 6], (<uint64_t>1) << (page & 63))\n",
        (f"{WATCHED}::test_pages_given_back_while_the_instant_is_saved_are_of_the_next_one",),
    ),
    Mutation(
        "store-entry-before-data",
        13,
        "src/stillframe/store/writing.py",
        "            found = enter(self._backend, entry)\n",
        "            self._drop_note()\n            found = enter(self._backend, entry)\n",
        (HISTORY, INTERLEAVED),
    ),
    Mutation(
        "store-named-before-synced",
        13,
        "src/stillframe/store/backends/local.py",
        "            os.fsync(self._fd)\n",
        "            pass\n",
        ("tests/unit/store/test_durable_first.py",),
    ),
    Mutation(
        "store-parents-ignored",
        11,
        "src/stillframe/store/removing.py",
        "            if parent.id in going:\n",
        "            if False:\n",
        ("tests/unit/store/test_store.py",),
    ),
    Mutation(
        "store-parents-removed-first",
        13,
        "src/stillframe/store/removing.py",
        "key=lambda one: -len(_parents(catalog, one))",
        "key=lambda one: len(_parents(catalog, one))",
        (HISTORY,),
    ),
    Mutation(
        "store-data-removed-first",
        13,
        "src/stillframe/store/removing.py",
        "            backend.delete(catalog_key(entry.id))\n            finish(",
        "            delete_data(backend, entry.name)\n"
        "            backend.delete(catalog_key(entry.id))\n            finish(",
        (HISTORY,),
    ),
    Mutation(
        "store-looks-before-it-notes",
        11,
        "src/stillframe/store/removing.py",
        "        at_work = [note for note in read_notes(backend, PENDING)"
        " if not note.worker.is_gone]\n",
        "        at_work = []\n",
        (INTERLEAVED,),
    ),
    Mutation(
        "store-catalog-before-notes",
        11,
        "src/stillframe/store/writing.py",
        '        raise BusyError(f"snapshot {entry.label} is being removed")\n',
        "        return\n",
        (INTERLEAVED,),
    ),
    Mutation(
        "store-whole-form-counts-early",
        13,
        "src/stillframe/store/catalog.py",
        "(beside is not None and beside.since_s is not None)",
        "beside is not None",
        (HISTORY, INTERLEAVED),
    ),
    Mutation(
        "store-plan-taken-for-done",
        13,
        "src/stillframe/store/store.py",
        "planned=planned if dry_run else (),",
        "planned=planned,",
        ("tests/unit/store/test_compaction.py",),
    ),
    Mutation(
        "store-second-whole-form-counts",
        13,
        "src/stillframe/store/compaction.py",
        "counts = enter_form(backend, entry.name, form) == form",
        "counts = enter_form(backend, entry.name, form) is not None",
        ("tests/unit/store/test_compaction.py",),
    ),
    Mutation(
        "store-whole-form-of-another",
        7,
        "src/stillframe/still/container.py",
        "if self.manifest.whole_of != increment.id or",
        "if",
        ("tests/unit/store/test_compaction.py",),
    ),
    Mutation(
        "store-parents-not-kept-for-a-day",
        11,
        "src/stillframe/store/removing.py",
        "if not catalog.wholes or backend.path(CONFIG) is not None:",
        "if True:",
        ("tests/unit/store/test_compaction.py",),
    ),
    Mutation(
        "store-compacts-without-a-page",
        1,
        "src/stillframe/still/compact.py",
        "        if length >= FRAME_RAW_TARGET_BYTES:\n            yield section\n",
        "        if length >= FRAME_RAW_TARGET_BYTES:\n"
        "            section.runs or (yield section)\n",
        ("tests/unit/still/test_compact.py",),
    ),
    Mutation(
        "store-removal-comes-back",
        13,
        "src/stillframe/store/repair.py",
        '        if backend.listing(f"{REMOVING}{entry.name}."):\n',
        "        if False:\n",
        (INTERLEAVED,),
    ),
    Mutation(
        "clones-data-taken-for-zeroes",
        10,
        "src/stillframe/image/live_image.py",
        "                self.files.pages[position].mark_data(\n",
        "                (lambda *_: None)(\n",
        (f"{FORK}::test_all_of_ram_is_the_instants[memfd]",),
    ),
    Mutation(
        "clones-spilled-pages-not-asked-for",
        10,
        "src/stillframe/image/live_image.py",
        "                self._asking.take_spilled()\n",
        "                pass\n",
        (f"{FORK}::test_they_have_what_they_touch_before_it_is_swept",),
    ),
    Mutation(
        "clones-outlive-who-fills-them",
        10,
        "src/stillframe/image/end_process.py",
        "            signal.pidfd_send_signal(pidfd, signal.SIGKILL)\n",
        "            pass\n",
        (f"{FORK}::test_the_forking_process_dies",),
    ),
    Mutation(
        "only-one-block-waits",
        10,
        "src/stillframe/image/clone.py",
        "        ranges = list(zip(addresses, lengths, strict=True))\n",
        "        ranges = list(zip(addresses, lengths, strict=True))[:1]\n",
        (f"{FORK}::test_all_of_ram_is_the_instants[NUMA]",),
    ),
    Mutation(
        "clones-disks-not-frozen",
        1,
        "src/stillframe/disks/point_in_time.py",
        "        self._qmp.execute(*command)\n",
        "        pass\n",
        (f"{FORK_DISKS}::test_every_clone_shows_one_instant",),
    ),
    Mutation(
        "clones-image-folded",
        11,
        "src/stillframe/disks/folding.py",
        "        if users := users_of(below, besides=pid):\n",
        "        if users := ():\n",
        (f"{FORK_DISKS}::test_a_clone_of_a_clone_holds_the_image",),
    ),
    Mutation(
        "clones-run-on-images-that-are-written-to",
        11,
        "src/stillframe/restore/live_fork.py",
        "        if not self._is_kept:\n",
        "        if False:\n",
        (f"{FORK_DISKS}::test_a_fork_that_fails_goes_back",),
    ),
    Mutation(
        "needed-disks-removed",
        11,
        "src/stillframe/restore/restored.py",
        "            if not _is_needed(directory):\n",
        "            if True:\n",
        (
            f"{FORK_DISKS}::test_a_snapshot_of_a_clone_holds_its_disks",
            f"{FORK_DISKS}::test_a_clone_of_a_clone_holds_the_image",
        ),
    ),
    Mutation(
        "merged-pages-unseen",
        7,
        "src/stillframe/machine/process/preflight_host.py",
        '    if _has_flag(inspection, frozenset({"mg"})):\n',
        "    if False:\n",
        ("tests/unit/machine/test_preflight.py",),
    ),
    Mutation(
        "pinned-page-in-anothers-place",
        7,
        "src/stillframe/capture/_pins.pxd",
        "        at = to + ((page - first) << b.shift)\n",
        "        at = to\n",
        (f"{PROCESS}::test_shared_pages_that_are_pinned_are_saved_after_they_were_punched_out",),
    ),
    Mutation(
        "pinned-pages-not-read",
        7,
        "src/stillframe/capture/_pins.pxd",
        "sf_pins_read(b.pins, offset, at)",
        "1",
        (f"{PROCESS}::test_shared_pages_that_are_pinned_are_saved_after_they_were_punched_out",),
    ),
    Mutation(
        "stale-pages-read-from-the-pins",
        7,
        "src/stillframe/capture/_pins.pxd",
        "    b.unpinned[word] |= gone\n",
        "    pass\n",
        (f"{PROCESS}::test_what_was_punched_out_while_armed_is_another_page_than_the_pinned_one",),
    ),
    Mutation(
        "human-guard-hangs-up",
        4,
        "src/stillframe/machine/qemu/human_guard.py",
        '    if mode == "background":\n        drain(stream)\n',
        "    pass\n",
        ("tests/integration/test_take_human.py::test_kill_9[stock-migrating-background]",),
    ),
    Mutation(
        "human-guard-leaves-it-stopped",
        4,
        "src/stillframe/machine/qemu/human_guard.py",
        '            say(monitor, "cont")\n',
        "            pass\n",
        ("tests/integration/test_take_human.py::test_kill_9[stock-migrating-stop]",),
    ),
    Mutation(
        "image-not-held-by-its-vms",
        11,
        "src/stillframe/restore/complete_image.py",
        "return (self._image.lock, *self.files.values())",
        "return (*self.files.values(),)",
        (f"{IMAGES}::test_it_stays_while_a_vm_runs_on_it",),
    ),
    Mutation(
        "image-mapped-shared",
        11,
        "src/stillframe/restore/complete_image.py",
        "snapshot.blocks, share=False)",
        "snapshot.blocks, share=True)",
        (f"{IMAGES}::test_vms_on_it_have_the_snapshots_ram_and_go_on",),
    ),
    Mutation(
        "image-without-the-parents-pages",
        7,
        "src/stillframe/image/keeping.py",
        "self._copy_rest(new, manifest.blocks, self._parent)",
        "pass",
        (
            f"{TAKE_IMAGE}::test_that_of_an_increment_is_whole",
            f"{TAKE_IMAGE}::test_that_of_a_restored_vm_whose_unchanged_pages_nobody_reads",
        ),
    ),
    Mutation(
        "parents-pages-over-newer-ones",
        7,
        "src/stillframe/image/keeping.py",
        '[first : first + pages] = b"\\1" * pages',
        '[first : first] = b""',
        (f"{TAKE_IMAGE}::test_that_of_an_increment_is_whole",),
    ),
    Mutation(
        "image-that-was-written-to",
        7,
        "src/stillframe/image/stored.py",
        "(block.length_bytes, block.changed_ns):",
        "(block.length_bytes, status.st_ctime_ns):",
        (f"{IMAGES}::test_a_damaged_one_is_passed_over",),
    ),
    Mutation(
        "image-of-a-whole-form-under-the-id",
        7,
        "src/stillframe/image/cached.py",
        "image.record.content_id in (snapshot_id, content_id)",
        "True",
        (f"{IMAGES}::test_a_whole_form_makes_no_image_for_the_snapshot_itself",),
    ),
    Mutation(
        "image-written-in-the-stop",
        6,
        "src/stillframe/image/keeping.py",
        'options.mode == "stop"',
        "False",
        (f"{TAKE_IMAGE}::test_while_the_guest_stands_still_nothing_is_written_to_the_image",),
    ),
    Mutation(
        "guest-waits-for-the-images-disk",
        4,
        "src/stillframe/image/keeping.py",
        "                self._check_waiting()\n",
        "                pass\n",
        (f"{TAKE_IMAGE}::test_the_guest_does_not_wait_for_a_slow_disk_of_the_image",),
    ),
    Mutation(
        "late-remover-takes-a-new-image",
        11,
        "src/stillframe/image/cached.py",
        "                if not _is_still_there(lock, directory):\n",
        "                if False:\n",
        ("tests/unit/image/test_cached.py::test_whoever_comes_late_removes_no_new_one",),
    ),
    Mutation(
        "vm-on-an-image-that-nobody-knows",
        11,
        "src/stillframe/restore/start.py",
        "            self._announce(complete.image_files)\n",
        "",
        (f"{HARDSHIP}::test_who_restores_on_a_complete_image_is_killed",),
    ),
)


def build(copy: Path, mutated: str) -> None:
    """Put the installed native modules in place, and compile those of a mutated room anew."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    installed = Path(sysconfig.get_paths()["platlib"]) / "stillframe"
    for built in (*installed.rglob(f"*{suffix}"), *installed.rglob("*.elf")):
        place = copy / "src/stillframe" / built.relative_to(installed)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(built, place)
    folder = (copy / mutated).parent
    for source in sorted(folder.glob("*.pyx")) if not mutated.endswith(".py") else ():
        generated = copy / f"{source.stem}.c"
        subprocess.run(
            [sys.executable, "-m", "cython", "-3", str(source), "--output-file", str(generated)],
            check=True,
            capture_output=True,
        )
        command = ["gcc", "-shared", "-fPIC", "-O2", "-D_GNU_SOURCE", "-fno-strict-aliasing"]
        command += [f"-I{sysconfig.get_paths()['include']}", f"-I{source.parent}", str(generated)]
        library = source.with_name(f"{source.stem}{suffix}")
        subprocess.run([*command, "-o", str(library)], check=True)


def survives(mutation: Mutation) -> str | None:
    """None if a test caught it, else why not."""
    with tempfile.TemporaryDirectory(prefix="stillframe-broken-") as place:
        copy = Path(place) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.still"))
        file = copy / mutation.file
        text = file.read_text()
        if mutation.old not in text:
            return "the text to break is not there any more"
        file.write_text(text.replace(mutation.old, mutation.new))
        build(copy, mutation.file)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=120", *mutation.tests]
        try:
            done = subprocess.run(
                command,
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy / "src")},
                timeout=TEST_TIMEOUT_S,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:  # one test that hangs fails before
            return f"the tests took longer than {TEST_TIMEOUT_S} s"
        if done.returncode == 1:
            return None
        return f"the tests ended with {done.returncode}: {done.stdout.strip()[-200:]}"


def main() -> int:
    wanted = sys.argv[1:]
    failures = 0
    for mutation in MUTATIONS:
        if wanted and mutation.name not in wanted:
            continue
        reason = survives(mutation)
        verdict = "caught" if reason is None else f"NOT CAUGHT: {reason}"
        failures += reason is not None
        print(f"{mutation.invariant}  {mutation.name}: {verdict}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
