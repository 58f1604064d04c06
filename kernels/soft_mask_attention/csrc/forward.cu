// One instance of the forward kernel: -DINSTANCE_ELEMENT=bf16 or fp16, -DINSTANCE_HEAD_DIM=64, 112 or 128.
#include "forward.cuh"
#include "instances.h"

namespace soft_mask {

template <Element>
struct Type;
template <>
struct Type<Element::bf16> {
  using type = __nv_bfloat16;
};
template <>
struct Type<Element::fp16> {
  using type = __half;
};

template <>
int launch_forward_instance_of<Element::INSTANCE_ELEMENT, INSTANCE_HEAD_DIM>(const ForwardParams& params, void* stream) {
  return launch_forward_instance<Type<Element::INSTANCE_ELEMENT>::type, INSTANCE_HEAD_DIM>(params, stream);
}

template <>
int forward_shared_bytes_of<Element::INSTANCE_ELEMENT, INSTANCE_HEAD_DIM>() {
  return ForwardTile<INSTANCE_HEAD_DIM>::shared_bytes;
}

}  // namespace soft_mask
