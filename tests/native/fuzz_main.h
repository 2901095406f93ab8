// The main loop of a fuzz target, and how it reports what it finds:
//
//   fuzz_... [--seed S] [--start N] [--inputs N] [--seconds S]
//
// Input N of a seed is always the same, so a failure is reproduced with --start N --inputs 1. Without
// --inputs and --seconds the program runs until it is stopped.
#pragma once

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
// By default UndefinedBehaviorSanitizer exits without a report.
extern "C" [[gnu::used]] const char* __ubsan_default_options() {
  return "print_stacktrace=1:halt_on_error=1:abort_on_error=1";
}
#endif

namespace fuzz {

// Describes a wrong result.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline volatile std::sig_atomic_t stopped = 0;

// What is being checked, to be reported if the program dies: a write out of bounds does not throw.
inline char input_text[128];
inline char call_text[1024];

inline void say_call(const std::string& text) {
  std::snprintf(call_text, sizeof call_text, "  %s\n", text.c_str());
}

inline void tell_last_words() {
  for (const char* text :
       {"DIED\n", static_cast<const char*>(call_text), static_cast<const char*>(input_text)}) {
    if (write(STDOUT_FILENO, text, std::strlen(text)) < 0) return;
  }
}

inline void handle_signals() {
  for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, [](int) { stopped = 1; });
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(tell_last_words);
  const auto fatal = {SIGABRT};  // AddressSanitizer reports more about the others itself
#else
  const auto fatal = {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE};
#endif
  for (const int signal : fatal) {
    std::signal(signal, [](int caught) {
      tell_last_words();
      std::signal(caught, SIG_DFL);
      std::raise(caught);
    });
  }
}

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Fuzzer(seed) provides run(number), which throws when something is wrong; about(), for the first line of
// output; and calls(), the number of calls it has checked.
template <class Fuzzer>
int run(int argc, char** argv) {
  std::uint64_t seed = 0;
  std::int64_t start = 0;
  std::int64_t inputs = std::numeric_limits<std::int64_t>::max();
  double seconds = std::numeric_limits<double>::infinity();
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    char* end = nullptr;
    if (option == "--seed") seed = std::strtoull(value, &end, 10);
    if (option == "--start") start = std::strtoll(value, &end, 10);
    if (option == "--inputs") inputs = std::strtoll(value, &end, 10);
    if (option == "--seconds") seconds = std::strtod(value, &end);
    if (end == nullptr || end == value || *end != '\0') {
      std::fprintf(stderr, "usage: %s [--seed S] [--start N] [--inputs N] [--seconds S]\n", argv[0]);
      return 2;
    }
  }
  handle_signals();

  Fuzzer fuzzer(seed);
  std::printf("seed %llu, %s\n", static_cast<unsigned long long>(seed), fuzzer.about().c_str());
  std::int64_t done = 0;
  const auto tell = [&](const char* what) {
    std::printf("%s %lld inputs, %lld calls\n", what, static_cast<long long>(done),
                static_cast<long long>(fuzzer.calls()));
    std::fflush(stdout);
  };
  const double began = now();
  double told = began;
  for (; done < inputs && stopped == 0 && now() - began < seconds; ++done) {
    const auto number = static_cast<long long>(start + done);
    std::snprintf(input_text, sizeof input_text, "again: %s --seed %llu --start %lld --inputs 1\n", argv[0],
                  static_cast<unsigned long long>(seed), number);
    try {
      fuzzer.run(number);
    } catch (const std::exception& e) {
      tell("WRONG after");
      std::printf("%s\nseed %llu, input %lld\n%s", e.what(), static_cast<unsigned long long>(seed), number,
                  input_text);
      return 1;
    }
    if (now() - told > 5) {
      tell("so far");
      told = now();
    }
  }
  tell("checked");
  return 0;
}

}  // namespace fuzz
