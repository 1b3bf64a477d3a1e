// Elementwise loops of the CPU; see kernels/activation.h for the formulas.
#ifndef KRAIT_KERNELS_CPU_ACTIVATION_H_
#define KRAIT_KERNELS_CPU_ACTIVATION_H_

#include <cstdint>

namespace krait::cpu {

// y[0,n) = silu(gate) * up.
void SwiGlu(int64_t n, const float* gate, const float* up, float* y);
void SwiGlu(int64_t n, const double* gate, const double* up, double* y);

// The gradients of the above; d_gate may be gate and d_up may be up. y is written unless null.
void SwiGluGradient(int64_t n, const float* dy, const float* gate, const float* up, float* d_gate,
                    float* d_up, float* y);
void SwiGluGradient(int64_t n, const double* dy, const double* gate, const double* up,
                    double* d_gate, double* d_up, double* y);

// y[0,n) += x[0,n).
void Add(int64_t n, const float* x, float* y);
void Add(int64_t n, const double* x, double* y);

}  // namespace krait::cpu

#endif  // KRAIT_KERNELS_CPU_ACTIVATION_H_
