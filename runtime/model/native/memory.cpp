// How memory is had from the system. A page costs when it is touched first: filling it with zeros takes
// longer than many a kernel takes to fill it with numbers.

#include <malloc.h>
#include <sys/mman.h>

#include <cstdint>

extern "C" {

// Keeps what a step gave back for the next one, as far as the allocator lets us: up to 32 MiB each.
void keep_memory() {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
}

// Asks for large pages, of which there are fewer to be had, and later to be looked up.
void use_large_pages(char* memory, long bytes) {
    constexpr uintptr_t page = 2 << 20;
    const auto from = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const auto to = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
}

}  // extern "C"
