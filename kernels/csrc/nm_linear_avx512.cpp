#include "nm_linear_impl.h"
#include "vector_avx512.h"

namespace maskpro {

int32_t nm_linear_avx512(const NMLinear& call) { return run_nm_linear<Avx512>(call); }

}  // namespace maskpro
