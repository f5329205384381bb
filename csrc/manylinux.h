// Read first by the build of `make wheels` alone (-include): what is built on a new Linux then asks an older one, glibc 2.28
// and GCC 8's libstdc++ (manylinux_2_28), for nothing that it lacks. A manylinux image needs none of this.
#pragma once

#if defined(__GLIBC__) || defined(__linux__)
// libstdc++ reads it where the C library has it, from 2.32 on. 0 says that there may be threads.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// String streams are compiled in: those of libstdc++ have symbols of GCC 9 and 11.
#include <iostream>
#include <locale>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1

// The same functions under the versions that they have had all along.
#if defined(__x86_64__)
#define MEKD_FIRST "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define MEKD_FIRST "GLIBC_2.17"
#endif
__asm__(".symver exp, exp@" MEKD_FIRST);
__asm__(".symver exp2, exp2@" MEKD_FIRST);
__asm__(".symver log, log@" MEKD_FIRST);
__asm__(".symver dlsym, dlsym@" MEKD_FIRST);
#endif
