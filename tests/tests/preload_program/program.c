/* An ordinary program that uses shared memory and knows nothing of tlbridge. It does what it is told on
 * standard input and says where things are. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static const size_t length = 1 << 20;

static void fill(uint64_t *at, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i < bytes / 8; i++)
        at[i] = seed + i;
}

int main(void)
{
    char command[64];
    uint64_t *block = NULL;
    uint64_t *heap = NULL;

    while (fgets(command, sizeof command, stdin)) {
        command[strcspn(command, "\n")] = 0;
        if (!strcmp(command, "map")) {
            block = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
            if (block == MAP_FAILED)
                return 2;
            fill(block, length, 1000);
        } else if (!strcmp(command, "unmap")) {
            if (munmap(block, length))
                return 3;
        } else if (!strcmp(command, "move")) {
            /* Something right behind the block, so that growing has to move it. */
            mmap((char *)block + length, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            uint64_t *to = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            block = mremap(block, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
            if (block != to)
                return 4;
        } else if (!strcmp(command, "protect")) {
            if (mprotect(block, length, PROT_READ))
                return 5;
        } else if (!strcmp(command, "allocate")) {
            heap = malloc(length);
            fill(heap, length, 5000);
            printf("%p\n", (void *)heap);
            fflush(stdout);
            continue;
        } else if (!strcmp(command, "value")) {
            printf("%lu\n", (unsigned long)block[0]);
            fflush(stdout);
            continue;
        } else {
            return 9;
        }
        printf("%p\n", (void *)block);
        fflush(stdout);
    }
    return 0;
}
