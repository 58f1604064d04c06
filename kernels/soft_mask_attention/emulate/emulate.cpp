// One instance of the forward kernel as a function for Python: -DINSTANCE_ELEMENT= and -DINSTANCE_HEAD_DIM= as for forward.cu.
#include "../csrc/forward.cu"

namespace emulation = soft_mask::emulation;

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int64_t forward_params_size() { return sizeof(soft_mask::ForwardParams); }
EXPORTED int64_t counters_size() { return sizeof(emulation::Counters); }

// Runs the kernel. Not 0: an error, described in `message`.
EXPORTED int emulate_forward(const soft_mask::ForwardParams* params, emulation::Order order, uint64_t seed,
                             const emulation::GlobalRange* ranges, int32_t num_ranges, emulation::Counters* counters,
                             char* message, int64_t message_size) {
  emulation::Machine& machine = emulation::machine;
  machine.order = order;
  machine.seed(seed);
  machine.ranges.assign(ranges, ranges + num_ranges);
  machine.counters = {};
  constexpr auto element = soft_mask::Element::INSTANCE_ELEMENT;
  const int code = soft_mask::launch_forward_instance_of<element, INSTANCE_HEAD_DIM>(*params, nullptr);
  *counters = machine.counters;
  std::snprintf(message, message_size, "%s", machine.message);
  return code;
}
