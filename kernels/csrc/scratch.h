// Working memory that outlives a call: allocating megabytes per call would mean page faults per call.
#ifndef MASKPRO_SCRATCH_H_
#define MASKPRO_SCRATCH_H_

#include <stdint.h>

namespace maskpro {

// Returns at least `count` floats, aligned to 64 bytes, that belong to the calling thread until its
// next call here; nullptr when memory is short. Grows only; freed when the thread ends.
float* thread_scratch(int64_t count);

}  // namespace maskpro

#endif  // MASKPRO_SCRATCH_H_
