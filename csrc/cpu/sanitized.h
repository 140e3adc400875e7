// RNNFAST_SANITIZED: whether ASan or TSan watches this compilation, as in the fuzzer's builds, whose calls are small.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define RNNFAST_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define RNNFAST_SANITIZED
#endif
#endif
