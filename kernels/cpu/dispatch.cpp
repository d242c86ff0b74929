#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace convselect {

#if defined(__x86_64__)
namespace avx512 {
const KernelTable& table();
}
namespace avx2 {
const KernelTable& table();
}
namespace portable {
const KernelTable& table();
}
#elif defined(__aarch64__)
namespace neon {
const KernelTable& table();
}
#else
namespace portable {
const KernelTable& table();
}
#endif

namespace {

struct Build {
  Isa isa;
  const char* name;
  bool supported;
  const KernelTable& (*table)();
};

}  // namespace

const KernelTable* kernels(Isa* isa, std::string* error) {
  static const char* const cap = std::getenv("CONVSELECT_ISA");
#if defined(__x86_64__)
  static const Build builds[] = {
      // from the fastest
      {Isa::avx512, "avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl"),
       avx512::table},
      {Isa::avx2, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::table},
      {Isa::portable, "portable", true, portable::table},
  };
#elif defined(__aarch64__)
  static const Build builds[] = {{Isa::neon, "neon", true, neon::table}};
#else
  static const Build builds[] = {{Isa::portable, "portable", true, portable::table}};
#endif
  bool reached = cap == nullptr || *cap == '\0';
  for (const Build& build : builds) {
    reached = reached || std::strcmp(cap, build.name) == 0;
    if (reached && build.supported) {
      *isa = build.isa;
      return &build.table();
    }
  }
  *error = std::string("CONVSELECT_ISA is '") + cap + "', must be one of";
  const char* before = " ";
  for (const Build& build : builds) *error += std::string(before) + build.name, before = ", ";
  return nullptr;
}

}  // namespace convselect
