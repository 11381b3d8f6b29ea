// Times one in some calls of an operator, and keeps the times until they are taken.
//
// Kept and not reported by a callback: a callback into Python would run signal handlers, and whoever called the kernel
// would never see what they raise.
#ifndef MASKPRO_CALL_SAMPLES_H_
#define MASKPRO_CALL_SAMPLES_H_

#include "maskpro_kernels.h"

namespace maskpro {

// Whether the call that is about to begin is to be timed.
bool is_sampled();

// Drops the sample if MASKPRO_MAX_SAMPLES wait already.
void keep(const maskpro_sample& sample);

}  // namespace maskpro

#endif  // MASKPRO_CALL_SAMPLES_H_
