#include "cpu/base/pool.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "common/reuse.h"

namespace seqaccel::inline base {
namespace {

constexpr size_t kSmallest = size_t(128) << 10;  // malloc may return pages of larger blocks to the system
constexpr size_t kUnused = size_t(256) << 20;    // bytes of all blocks that no tensor uses

// The pool is never destroyed, since tensors and sessions may outlive static objects.
struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;  // unused ones; the last one was given back last
  size_t unused = 0;

  static Pool& instance() {
    static Pool* const pool = new Pool;
    return *pool;
  }
};

void give_back(void* data, void* size) { give_block({data, reinterpret_cast<size_t>(size)}); }

// torch_from_blob of torch 2.11's stable ABI; null before.
using FromBlob = AOTITorchError (*)(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides,
                                    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
                                    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

FromBlob from_blob() {
  static const FromBlob function = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
}

}  // namespace

// Takes the smallest block that has room and is not much larger; of equal ones, the one used last. Else allocates one.
Block take_block(size_t bytes) {
  const size_t size = block_size(bytes);
  Pool& pool = Pool::instance();
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    auto found = pool.blocks.end();
    for (auto block = pool.blocks.begin(); block != pool.blocks.end(); ++block) {
      const bool fits = block->size >= size && block->size <= size + size / 4;
      if (fits && (found == pool.blocks.end() || block->size <= found->size)) found = block;
    }
    if (found != pool.blocks.end()) {
      const Block block = *found;
      pool.blocks.erase(found);
      pool.unused -= block.size;
      return block;
    }
  }
  return new_block(bytes);
}

void give_block(Block block) noexcept {
  if (!kReuse || block.size > kUnused) return std::free(block.data);
  Pool& pool = Pool::instance();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  while (pool.unused + block.size > kUnused) {  // the oldest first
    pool.unused -= pool.blocks.front().size;
    std::free(pool.blocks.front().data);
    pool.blocks.erase(pool.blocks.begin());
  }
  pool.blocks.push_back(block);
  pool.unused += block.size;
}

Tensor new_pooled(const Tensor& like, const Extents& sizes) {
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (bytes < kSmallest || from_blob() == nullptr) return new_tensor(like, sizes);
  const Block block = take_block(bytes);
  if (block.data == nullptr) return new_tensor(like, sizes);  // raises torch's error
  AtenTensorHandle tensor = nullptr;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(from_blob()(block.data, int64_t(sizes.size()), sizes.data(), row_major(sizes).data(), 0, dtype,
                                     aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(), nullptr, 0,
                                     give_back, reinterpret_cast<void*>(block.size)));
  return Tensor(tensor);
}

}  // namespace seqaccel::inline base
