// The operators torch.ops.convselect.*: argument checks and a call into the table of kernels. The files ops*.cpp alone
// see torch, through its stable ABI, so that one binary serves torch 2.10 and later.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "tensors.h"

namespace {

using namespace convselect;
using Ints = std::vector<int64_t>;

const Kernel& kernel_at(int64_t id) {
  STD_TORCH_CHECK(id >= 0 && id < loaded().table->count, "kernel is ", id, ", must be below ", loaded().table->count);
  return loaded().table->rows[id];
}

// sizes: mb ic ih iw; geometry: oc kh kw sh sw ph pw dh dw g.
Problem problem_of(const Kernel& kernel, const int64_t* s, const Ints& g) {
  STD_TORCH_CHECK(g.size() == 10, "geometry has ", g.size(), " numbers, must have 10: oc kh kw sh sw ph pw dh dw g");
  const Problem p{s[0], s[1], s[2], s[3], g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
  check(p);
  check(kernel, p);
  return p;
}

Problem problem_of(const Kernel& kernel, const Ints& sizes, const Ints& geometry) {
  STD_TORCH_CHECK(sizes.size() == 4, "sizes has ", sizes.size(), " numbers, must have 4: mb ic ih iw");
  return problem_of(kernel, sizes.data(), geometry);
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Whether a 4-d tensor is dense in that order; strides of dimensions of size 1 mean nothing.
bool dense(const Tensor& t, bool nhwc) {
  static const int order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t stride = 1;
  for (int d : order[nhwc]) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

// Floats from pixel to pixel of a range of the channels of a dense NHWC tensor; 0 if it is none.
int64_t pixel_stride(const Tensor& t) {
  const int64_t h = t.size(2), w = t.size(3);
  const int64_t stride = w > 1 ? t.stride(3) : h > 1 ? t.stride(2) : t.size(0) > 1 ? t.stride(0) / h : t.size(1);
  const bool regular = (t.size(1) == 1 || t.stride(1) == 1) && (h == 1 || t.stride(2) == w * stride) &&
                       (t.size(0) == 1 || t.stride(0) == h * w * stride);
  return regular ? stride : 0;
}

Tensor empty(const int64_t (&sizes)[4], bool nhwc) {
  const int64_t c = std::max<int64_t>(sizes[1], 1), h = std::max<int64_t>(sizes[2], 1),
                w = std::max<int64_t>(sizes[3], 1);
  const int64_t strides[2][4] = {{c * h * w, h * w, w, 1}, {c * h * w, 1, w * c, c}};
  return empty_strided(4, sizes, strides[nhwc]);
}

// `t`, of those sizes, or a copy that is dense in the layout: what calls an operator goes by the strides of a traced
// value, and those are not always the ones that ATen's operators give.
Tensor in_layout(const Tensor& t, const char* name, bool nhwc, const int64_t (&sizes)[4]) {
  check_float(t, name);
  STD_TORCH_CHECK(t.dim() == 4, name, " has ", t.dim(), " dimensions, must have 4");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == sizes[d], name, " has size ", t.size(d), " in dimension ", d, ", must have ",
                    sizes[d]);
  if (t.numel() == 0 || dense(t, nhwc)) return t;
  Tensor copy = empty(sizes, nhwc);
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor in_layout(const Tensor& t, const char* name, bool nhwc) {
  STD_TORCH_CHECK(t.dim() == 4, name, " has ", t.dim(), " dimensions, must have 4");
  return in_layout(t, name, nhwc, {t.size(0), t.size(1), t.size(2), t.size(3)});
}

// Scratch of the calling thread, kept for the next call: fresh memory would be paid for in page faults each time.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* at_least(int64_t floats) {
    if (floats > floats_) {
      std::free(data_);
      floats_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
      STD_TORCH_CHECK(data_, "out of memory: a workspace of ", floats * 4, " bytes");
      floats_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t floats_ = 0;
};
thread_local Scratch scratch;

Act act_of(int64_t activation) {
  const Act act = static_cast<Act>(activation);
  check(act);
  return act;
}

struct Named {
  const char* name;
  const Tensor* tensor;  // or null

  uint64_t begin() const { return reinterpret_cast<uint64_t>(tensor->const_data_ptr()); }
  uint64_t end() const { return begin() + 4 * extent(tensor->dim(), tensor->sizes().data(), tensor->strides().data()); }
};

// What a kernel reads may not change under it: some keep pointers in the workspace.
void check_apart(const Named& written, std::initializer_list<Named> others) {
  for (const Named& other : others)
    STD_TORCH_CHECK(!other.tensor || written.end() <= other.begin() || other.end() <= written.begin(), written.name,
                    " and ", other.name, " overlap");
}

// The problem; src and residual become what the kernel reads.
Problem check_conv(const Kernel& kernel, Tensor& src, const Tensor& packed, const std::optional<Tensor>& bias,
                   std::optional<Tensor>& residual, const Ints& geometry) {
  STD_TORCH_CHECK(src.dim() == 4, "src has ", src.dim(), " dimensions, must have 4");
  const int64_t sizes[4] = {src.size(0), src.size(1), src.size(2), src.size(3)};
  const Problem p = problem_of(kernel, sizes, geometry);
  src = in_layout(src, "src", kernel.src_nhwc, sizes);
  check_float(packed, "packed");
  STD_TORCH_CHECK(packed.numel() == kernel.packed_floats(p), "packed has ", packed.numel(), " elements, ", kernel.name,
                  " needs ", kernel.packed_floats(p), " for this problem");
  STD_TORCH_CHECK(packed.is_contiguous(), "packed must be contiguous");
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == p.oc && bias->is_contiguous(), "bias must be contiguous and have oc=", p.oc,
                    " elements");
  }
  if (residual) residual = in_layout(*residual, "residual", kernel.dst_nhwc, {p.mb, p.oc, p.oh(), p.ow()});
  return p;
}

Call call_of(const Problem& p, const Tensor& src, const Tensor& packed, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, const Tensor& dst, int64_t activation, double alpha, double beta) {
  return {p,
          floats(src),
          floats(packed),
          writable(dst),
          p.oc,
          nullptr,
          {bias ? floats(*bias) : nullptr, residual ? floats(*residual) : nullptr, act_of(activation),
           static_cast<float>(alpha), static_cast<float>(beta)},
          parallel_here()};
}

Tensor conv(Tensor src, Tensor packed, std::optional<Tensor> bias, std::optional<Tensor> residual, int64_t kernel_id,
            Ints geometry, int64_t activation, double alpha, double beta) {
  const Kernel& kernel = kernel_at(kernel_id);
  const Problem p = check_conv(kernel, src, packed, bias, residual, geometry);
  Tensor dst = empty({p.mb, p.oc, p.oh(), p.ow()}, kernel.dst_nhwc);
  if (p.mb == 0) return dst;
  Call call = call_of(p, src, packed, bias, residual, dst, activation, alpha, beta);
  call.workspace = scratch.at_least(kernel.workspace_floats(p, call.parallel.threads));
  kernel.run(call);
  return dst;
}

// As `conv`, into buffers of the caller's; dst may be a range of the channels of an NHWC tensor.
void conv_out(Tensor dst, Tensor workspace, Tensor src, Tensor packed, std::optional<Tensor> bias,
              std::optional<Tensor> residual, int64_t kernel_id, Ints geometry, int64_t activation, double alpha,
              double beta) {
  const Kernel& kernel = kernel_at(kernel_id);
  const Problem p = check_conv(kernel, src, packed, bias, residual, geometry);
  check_float(dst, "dst");
  STD_TORCH_CHECK(
      dst.dim() == 4 && dst.size(0) == p.mb && dst.size(1) == p.oc && dst.size(2) == p.oh() && dst.size(3) == p.ow(),
      "dst must have the sizes of the result");
  if (p.mb == 0) return;
  Call call = call_of(p, src, packed, bias, residual, dst, activation, alpha, beta);
  if (!dense(dst, kernel.dst_nhwc)) {
    call.dst_stride = kernel.dst_nhwc ? pixel_stride(dst) : 0;
    STD_TORCH_CHECK(call.dst_stride >= p.oc && !residual,
                    "dst must be dense, or, without a residual, a range of the "
                    "channels of a dense NHWC tensor");
  }
  check_float(workspace, "workspace");
  const int64_t floats = kernel.workspace_floats(p, call.parallel.threads);
  STD_TORCH_CHECK(workspace.numel() >= floats, "workspace has ", workspace.numel(), " elements, ", kernel.name,
                  " needs ", floats);
  STD_TORCH_CHECK(workspace.is_contiguous(), "workspace must be contiguous");
  check_apart({"workspace", &workspace}, {{"dst", &dst}});
  for (const Named& written : {Named{"dst", &dst}, Named{"workspace", &workspace}})
    check_apart(written, {{"src", &src},
                          {"packed", &packed},
                          {"bias", bias ? &*bias : nullptr},
                          {"residual", residual ? &*residual : nullptr}});
  call.workspace = writable(workspace);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(call.workspace) % 64 == 0, "workspace must be aligned to 64 bytes");
  kernel.run(call);
}

Tensor pack(Tensor weight, int64_t kernel_id, Ints sizes, Ints geometry) {
  const Kernel& kernel = kernel_at(kernel_id);
  const Problem p = problem_of(kernel, sizes, geometry);
  weight = in_layout(weight, "weight", false, {p.oc, p.ic / p.g, p.kh, p.kw});
  Tensor packed = empty({1, 1, 1, kernel.packed_floats(p)}, false);
  kernel.pack(p, floats(weight), writable(packed));
  return packed;
}

// src in the other layout.
Tensor to_layout(Tensor src, bool nhwc) {
  src = in_layout(src, "src", !nhwc);
  const int64_t sizes[4] = {src.size(0), src.size(1), src.size(2), src.size(3)};
  Tensor dst = empty(sizes, nhwc);
  if (src.numel() == 0) return dst;
  const auto& table = *loaded().table;
  (nhwc ? table.to_nhwc : table.to_nchw)(floats(src), writable(dst), sizes[0], sizes[1], sizes[2] * sizes[3],
                                         parallel_here());
  return dst;
}

// act(src * scale + shift) by channel, in src's own layout; in NHWC if it is dense in none.
Tensor scale_shift(Tensor src, Tensor scale, Tensor shift, int64_t activation, double alpha, double beta) {
  STD_TORCH_CHECK(src.dim() == 4, "src has ", src.dim(), " dimensions, must have 4");
  const bool nhwc = src.dim() == 4 && !dense(src, false);
  src = in_layout(src, "src", nhwc);
  const int64_t sizes[4] = {src.size(0), src.size(1), src.size(2), src.size(3)};
  for (const Tensor* t : {&scale, &shift}) {
    check_float(*t, t == &scale ? "scale" : "shift");
    STD_TORCH_CHECK(t->numel() == sizes[1] && t->is_contiguous(), "scale and shift must be contiguous, [channels]");
  }
  const Act act = act_of(activation);
  Tensor dst = empty(sizes, nhwc);
  if (src.numel() == 0) return dst;
  loaded().table->scale_shift(
      {sizes[0], sizes[1], sizes[2] * sizes[3], nhwc, floats(src), floats(scale), floats(shift), nullptr, writable(dst),
       sizes[1], sizes[1], 0, act, static_cast<float>(alpha), static_cast<float>(beta)},
      parallel_here());
  return dst;
}

// act(src @ weight.t() + bias); src f32 [m, k], weight f32 [n, k], bias f32 [n].
Tensor linear(Tensor src, Tensor weight, std::optional<Tensor> bias, int64_t activation, double alpha, double beta) {
  check_float(src, "src");
  check_float(weight, "weight");
  STD_TORCH_CHECK(src.dim() == 2, "src must be a matrix");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix");
  if (!src.is_contiguous()) src = torch::stable::contiguous(src);
  const int64_t m = src.size(0), n = weight.size(0), k = src.size(1);
  STD_TORCH_CHECK(weight.size(1) == k, "weight has ", weight.size(1), " columns, src has ", k);
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == n && bias->is_contiguous(), "bias must be contiguous and have ", n, " elements");
  }
  const Act act = act_of(activation);
  const int64_t sizes[2] = {m, n}, strides[2] = {std::max<int64_t>(n, 1), 1};
  Tensor dst = empty_strided(2, sizes, strides);
  if (m > 0 && n > 0)
    loaded().table->linear({m, n, k, floats(src), floats(weight), bias ? floats(*bias) : nullptr, writable(dst), act,
                            static_cast<float>(alpha), static_cast<float>(beta)},
                           parallel_here());
  return dst;
}

