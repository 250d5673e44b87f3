/*
 * tlbridge: a device that caches this process' address translations and keeps them coherent with its page
 * tables. Library: libtlbridge_agent.so. Language: C99.
 *
 * Device-visible memory is shared memory on memfds (tlb_memory_create), mapped with tlb_mmap, or with mmap
 * when the library is loaded by LD_PRELOAD or linked before libc.
 *
 * The covered calls return when no device can reach the old pages any more. They set errno as the system
 * calls do, may be used in signal handlers, and without an attachment are the plain system calls. A non-null
 * `generation` receives the call's generation: an instruction that was issued after the call returned never
 * completes with a smaller tag for that range. After a fork the child is not attached.
 *
 * The other functions answer -1 or NULL on failure, set errno, and keep a text for tlb_last_error. They must
 * not be used in signal handlers.
 */
#ifndef TLBRIDGE_H
#define TLBRIDGE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Attach this process to the host daemon at `socket` (NULL: $TLBRIDGE_SOCKET) under `name` (NULL: "program").
 * Attached already: 0. */
int tlb_attach(const char *socket, const char *name);
/* End the attachment, when the daemon has taken every translation back. */
int tlb_detach(void);
/* 0 while attached with daemon and device alive; else -1, and tlb_last_error says who is gone. */
int tlb_alive(void);
/* The address space's generation now; 0 without an attachment. */
uint64_t tlb_generation(void);
/* What went wrong last in this thread, in words. Valid until the thread's next failing call. */
const char *tlb_last_error(void);

/* New device-visible memory of `len` bytes: a memfd that cannot be resized. The caller closes it. */
int tlb_memory_create(uint64_t len, const char *name);

/* Covered calls. */
void *tlb_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset, uint64_t *generation);
int tlb_munmap(void *addr, size_t len, uint64_t *generation);
void *tlb_mremap(void *old, size_t old_len, size_t new_len, int flags, void *new_addr, uint64_t *generation);
int tlb_madvise(void *addr, size_t len, int advice, uint64_t *generation);
int tlb_mprotect(void *addr, size_t len, int prot, uint64_t *generation);

/* A GRU context: control blocks that run instructions, and a data segment. Threads may use different control
 * blocks of one context at the same time. */
typedef struct tlb_context tlb_context;

/* At least `cbs` control blocks (at most 128) and `ds_bytes` bytes of data segment (at most 32768).
 * user_polling != 0: the waiting thread reports misses itself; 0: they are served by interrupt. */
tlb_context *tlb_context_create(uint32_t cbs, uint32_t ds_bytes, int user_polling);
void tlb_context_destroy(tlb_context *context);
uint32_t tlb_context_cbs(const tlb_context *context);
uint32_t tlb_context_ds_bytes(const tlb_context *context);
int tlb_ds_write(const tlb_context *context, uint32_t offset, const void *data, size_t len);
int tlb_ds_read(const tlb_context *context, uint32_t offset, void *data, size_t len);

/* An instruction: the words DW0 to DW5 of a control block. Use the functions below to make one. */
struct tlb_instruction {
    uint64_t control;
    uint64_t idef4;
    uint64_t baddr0;
    uint64_t nelem;
    uint64_t stride_op1;
    uint64_t baddr1_value_op2;
};

/* Element types. */
enum { TLB_BYTE = 0, TLB_SHORT = 1, TLB_WORD = 2, TLB_DWORD = 3, TLB_CACHE_LINE = 6 };
/* tlb_instruction_gamir. */
enum { TLB_FETCH = 0x01, TLB_CLEAR = 0x02, TLB_INC = 0x05, TLB_DEC = 0x07 };
/* tlb_instruction_gamer. */
enum { TLB_SWAP = 0x00, TLB_OR = 0x01, TLB_AND = 0x02, TLB_XOR = 0x03, TLB_ADD = 0x04, TLB_CSWAP = 0x08 };

/* `va`: address in this process; `ds`: byte offset in the data segment; `stride`: in elements. */
struct tlb_instruction tlb_instruction_vload(uint64_t va, uint32_t ds, uint8_t xtype, uint64_t nelem,
                                             uint64_t stride);
struct tlb_instruction tlb_instruction_vstore(uint64_t va, uint32_t ds, uint8_t xtype, uint64_t nelem,
                                              uint64_t stride);
struct tlb_instruction tlb_instruction_vset(uint64_t va, uint64_t value, uint8_t xtype, uint64_t nelem,
                                            uint64_t stride);
/* Copy through `lines` 64-byte lines of the data segment at `ds`. */
struct tlb_instruction tlb_instruction_bcopy(uint64_t src, uint64_t dst, uint32_t ds, uint32_t lines,
                                             uint8_t xtype, uint64_t nelem);
struct tlb_instruction tlb_instruction_gamir(uint64_t va, uint8_t op, uint8_t xtype);
struct tlb_instruction tlb_instruction_gamer(uint64_t va, uint8_t op, uint64_t op1, uint64_t op2, uint8_t xtype);

/* How an instruction ended. */
struct tlb_completion {
    uint64_t avalue;            /* old value of an atomic */
    uint64_t tag;               /* smallest generation of the translations used; UINT64_MAX: none */
    uint32_t ecause;            /* exception: cause bits, else 0 */
    uint32_t opc;               /* exception: operation code */
    uint64_t exception_address; /* exception: address reached */
};

/* Run an instruction on a control block and wait for its end. 0: done; 1: the device raised an exception (see
 * `completion`); -1: no answer. `completion` may be NULL. */
int tlb_gru_execute(const tlb_context *context, uint32_t cb, const struct tlb_instruction *instruction,
                    struct tlb_completion *completion);

#ifdef __cplusplus
}
#endif

#endif
