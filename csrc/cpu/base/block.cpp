#include "cpu/base/block.h"

#include <cstdlib>

#include "common/reuse.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqaccel::inline base {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;

size_t alignment(size_t bytes) { return bytes >= 2 * kHugePage ? kHugePage : 64; }

}  // namespace

size_t block_size(size_t bytes) noexcept {
  const size_t align = alignment(bytes);
  return bytes ? (bytes + align - 1) / align * align : align;
}

Block new_block(size_t bytes) noexcept {
  const size_t size = block_size(bytes), align = alignment(bytes);
  void* const data = std::aligned_alloc(align, size);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data && align == kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
  fill_fresh(data, size);
  return {data, size};
}

}  // namespace seqaccel::inline base
