/* What an ordinary program does with memory, for the tests of the preload library. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(x)                                                                                              \
    do {                                                                                                      \
        if (!(x)) {                                                                                           \
            fprintf(stderr, "line %d: %s failed, errno %d\n", __LINE__, #x, errno);                           \
            exit(1);                                                                                          \
        }                                                                                                     \
    } while (0)

static const size_t page = 4096;

static void mappings(void)
{
    char *shared = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    memset(shared, 1, 4 * page);
    /* Shared with a child, which is not attached and unmaps its own copy. */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        shared[0] = 2;
        CHECK(munmap(shared, 4 * page) == 0);
        char *own = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK(own != MAP_FAILED && munmap(own, page) == 0);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(shared[0] == 2 && shared[page] == 1);
    char *moved = mremap(shared, 4 * page, 2 * page, 0);
    CHECK(moved == shared);
    moved = mremap(shared, 2 * page, 4 * page, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED && moved[0] == 2);
    CHECK(mprotect(moved, page, PROT_READ) == 0);
    CHECK(madvise(moved + page, page, MADV_DONTNEED) == 0);
    CHECK(moved[page] == 1);
    CHECK(posix_madvise(moved, page, POSIX_MADV_DONTNEED) == 0);
    errno = 0;
    CHECK(munmap(moved + 1, page) == -1 && errno == EINVAL);
    CHECK(munmap(moved, 4 * page) == 0);

    int fd = memfd_create("program", 0);
    CHECK(fd >= 0 && ftruncate(fd, 2 * page) == 0);
    char *file = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(file != MAP_FAILED);
    file[0] = 3;
    CHECK(ftruncate(fd, 4 * page) == 0);
    char *more = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(more != MAP_FAILED && more[0] == 3);
    CHECK(munmap(file, 2 * page) == 0 && munmap(more, 4 * page) == 0);
    errno = 0;
    CHECK(mmap(NULL, page, PROT_READ, MAP_SHARED, 9999, 0) == MAP_FAILED && errno == EBADF);

    int id = shmget(IPC_PRIVATE, page, 0600);
    CHECK(id >= 0);
    char *segment = shmat(id, NULL, 0);
    CHECK(segment != (void *)-1);
    shmctl(id, IPC_RMID, NULL);
    segment[0] = 4;
    CHECK(shmdt(segment) == 0);

    char *top = sbrk(0);
    CHECK(sbrk(2 * page) == top);
    top[page] = 5;
    CHECK(brk(top) == 0 && sbrk(0) == top);
}

static void *allocate(void *argument)
{
    unsigned seed = (unsigned)(uintptr_t)argument;
    unsigned char *live[64] = {0};
    size_t size[64] = {0};
    for (int i = 0; i < 20000; i++) {
        int k = rand_r(&seed) % 64;
        for (size_t j = 0; j < size[k]; j += 97)
            CHECK(live[k][j] == (unsigned char)(k + 1));
        size_t want = (size_t)rand_r(&seed) % (i % 100 == 0 ? 300000 : 2000) + 1;
        switch (rand_r(&seed) % 4) {
        case 0:
            free(live[k]);
            live[k] = malloc(want);
            break;
        case 1:
            free(live[k]);
            live[k] = calloc(1, want);
            for (size_t j = 0; j < want; j++)
                CHECK(live[k][j] == 0);
            break;
        case 2:
            live[k] = realloc(live[k], want);
            break;
        default:
            free(live[k]);
            CHECK(posix_memalign((void **)&live[k], 256, want) == 0);
            CHECK((uintptr_t)live[k] % 256 == 0);
        }
        CHECK(live[k] != NULL && malloc_usable_size(live[k]) >= want);
        /* All that may be used, not only what was asked for. */
        size[k] = malloc_usable_size(live[k]);
        memset(live[k], k + 1, size[k]);
    }
    for (int k = 0; k < 64; k++)
        free(live[k]);
    return NULL;
}

static int in_arena(const void *p)
{
    char line[512];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps);
    while (fgets(line, sizeof line, maps)) {
        uintptr_t start, end;
        if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start <= (uintptr_t)p && (uintptr_t)p < end)
            found = strstr(line, "tlbridge-heap") != NULL;
    }
    fclose(maps);
    return found;
}

static void heap(int expect_arena)
{
    pthread_t threads[3];
    for (uintptr_t i = 0; i < 3; i++)
        CHECK(pthread_create(&threads[i], NULL, allocate, (void *)(i + 1)) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    char *p = malloc(100);
    strcpy(p, "parent");
    CHECK(in_arena(p) == expect_arena);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(strcmp(p, "parent") == 0);
        strcpy(p, "child");
        p = realloc(p, 5000);
        CHECK(p && strcmp(p, "child") == 0 && !in_arena(p));
        free(p);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(strcmp(p, "parent") == 0);
    free(p);
}

int main(int argc, char **argv)
{
    mappings();
    heap(argc > 1 && strcmp(argv[1], "arena") == 0);
    puts("done");
    return 0;
}
