/* The C interface, from C. */
#include "tlbridge.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(x)                                                                                              \
    do {                                                                                                      \
        if (!(x)) {                                                                                           \
            fprintf(stderr, "line %d: %s failed, errno %d: %s\n", __LINE__, #x, errno, tlb_last_error());     \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    CHECK(tlb_alive() == -1 && errno == ENOTCONN && strstr(tlb_last_error(), "not attached"));
    CHECK(tlb_attach("/nonexistent/socket", "c") == -1 && errno == ENOENT);
    CHECK(strstr(tlb_last_error(), "/nonexistent/socket"));
    CHECK(tlb_attach(argv[1], "c") == 0 && tlb_attach(argv[1], "c") == 0);
    CHECK(tlb_alive() == 0);
    int fd = tlb_memory_create(8192, "from-c");
    CHECK(fd >= 0);
    uint64_t mapped = 0, unmapped = 0;
    char *p = tlb_mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0, &mapped);
    CHECK(p != MAP_FAILED && mapped > 0);
    CHECK(tlb_mprotect(p, 4096, PROT_READ, NULL) == 0);
    CHECK(tlb_munmap(p, 8192, &unmapped) == 0 && unmapped > mapped && tlb_generation() == unmapped);
    tlb_context *context = tlb_context_create(2, 1024, 0);
    CHECK(context && tlb_context_cbs(context) == 2 && tlb_context_ds_bytes(context) == 1024);
    char back[5];
    CHECK(tlb_ds_write(context, 8, "hello", 5) == 0 && tlb_ds_read(context, 8, back, 5) == 0);
    CHECK(memcmp(back, "hello", 5) == 0);
    struct tlb_instruction load = tlb_instruction_vload((uint64_t)(uintptr_t)p, 0, TLB_DWORD, 8, 1);
    CHECK(load.nelem == 8 && load.baddr0 == (uint64_t)(uintptr_t)p);
    CHECK(tlb_gru_execute(context, 7, &load, NULL) == -1 && errno == EINVAL);
    tlb_context_destroy(context);
    close(fd);
    CHECK(tlb_detach() == 0);
    CHECK(tlb_alive() == -1);
    puts("done");
    return 0;
}