// In NHWC. geometry: kh kw sh sw ph pw dh dw oh ow.
Tensor pool2d(Tensor src, Ints geometry, bool max, bool include_pad, int64_t divisor) {
  src = in_layout(src, "src", true);
  const int64_t sizes[4] = {src.size(0), src.size(1), src.size(2), src.size(3)};
  STD_TORCH_CHECK(geometry.size() == 10, "geometry has ", geometry.size(), " numbers, must have 10");
  const Ints& g = geometry;
  Pool p{sizes[0], sizes[1], sizes[2], sizes[3], g[8], g[9], g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
  p.max = max;
  p.include_pad = include_pad;
  p.divisor = divisor;
  p.dst_stride = sizes[1];
  if (src.numel() > 0) check(p);
  Tensor dst = empty({sizes[0], sizes[1], p.oh, p.ow}, true);
  if (src.numel() == 0) return dst;
  p.src = floats(src);
  p.dst = writable(dst);
  loaded().table->pool(p, parallel_here());
  return dst;
}

// In NHWC. size: oh ow. A scale that is given decides where pixels lie in place of the sizes, unless corners
// are aligned.
Tensor upsample2d(Tensor src, Ints size, bool linear, bool align_corners, std::optional<double> scale_h,
                  std::optional<double> scale_w) {
  src = in_layout(src, "src", true);
  const int64_t sizes[4] = {src.size(0), src.size(1), src.size(2), src.size(3)};
  STD_TORCH_CHECK(size.size() == 2, "size has ", size.size(), " numbers, must have 2: oh ow");
  for (const std::optional<double>& scale : {scale_h, scale_w})
    STD_TORCH_CHECK(!scale || *scale > 0, "a scale is ", *scale, ", must be positive");
  convselect::Upsample u{sizes[0], sizes[1], sizes[2], sizes[3], size[0], size[1], linear, align_corners};
  u.step_h = scale_h ? static_cast<float>(1 / *scale_h) : -1.0f;
  u.step_w = scale_w ? static_cast<float>(1 / *scale_w) : -1.0f;
  if (src.numel() > 0) convselect::check(u);
  Tensor dst = empty({sizes[0], sizes[1], size[0], size[1]}, true);
  if (src.numel() == 0) return dst;
  u.src = floats(src);
  u.dst = writable(dst);
  u.dst_stride = sizes[1];
  loaded().table->upsample(u, parallel_here());
  return dst;
}

const int64_t* rows_of(const Tensor& table, int64_t columns) {
  check_tensor(table, "table", ScalarType::Long, "int64");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == columns && table.is_contiguous(),
                  "table must be contiguous, [n, ", columns, "]");
  return static_cast<const int64_t*>(table.const_data_ptr());
}

