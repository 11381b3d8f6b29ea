#include "nm_linear_impl.h"
#include "vector_avx2.h"

namespace maskpro {

int32_t nm_linear_avx2(const NMLinear& call) { return run_nm_linear<Avx2>(call); }

}  // namespace maskpro
