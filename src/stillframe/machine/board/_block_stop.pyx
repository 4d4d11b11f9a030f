# cython: language_level=3, boundscheck=False, wraparound=False
# cython: freethreading_compatible=True
"""Stops a Unicorn engine between two translation blocks, and nowhere else.

``uc_emu_stop`` from another thread takes effect after any memory access and sets RIP back to the
start of the instruction that made it (Unicorn 2.1.4, ``helper_check_exit_request`` in
qemu/accel/tcg/tcg-runtime.c): an instruction that reads, changes and writes memory is then executed
twice. So the stop comes from a block hook, in the thread that runs the guest. It is native, since
it is called for every block.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

ctypedef int (*emu_stop_function)(void *engine) noexcept nogil

cdef struct Request:
    uint8_t wanted
    emu_stop_function emu_stop

cdef void on_block(void *engine, uint64_t address, uint32_t size, void *data) noexcept nogil:
    # volatile: another thread writes it; no order with other memory is needed, since whoever asks
    # and whoever runs take the board lock before and after
    cdef volatile uint8_t *wanted = &(<Request *>data).wanted
    if wanted[0]:
        (<Request *>data).emu_stop(engine)


cdef class BlockStop:
    """The request to one engine. ``hook_address`` and ``data_address`` are for ``uc_hook_add``."""

    cdef Request request

    def __cinit__(self, uintptr_t emu_stop_address):
        self.request.wanted = 0
        self.request.emu_stop = <emu_stop_function>emu_stop_address

    def ask(self):
        (<volatile uint8_t *>&self.request.wanted)[0] = 1

    def clear(self):
        (<volatile uint8_t *>&self.request.wanted)[0] = 0

    @property
    def hook_address(self):
        return <uintptr_t>&on_block

    @property
    def data_address(self):
        return <uintptr_t>&self.request