// A digest of memory, to notice that weights were written to. Rows of `table`, int64 [n, 2]: an address, and the bytes
// to read there, at most a cache line's 64. The caller keeps the memory alive.
int64_t fingerprint(Tensor table) {
  constexpr int64_t AHEAD = 32, LEAST = 1024;  // rows: cold lines, fetched side by side; worth a thread's while
  constexpr int64_t LINE = 64;
  const int64_t* rows = rows_of(table, 2);
  std::atomic<uint64_t> digest{0};
  torch::stable::parallel_for(0, table.size(0), LEAST, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;  // of each row's digest, in which its number takes part: any order gives the same
    for (int64_t i = begin; i < end; ++i) {
      if (i + AHEAD < end) __builtin_prefetch(reinterpret_cast<const char*>(rows[2 * (i + AHEAD)]));
      const char* at = reinterpret_cast<const char*>(rows[2 * i]);
      const int64_t bytes = rows[2 * i + 1], whole = bytes / 8;
      uint64_t lanes[4] = {};
      auto take = [&](int lane, int64_t w, int64_t size) __attribute__((always_inline)) {
        uint64_t word = 0;
        std::memcpy(&word, at + 8 * w, static_cast<size_t>(size));
        lanes[lane] = (lanes[lane] ^ word) * 0x9E3779B97F4A7C15u + 1;
      };
      int64_t w = 0;
      for (; w + 4 <= whole; w += 4)
        for (int lane = 0; lane < 4; ++lane) take(lane, w + lane, 8);
      for (; w < whole; ++w) take(0, w, 8);
      if (bytes % 8 == 4)
        take(1, whole, 4);
      else if (bytes % 8 != 0)
        take(1, whole, bytes % 8);
      uint64_t row = static_cast<uint64_t>(i);
      for (uint64_t lane : lanes) row = (row ^ lane ^ (lane >> 29)) * 0xBF58476D1CE4E5B9u;
      sum += row ^ (row >> 31);
    }
    digest += sum;
  });
  return static_cast<int64_t>(digest.load());
}

