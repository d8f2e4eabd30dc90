// A strip's rows in memory, with a border. For files compiled for some processors alone: it includes nothing whose inline
// functions could end up in other hands, and what it holds is their own.
//
// The border is of zeros: P = width + 2 pixels a row, a row above and one below. There a 3x3 convolution is nine matrix
// products on one and the same memory: for the output at position q = row * P + column the tap (dy, dx) reads position
// q + dy * P + dx. All positions are computed 32 at a time, the two of each row that lie in the border (4 % of an eye)
// for nothing, and no row's end needs care.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "residual_block_strips.h"

namespace fastsimgan::residual_block_strips {
namespace {

constexpr int64_t kPixels = 32;  // positions, and kMaps output maps, that are computed at a time

template <typename T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {}
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
};

// Rows with a border, and behind them room for what whole groups of positions read and write too much.
template <typename T>
struct Bordered {
  int64_t rows, pitch, maps;  // rows with the two of the border; pixels a row with the two of the border
  Buffer<T> buffer;
  Bordered(int64_t most_rows, int64_t pitch, int64_t maps)
      : rows(most_rows), pitch(pitch), maps(maps), buffer(positions_with_room() * maps) {}
  int64_t positions_with_room() const { return rows * pitch + 2 * pitch + 3 + kPixels; }
  T* at(int64_t row, int64_t column) const { return buffer.data + (row * pitch + column) * maps; }
  void clear_row(int64_t row) const { memset(at(row, 0), 0, pitch * maps * sizeof(T)); }
  // Zeros in the border and in the room: all but the image's rows, of which this holds those from `first` on.
  void clear_border(int64_t first, int64_t height) const {
    for (int64_t row = 0; row < rows; ++row) {
      if (first + row < 0 || first + row >= height) clear_row(row);
      memset(at(row, 0), 0, maps * sizeof(T));
      memset(at(row, pitch - 1), 0, maps * sizeof(T));
    }
    memset(at(rows, 0), 0, (positions_with_room() - rows * pitch) * maps * sizeof(T));
  }
};

int64_t most_rows(const Images& images) {
  const int64_t strips = images.strips_an_image();
  return (images.height + strips - 1) / strips;
}

struct Rows {
  int64_t image, first, count;
};

Rows rows_of(const Images& images, int64_t strip) {
  const int64_t strips = images.strips_an_image(), number = strip % strips;
  const int64_t first = number * images.height / strips, last = (number + 1) * images.height / strips;
  return {strip / strips, first, last - first};
}

// Calls `inside(i, row, column)` for those of the 32 positions q + i that are neither in the border nor behind the rows.
template <typename Inside>
inline void for_pixels(int64_t q, int64_t pitch, int64_t rows, const Inside& inside) {
  int64_t row = q / pitch, column = q % pitch;
  for (int64_t i = 0; i < kPixels && row < rows; ++i) {
    if (column < pitch - 2) inside(i, row, column);
    if (++column == pitch) column = 0, ++row;
  }
}

}  // namespace
}  // namespace fastsimgan::residual_block_strips
