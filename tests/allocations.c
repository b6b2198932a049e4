// Counts the allocations that some libraries make: preloaded by test_allocations.py, for glibc.
#include <stddef.h>
#include <stdint.h>

enum { kMost = 8 };
static uintptr_t begins[kMost], ends[kMost];
static int libraries;
static long count;

void watch(uintptr_t begin, uintptr_t end) {
  begins[libraries] = begin;
  ends[libraries++] = end;
}

long allocations(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }

static void note(void* caller) {
  for (int i = 0; i < libraries; ++i) {
    if ((uintptr_t)caller >= begins[i] && (uintptr_t)caller < ends[i]) __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  }
}

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

#define CALLER __builtin_return_address(0)

// C++: operator new and its kin call malloc from the standard library; these count for their caller.
void* _Znwm(size_t size) { return note(CALLER), __libc_malloc(size); }
void* _Znam(size_t size) { return note(CALLER), __libc_malloc(size); }
void* _ZnwmRKSt9nothrow_t(size_t size, const void* tag) { return note(CALLER), __libc_malloc(size); }
void* _ZnwmSt11align_val_t(size_t size, size_t alignment) { return note(CALLER), __libc_memalign(alignment, size); }
void* malloc(size_t size) { return note(CALLER), __libc_malloc(size); }
void* calloc(size_t items, size_t size) { return note(CALLER), __libc_calloc(items, size); }
void* realloc(void* old, size_t size) { return note(CALLER), __libc_realloc(old, size); }
void* memalign(size_t alignment, size_t size) { return note(CALLER), __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return note(CALLER), __libc_memalign(alignment, size); }
int posix_memalign(void** found, size_t alignment, size_t size) {
  note(CALLER);
  *found = __libc_memalign(alignment, size);
  return *found ? 0 : 12;
}
