// What hopper.cpp (mbarriers, copies) and wgmma.cpp (products and their registers) ask of each other.
#pragma once

#include <cstdint>
#include <cstring>

#include "state.h"

namespace emulator {

struct Span {
  const char *begin, *end;
  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

inline uint16_t bits_at(const char* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

// Does a copy under way write some of these bytes, or a product under way read some?
bool copies_write(const Span& bytes);
bool products_read(const Span& bytes);

void begin_products();   // of a block
bool finish_products();  // of a warpgroup that waits for them; false: none does
bool products_under_way();

}  // namespace emulator
