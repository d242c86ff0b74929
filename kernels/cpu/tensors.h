// What the operators share: the table of kernels, and what must hold of a tensor before its memory is touched.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "dispatch.h"
#include "verify.h"

namespace convselect {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Loaded {
  const KernelTable* table;
  Isa isa;
};

inline const Loaded& loaded() {
  static const Loaded value = [] {
    Loaded found{};
    std::string error;
    found.table = kernels(&found.isa, &error);
    STD_TORCH_CHECK(found.table, error);
    return found;
  }();
  return value;
}

inline Parallel parallel_here() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

inline void check_threads(int64_t threads) {
  STD_TORCH_CHECK(threads > 0 && threads <= INT16_MAX, "threads is ", threads, ", must be at least 1 and below 2^15");
}

// That it is one of the CPU's, and that its storage, which can be resized under a tensor, holds all of it.
inline void check_tensor(const Tensor& t, const char* name, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.layout() == torch::headeronly::Layout::Strided, name,
                  " must be a ", type_name, " tensor on the CPU");
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t elements = extent(t.dim(), t.sizes().data(), t.strides().data());
  const int64_t size = static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(elements == 0 || (t.storage_offset() + elements) * size <= bytes, name, " has ", elements,
                  " elements from ", t.storage_offset(), " on in a storage of ", bytes, " bytes");
}

inline void check_float(const Tensor& t, const char* name) { check_tensor(t, name, ScalarType::Float, "float32"); }

inline const int64_t* longs(const Tensor& t, const char* name, int64_t least) {
  check_tensor(t, name, ScalarType::Long, "int64");
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && t.numel() >= least, name,
                  " must be a contiguous vector of at least ", least, " elements");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace convselect
