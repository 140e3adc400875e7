// A kernel's result against the truth, element by element: what a failure says of the worst one.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <source_location>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"

namespace rnnfast::test {

// A dimension of a result: what an index into it is called, and how many there are. `say` words an index that is more
// than a number.
struct Dimension {
  const char* name;
  int64_t size;
  std::function<std::string(int64_t)> say = {};
};

// "step 2, batch 1, unit 3" of an index in memory order.
inline std::string name_of_element(const std::vector<Dimension>& dimensions, int64_t index) {
  std::string text;
  for (auto dimension = dimensions.rbegin(); dimension != dimensions.rend(); ++dimension) {
    const int64_t at = index % dimension->size;
    index /= dimension->size;
    text = (dimension->say ? dimension->say(at) : std::string(dimension->name) + " " + std::to_string(at)) +
           (text.empty() ? "" : ", ") + text;
  }
  return text;
}

// actual(i) for i < count against expected: |actual - expected| <= tolerance * max(1, |expected|) for each, which no
// NaN is. One check, at the caller's line.
template <class Actual>
bool expect_close(const char* name, Actual actual, size_t count, const std::vector<double>& expected, double tolerance,
                  const std::vector<Dimension>& dimensions = {},
                  const std::source_location& place = std::source_location::current()) {
  const auto verify = [&](bool good, const std::string& text) {
    return check::verify(good, place.file_name(), static_cast<int>(place.line()), text);
  };
  if (count != expected.size())
    return verify(false, std::string(name) + ": " + std::to_string(count) + " elements, expected " +
                             std::to_string(expected.size()));
  size_t wrong = 0, worst = 0;
  double largest = -1;
  for (size_t i = 0; i < count; ++i) {
    const double error = std::abs(actual(i) - expected[i]) / std::max(1.0, std::abs(expected[i]));
    // Written so that a NaN is wrong; the first NaN is the worst.
    if (!(error <= tolerance)) ++wrong;
    if (error > largest || (std::isnan(error) && !std::isnan(largest))) {
      largest = error;
      worst = i;
    }
  }
  if (wrong == 0) return verify(true, "");
  int64_t sized = 1;
  for (const Dimension& dimension : dimensions) sized *= dimension.size;
  std::ostringstream text;
  text << name << ": " << wrong << " of " << count << " wrong; worst at index " << worst;
  if (!dimensions.empty() && sized == static_cast<int64_t>(count))
    text << " (" << name_of_element(dimensions, static_cast<int64_t>(worst)) << ")";
  text.precision(9);
  text << ": got " << actual(worst) << ", expected " << expected[worst];
  text.precision(3);
  text << "; error " << largest << ", allowed " << tolerance;
  return verify(false, text.str());
}

}  // namespace rnnfast::test
