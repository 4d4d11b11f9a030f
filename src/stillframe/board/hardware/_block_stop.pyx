# cython: language_level=3, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True
"""Stops a Unicorn engine between two translation blocks, and nowhere else.

``uc_emu_stop`` from another thread takes effect after any memory access and sets RIP back to the
start of the instruction that made it (Unicorn 2.1.4, ``helper_check_exit_request`` in
qemu/accel/tcg/tcg-runtime.c): an instruction that reads, changes and writes memory is then executed
twice. So the stop comes from a block hook, in the thread that runs the guest. It is native, since
it is called for every block. For an interrupt it stops before the first block that may be
interrupted (Intel SDM 3A, 6.8.1: RFLAGS.IF), as a processor does.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

ctypedef int (*emu_stop_function)(void *engine) noexcept nogil
ctypedef int (*reg_read_function)(void *engine, int number, void *value) noexcept nogil

cdef uint64_t FLAG_INTERRUPTS = 1 << 9

cdef struct Request:
    uint8_t wanted
    uint8_t wanted_when_enabled
    uint8_t stopped
    int flags_number
    emu_stop_function emu_stop
    reg_read_function reg_read

cdef void on_block(void *engine, uint64_t address, uint32_t size, void *data) noexcept nogil:
    # volatile: another thread writes them; no order with other memory is needed, since whoever asks
    # and whoever runs take the board lock before and after
    cdef Request *request = <Request *>data
    cdef volatile uint8_t *wanted = &request.wanted
    cdef volatile uint8_t *wanted_when_enabled = &request.wanted_when_enabled
    cdef uint64_t flags = 0
    if not wanted[0]:
        if not wanted_when_enabled[0]:
            return
        request.reg_read(engine, request.flags_number, &flags)
        if not flags & FLAG_INTERRUPTS:
            return
    request.stopped = 1
    request.emu_stop(engine)


cdef class BlockStop:
    """The request to one engine. ``hook_address`` and ``data_address`` are for ``uc_hook_add``."""

    cdef Request request

    def __cinit__(self, uintptr_t emu_stop_address, uintptr_t reg_read_address, int flags_number):
        self.request.wanted = self.request.wanted_when_enabled = self.request.stopped = 0
        self.request.flags_number = flags_number
        self.request.emu_stop = <emu_stop_function>emu_stop_address
        self.request.reg_read = <reg_read_function>reg_read_address

    def ask(self):
        (<volatile uint8_t *>&self.request.wanted)[0] = 1

    def ask_when_enabled(self):
        (<volatile uint8_t *>&self.request.wanted_when_enabled)[0] = 1

    def clear(self):
        (<volatile uint8_t *>&self.request.wanted)[0] = 0
        (<volatile uint8_t *>&self.request.wanted_when_enabled)[0] = 0
        self.request.stopped = 0

    @property
    def stopped(self):
        return bool(self.request.stopped)

    @property
    def hook_address(self):
        return <uintptr_t>&on_block

    @property
    def data_address(self):
        return <uintptr_t>&self.request
