// Tells the thread sanitizer what OpenMP orders: gcc's runtime is not instrumented, so that every parallel region would
// be reported. The compiler's calls of the runtime come here; a new construct in the kernels needs its call here too.
// Empty in every other build.
#if defined(__SANITIZE_THREAD__)
#include <dlfcn.h>

extern "C" {

void __tsan_acquire(void* address);
void __tsan_release(void* address);

struct Region {
  void (*function)(void*);
  void* data;
};

static void run_region(void* address) {
  const Region* const region = static_cast<const Region*>(address);
  __tsan_acquire(address);
  region->function(region->data);
  __tsan_release(address);
}

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{function, data};
  __tsan_release(&region);
  parallel(run_region, &region, threads, flags);
  __tsan_acquire(&region);
}

// All teams use one address. So threads that do not share a barrier appear ordered too if their waits overlap.
static char barrier;

static void wait_in(const char* name) {
  const auto wait = reinterpret_cast<void (*)()>(dlsym(RTLD_NEXT, name));
  __tsan_release(&barrier);
  wait();
  __tsan_acquire(&barrier);
}

void GOMP_barrier() { wait_in("GOMP_barrier"); }
void GOMP_loop_end() { wait_in("GOMP_loop_end"); }
}
#endif
