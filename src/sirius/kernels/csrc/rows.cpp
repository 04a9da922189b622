// What a step of decoding consists of: products with some rows of a weight matrix, memory-bound for few tokens and
// compute-bound for many, attention over a cache, and what stands between them.
//
// Compiled once for each instruction set (SIRIUS_ISA), with vectors of SIRIUS_WIDTH floats. Few tokens read rows where
// they lie, some at a time, with what follows fetched ahead: rows that are short or skipped leave the hardware's
// prefetcher behind. Many tokens share a panel or strip of rows in the first-level cache. All sums are float.

#include "rows.h"

#include "attend.h"
#include "each.h"
#include "finish.h"
#include "highest.h"
#include "linear.h"
#include "pointwise.h"
#include "quantize.h"
#include "quantized.h"
#include "strips.h"

namespace {

// Calls what `of` makes of a number of the tensors' dtype.
template <class Function>
void of_dtype(Dtype dtype, Function of) {
  switch (dtype) {
    case kFloat32: return of(float{});
    case kBFloat16: return of(BFloat16{});
    case kFloat16: return of(Float16{});
  }
}

}  // namespace

#define JOINED(a, b) a##b
#define NAMED(isa) JOINED(kernels_, isa)
#define QUOTED(isa) #isa
#define STRING(isa) QUOTED(isa)
#define OPERATION(name, Struct) \
  [](const Struct& p) { of_dtype(p.dtype, [&](auto number) { name##_of<decltype(number)>(p); }); },

extern const Kernels NAMED(SIRIUS_ISA) = {STRING(SIRIUS_ISA), SIRIUS_OPERATIONS(OPERATION)};
