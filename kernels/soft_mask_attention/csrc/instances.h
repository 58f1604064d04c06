// The instances of the forward kernel. forward.cu is compiled once for each, with -DINSTANCE_ELEMENT= and -DINSTANCE_HEAD_DIM=.
#pragma once

#include "params.h"

namespace soft_mask {

// Launches on `stream` (cudaStream_t) and returns a cudaError_t. Defined for bf16, fp16 x 64, 112, 128.
template <Element ELEMENT, int HEAD_DIM>
int launch_forward_instance_of(const ForwardParams& params, void* stream);

// Bytes of dynamic shared memory that a block of it takes.
template <Element ELEMENT, int HEAD_DIM>
int forward_shared_bytes_of();

}  // namespace soft_mask
