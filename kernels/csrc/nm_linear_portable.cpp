#include "nm_linear_impl.h"
#include "vector_portable.h"

namespace maskpro {

int32_t nm_linear_portable(const NMLinear& call) { return run_nm_linear<Portable>(call); }

}  // namespace maskpro
