// The CUDA implementation of megatron_conan::soft_mask_attention; its schema, CPU and fake implementations are in ../op.py.
// Uses the LibTorch Stable ABI only (2.11), so one build serves later versions, and CPU builds can load it.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "instances.h"

// Of CUDA builds only, hence weak; torch declares it under USE_CUDA, which would ask for more of CUDA's headers.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace soft_mask {

// use(element, head_dim) with both as types, or `otherwise` where that instance isn't built.
template <class Use>
int with_instance(Element element, int head_dim, int otherwise, Use use) {
  const auto with_head_dim = [&](auto element_type) {
    if (head_dim == 64) return use(element_type, std::integral_constant<int, 64>());
    if (head_dim == 112) return use(element_type, std::integral_constant<int, 112>());
    if (head_dim == 128) return use(element_type, std::integral_constant<int, 128>());
    return otherwise;
  };
  if (element == Element::bf16) return with_head_dim(std::integral_constant<Element, Element::bf16>());
  if (element == Element::fp16) return with_head_dim(std::integral_constant<Element, Element::fp16>());
  return otherwise;
}

int launch_forward(const ForwardParams& params, Element element, int head_dim, void* stream) {
  return with_instance(element, head_dim, cudaErrorInvalidValue, [&](auto e, auto d) {
    return launch_forward_instance_of<decltype(e)::value, decltype(d)::value>(params, stream);
  });
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "soft_mask_attention: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape(const Tensor& x) {
  std::ostringstream text;
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "[") << x.size(i);
  text << (x.dim() ? "]" : "[]");
  return text.str();
}

void check_device(const char* name, const Tensor& x, const Tensor& q) {
  if (!x.is_cuda()) refuse(name, " is not on a CUDA device, which this implementation is for: move all tensors to one");
  if (x.get_device_index() != q.get_device_index())
    refuse(name, " is on cuda:", x.get_device_index(), ", q on cuda:", q.get_device_index(), ": move ", name, " there");
}

// q, k, v: what the kernel's 16-byte copies need.
void check_layout(const char* name, const Tensor& x, const Tensor& q) {
  if (x.scalar_type() != q.scalar_type())
    refuse(name, " has dtype ", toString(x.scalar_type()), ", q ", toString(q.scalar_type()), ": convert the one with .to()");
  if (x.numel() == 0) return;
  const int64_t last = x.dim() - 1;
  if (x.stride(last) != 1)
    refuse(name, " has stride ", x.stride(last), " in its head dim; the kernel needs 1: call .contiguous()");
  const char* const names[] = {"batch", "sequence", "heads"};
  for (int64_t i = 0; i < last; ++i) {
    if (x.size(i) > 1 && x.stride(i) % 8 != 0)
      refuse(name, " has stride ", x.stride(i), " in its ", last == 2 && i == 0 ? "tokens" : names[i + 3 - last],
             " dim; the kernel copies 16 bytes at a time and needs multiples of 8: call .contiguous()");
  }
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  if (address % 16 != 0)
    refuse(name, " begins ", address % 16, " bytes behind a multiple of 16, and the kernel copies 16 at a time: call .clone()");
}

// lengths, cu_seqlens, alpha: a contiguous vector of one dtype.
void check_vector(const char* name, const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() != dtype)
    refuse(name, " has dtype ", toString(x.scalar_type()), "; the kernel reads ", toString(dtype), ": convert it with .to()");
  if (!x.is_contiguous()) refuse(name, " is not contiguous: call .contiguous()");
}

Element element_of(const Tensor& q) {
  if (q.scalar_type() == ScalarType::BFloat16) return Element::bf16;
  if (q.scalar_type() == ScalarType::Half) return Element::fp16;
  refuse("q has dtype ", toString(q.scalar_type()), "; the kernel is built for BFloat16 and Half: convert q, k, v with .to()");
}

Form form_of(const std::string& name) {
  if (name == "constant") return Form::constant;
  if (name == "row") return Form::row;
  if (name == "column") return Form::column;
  refuse("form ", name, " is unknown; known are row, column, constant");
}

int32_t to_int32(const char* name, int64_t value) {
  if (value < 0 || value > std::numeric_limits<int32_t>::max())
    refuse(name, " is ", value, "; the kernel counts up to 2^31 - 1: split the batch");
  return static_cast<int32_t>(value);
}