// Whether memory holds certain words: rows of `table`, int64 [n, 2], are address and word. The caller keeps it alive.
bool unchanged(Tensor table) {
  constexpr int64_t AHEAD = 48;
  const int64_t *rows = rows_of(table, 2), count = table.size(0);
  for (int64_t i = 0; i < count; ++i) {
    if (i + AHEAD < count) __builtin_prefetch(reinterpret_cast<const void*>(rows[2 * (i + AHEAD)]));
    int64_t word;
    std::memcpy(&word, reinterpret_cast<const void*>(rows[2 * i]), sizeof word);
    if (word != rows[2 * i + 1]) return false;
  }
  return true;
}

int64_t isa() { return static_cast<int64_t>(loaded().isa); }

// The row of the kernel whose name has these ASCII codes, or -1.
int64_t kernel_id(Ints codes) {
  const std::string name(codes.begin(), codes.end());
  for (int i = 0; i < loaded().table->count; ++i)
    if (name == loaded().table->rows[i].name) return i;
  return -1;
}

bool dst_nhwc(int64_t kernel) { return kernel_at(kernel).dst_nhwc; }

int64_t packed_bytes(int64_t kernel_id, Ints sizes, Ints geometry) {
  const Kernel& kernel = kernel_at(kernel_id);
  return 4 * kernel.packed_floats(problem_of(kernel, sizes, geometry));
}

