// y = x W^T for quantised and dense W, and attention: compiled once for each instruction set, named by VARIANT.
//
// Nothing here comes from the C++ library: its inline functions, compiled for AVX, could be the copies that
// the linker keeps for everybody. Contraction is off, so that all variants round alike in the quantised
// products.

#include "attention.h"
#include "dense.h"
#include "quantized.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const Variant JOIN(VARIANT, _variant) = {TEXT(VARIANT), quantize, quantized, dense,
                                                  attend,        norm,     rotate,    silu_and_mul};
