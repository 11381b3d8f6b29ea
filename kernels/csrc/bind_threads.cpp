#include <omp.h>

#ifdef __linux__
#include <sched.h>
#endif

#include "maskpro_kernels.h"

int32_t maskpro_bind_threads(const int32_t* cores, int32_t threads) {
  if (threads < 1) return MASKPRO_BAD_ARGUMENT;
  int32_t bound = 0;
#pragma omp parallel num_threads(threads) reduction(+ : bound)
  {
#ifdef __linux__
    const int32_t core = cores[omp_get_thread_num()];
    cpu_set_t only;
    CPU_ZERO(&only);
    if (core >= 0 && core < CPU_SETSIZE) {
      CPU_SET(core, &only);
      bound += sched_setaffinity(0, sizeof only, &only) == 0;
    }
#endif
  }
  return bound == threads ? MASKPRO_OK : MASKPRO_BAD_ARGUMENT;
}
