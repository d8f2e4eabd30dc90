// For functions in headers that files for several processors include: none may be left as a function of its own, which
// the linker would take from any of them.
#pragma once

#define FASTSIMGAN_ALWAYS_INLINE __attribute__((always_inline)) inline