int64_t workspace_bytes(int64_t kernel_id, Ints sizes, Ints geometry, int64_t threads) {
  const Kernel& kernel = kernel_at(kernel_id);
  check_threads(threads);
  return 4 * kernel.workspace_floats(problem_of(kernel, sizes, geometry), static_cast<int>(threads));
}

}  // namespace

STABLE_TORCH_LIBRARY(convselect, m) {
  m.def("isa() -> int");
  m.def("kernel_id(int[] name) -> int");
  m.def("dst_nhwc(int kernel) -> bool");
  m.def("packed_bytes(int kernel, int[] sizes, int[] geometry) -> int");
  m.def("workspace_bytes(int kernel, int[] sizes, int[] geometry, int threads) -> int");
  m.def("pack(Tensor weight, int kernel, int[] sizes, int[] geometry) -> Tensor");
  m.def(
      "conv(Tensor src, Tensor packed, Tensor? bias, Tensor? residual, int kernel, int[] geometry, int activation, "
      "float alpha, float beta) -> Tensor");
  m.def(
      "conv_out(Tensor(a!) dst, Tensor(b!) workspace, Tensor src, Tensor packed, Tensor? bias, Tensor? residual, "
      "int kernel, int[] geometry, int activation, float alpha, float beta) -> ()");
  m.def("scale_shift(Tensor src, Tensor scale, Tensor shift, int activation, float alpha, float beta) -> Tensor");
  m.def("linear(Tensor src, Tensor weight, Tensor? bias, int activation, float alpha, float beta) -> Tensor");
  m.def("pool2d(Tensor src, int[] geometry, bool max, bool include_pad, int divisor) -> Tensor");
  m.def(
      "upsample2d(Tensor src, SymInt[] size, bool linear, bool align_corners, float? scale_h, float? scale_w) -> "
      "Tensor");
  m.def("fingerprint(Tensor table) -> int");
  m.def("unchanged(Tensor table) -> bool");
  m.def("to_layout(Tensor src, bool nhwc) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(convselect, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("kernel_id", TORCH_BOX(&kernel_id));
  m.impl("dst_nhwc", TORCH_BOX(&dst_nhwc));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(convselect, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("conv_out", TORCH_BOX(&conv_out));
  m.impl("scale_shift", TORCH_BOX(&scale_shift));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("pool2d", TORCH_BOX(&pool2d));
  m.impl("upsample2d", TORCH_BOX(&upsample2d));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("unchanged", TORCH_BOX(&unchanged));
  m.impl("to_layout", TORCH_BOX(&to_layout));
}
