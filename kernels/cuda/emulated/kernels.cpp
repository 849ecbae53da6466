// All kernels as host code, in the order in which NVRTC reads them.
#define HEADSTART_EMULATED
#include "device.hpp"

#include "../prelude.cuh"
#include "../rows.cu"
#include "../weights.cu"
#include "../attention.cu"
#include "../vocab.cu"
#include "../pages.cu"
#include "../ranks.cu"
