// What CUDA's headers give a kernel, as far as the kernels here use it: qualifiers, indices, small vectors, 16-bit floats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

#define SOFT_MASK_MIN_MAX(T)                            \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
SOFT_MASK_MIN_MAX(int)
SOFT_MASK_MIN_MAX(unsigned)
SOFT_MASK_MIN_MAX(long)
SOFT_MASK_MIN_MAX(unsigned long)
SOFT_MASK_MIN_MAX(long long)
SOFT_MASK_MIN_MAX(unsigned long long)
#undef SOFT_MASK_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace soft_mask::emulation {

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float float_of_bf16(uint16_t bits) { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }

// To the nearest, ties to even; every NaN becomes CUDA's.
inline uint16_t bf16_of_float(float value) {
  const auto bits = bits_of<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_of_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // inf and NaN: the exponent's 5 ones become 8
    magnitude |= 0x7f800000u;
  } else {  // the exponent's bias: times 2^(127 - 15), which makes subnormals normal as well
    magnitude = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p112f);
  }
  return bits_of<float>(sign | magnitude);
}

inline uint16_t half_of_float(float value) {
  const auto bits = bits_of<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t rounded;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) {  // 65520 and above: beyond the largest
    rounded = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds to multiples of 2^-24
    rounded = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | rounded);
}

}  // namespace soft_mask::emulation

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(soft_mask::emulation::bf16_of_float(value)) {}
  operator float() const { return soft_mask::emulation::float_of_bf16(bits); }
};
struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(soft_mask::emulation::half_of_float(value)) {}
  operator float() const { return soft_mask::emulation::float_of_half(bits); }
};