// Shapes, dtypes, devices and strides: everything that, if wrong, would make the kernel read or write foreign memory.
void check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
                   const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens, Form form) {
  const bool packed = cu_seqlens.has_value();
  element_of(q);
  if (packed && lengths) refuse("lengths and cu_seqlens are both given: padded sequences have the one, packed ones the other");
  const int64_t dims = packed ? 3 : 4;
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"q", q}, {"k", k}, {"v", v}}) {
    if (x.dim() != dims)
      refuse(name, " has shape ", shape(x), packed ? "; with cu_seqlens it is [tokens, heads, head dim]"
                                                   : "; without cu_seqlens it is [batch, sequence, heads, head dim]");
    check_layout(name, x, q);
    bool same = x.size(dims - 1) == q.size(dims - 1) && x.size(dims - 2) == (&x == &q ? q : k).size(dims - 2);
    for (int64_t i = 0; i + 2 < dims; ++i) same = same && x.size(i) == q.size(i);
    if (!same)
      refuse(name, " has shape ", shape(x), ", k ", shape(k), ", q ", shape(q), ": k is as v, and as q but for the heads");
  }
  const int64_t num_heads = q.size(dims - 2), num_groups = k.size(dims - 2), head_dim = q.size(dims - 1);
  if (head_dim != 64 && head_dim != 112 && head_dim != 128)
    refuse("head dim ", head_dim, " is not built; built are 64, 112, 128: use backend sdpa");
  if (num_groups == 0 || num_heads % num_groups != 0)
    refuse("q has ", num_heads, " heads and k ", num_groups, ": the first must be a multiple of the second");
  check_vector("alpha", alpha, ScalarType::Float);
  if (alpha.numel() != 1 && (form != Form::constant || alpha.numel() != num_heads))
    refuse("alpha has shape ", shape(alpha), "; it is one number or, in the constant form, one a head: ", num_heads);
  if (lengths) {
    check_vector("lengths", *lengths, ScalarType::Int);
    if (lengths->numel() != q.size(0)) refuse("lengths has shape ", shape(*lengths), " for a batch of ", q.size(0));
  }
  if (packed) {
    check_vector("cu_seqlens", *cu_seqlens, ScalarType::Int);
    if (cu_seqlens->dim() != 1 || cu_seqlens->numel() < 1)
      refuse("cu_seqlens has shape ", shape(*cu_seqlens), "; it is [sequences + 1]");
  }
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"q", q}, {"k", k}, {"v", v}, {"alpha", alpha}})
    check_device(name, x, q);
  if (lengths) check_device("lengths", *lengths, q);
  if (packed) check_device("cu_seqlens", *cu_seqlens, q);
}

Strides strides_of(const Tensor& x) {
  const bool packed = x.dim() == 3;
  return {packed ? 0 : x.stride(0), x.stride(packed ? 0 : 1), x.stride(packed ? 1 : 2)};
}

ForwardParams forward_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha,
                             const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens, int64_t max_length,
                             Form form, double scale, const Tensor& out, const Tensor& lse) {
  const bool packed = cu_seqlens.has_value();
  const int64_t num_heads = q.size(packed ? 1 : 2), num_rows = q.size(packed ? 0 : 1);
  ForwardParams params{};
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  params.alpha = static_cast<const float*>(alpha.const_data_ptr());
  params.lengths = lengths ? static_cast<const int32_t*>(lengths->const_data_ptr()) : nullptr;
  params.cu_seqlens = packed ? static_cast<const int32_t*>(cu_seqlens->const_data_ptr()) : nullptr;
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);
  params.lse_sequence_stride = packed ? 0 : lse.stride(0);
  params.lse_head_stride = lse.stride(packed ? 0 : 1);
  params.num_sequences = to_int32("the number of sequences", packed ? cu_seqlens->numel() - 1 : q.size(0));
  params.num_rows = to_int32("the number of rows", num_rows);
  params.max_length = to_int32("max_length", packed ? max_length : num_rows);
  params.num_heads = to_int32("the number of heads", num_heads);
  params.heads_per_group = params.num_heads / to_int32("the number of key/value heads", k.size(packed ? 1 : 2));
  params.alpha_stride = alpha.numel() == 1 ? 0 : 1;
  params.form = form;
  params.scale = static_cast<float>(scale);
  return params;
}

// torch::stable's conversion to std::string leaks a string a call (2.11 to 2.13), so the op takes the handle and frees it.
std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

void* current_stream(int32_t device_index) {
  if (!aoti_torch_get_current_cuda_stream) refuse("this torch is built without CUDA: install a CUDA build of it");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor alpha, std::optional<Tensor> lengths,
                                   std::optional<Tensor> cu_seqlens, int64_t max_length, StringHandle form_name, double scale) {
  const Form form = form_of(take_string(form_name));
  if (!(scale > 0) || !std::isfinite(scale)) refuse("scale is ", scale, "; it must be positive and finite");
  check_forward(q, k, v, alpha, lengths, cu_seqlens, form);
  const bool packed = cu_seqlens.has_value();
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = torch::stable::new_empty(q, q.sizes());
  const int64_t lse_shape[] = {q.size(0), q.size(2), q.size(1)};  // padded [b, s, n, d] -> [b, n, s]
  const int64_t packed_lse_shape[] = {q.size(1), q.size(0)};      // packed [t, n, d] -> [n, t]
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
  Tensor lse = torch::stable::new_empty(q, packed ? Sizes(packed_lse_shape, 2) : Sizes(lse_shape, 3), ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  const ForwardParams params = forward_params(q, k, v, alpha, lengths, cu_seqlens, max_length, form, scale, out, lse);
  const int head_dim = static_cast<int>(q.size(q.dim() - 1));
  cudaError_t error = cudaSetDevice(q.get_device_index());  // the guard told torch's CUDA runtime; this library has its own
  if (error == cudaSuccess)
    error = static_cast<cudaError_t>(launch_forward(params, element_of(q), head_dim, current_stream(q.get_device_index())));
  if (error != cudaSuccess)
    refuse("the kernel could not be launched: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error), "; q ", shape(q));
  return {out, lse};
}

}  // namespace
}  // namespace soft_mask

STABLE_TORCH_LIBRARY_IMPL(megatron_conan, CUDA, m) { m.impl("soft_mask_attention", TORCH_BOX(&soft_mask::forward)); }

// For the build's report: bytes of dynamic shared memory of an instance, -1 if there is none such.
extern "C" __attribute__((visibility("default"))) int soft_mask_forward_shared_bytes(int element, int head_dim) {
  return soft_mask::with_instance(static_cast<soft_mask::Element>(element), head_dim, -1, [](auto e, auto d) {
    return soft_mask::forward_shared_bytes_of<decltype(e)::value, decltype(d)::value>();
  });
}
