// Products with some rows of a weight matrix, memory-bound for few tokens and compute-bound for many.
//
// Compiled once for each instruction set (SIRIUS_ISA), with vectors of SIRIUS_WIDTH floats. Few tokens read rows where
// they lie, some at a time, with what follows fetched ahead: rows that are short or skipped leave the hardware's
// prefetcher behind. Many tokens share a panel of rows in the first-level cache. All sums are float.

#include "rows.h"

#include "linear.h"
#include "project.h"

namespace {

void linear(const Linear& p) {
  switch (p.dtype) {
    case kFloat32: return linear_of<float>(p);
    case kBFloat16: return linear_of<BFloat16>(p);
    case kFloat16: return linear_of<Float16>(p);
  }
}

void project(const Project& p) {
  switch (p.dtype) {
    case kFloat32: return project_of<float>(p);
    case kBFloat16: return project_of<BFloat16>(p);
    case kFloat16: return project_of<Float16>(p);
  }
}

}  // namespace

#define JOINED(a, b) a##b
#define NAMED(isa) JOINED(kernels_, isa)
#define QUOTED(isa) #isa
#define STRING(isa) QUOTED(isa)

extern const Kernels NAMED(SIRIUS_ISA) = {STRING(SIRIUS_ISA), linear, project};
