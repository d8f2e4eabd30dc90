// The arithmetic of residual_block_float32.h for vectors of FASTSIMGAN_LANES floats, which the file that includes this
// defines and is compiled for. It includes nothing whose inline functions could end up in other hands: no torch header, no standard
// template; and all but the table at its end is that file's own.
#pragma once

#include "residual_block_float32.h"

namespace fastsimgan::residual_block_float32 {
namespace {

constexpr int kLanes = FASTSIMGAN_LANES;

// GCC and Clang compile arithmetic on them to vector instructions.
using Vector = float __attribute__((vector_size(4 * kLanes)));
using Unaligned = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }
inline Vector where_positive(Vector condition, Vector value) {
  return condition > 0.0f ? value : Vector{};  // NaN counts as not positive
}

// The polynomials are interpolated at 0, +-a, +-b and infinity with a = 1/sqrt(2), b = sqrt(2): the error is a fifth of
// that of the usual points +-1, +-2, twice that of adding the products up one by one.
constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
constexpr float kSum = 2.5f;  // a^2 + b^2; a^2 b^2 = 1
constexpr float kA2 = 0.5f, kB2 = 2.0f, kA3 = a * kA2, kB3 = b * kB2;
// Norms of the Lagrange polynomials at +-a and +-b; at 0 it is 1.
constexpr float kNa = 2 * kA2 * (kA2 - kB2), kNb = 2 * kB2 * (kB2 - kA2);

// B^T d: 6 values in, 6 out.
template <typename V>
inline void transform_input(const V d[6], V t[6]) {
  const V even_a = d[4] - kB2 * d[2], odd_a = a * d[3] - a * kB2 * d[1];
  const V even_b = d[4] - kA2 * d[2], odd_b = b * d[3] - b * kA2 * d[1];
  t[0] = d[0] - kSum * d[2] + d[4];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = d[1] - kSum * d[3] + d[5];
}

// A^T m: 6 values in, 4 out.
template <typename V>
inline void transform_output(const V m[6], V y[4]) {
  const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = a * difference_a + b * difference_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = kA3 * difference_a + kB3 * difference_b + m[5];
}

// A e, the transpose of the above: 4 values in, 6 out.
template <typename V>
inline void transform_gradient(const V e[4], V t[6]) {
  const V even_a = e[0] + kA2 * e[2], odd_a = a * e[1] + kA3 * e[3];
  const V even_b = e[0] + kB2 * e[2], odd_b = b * e[1] + kB3 * e[3];
  t[0] = e[0];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = e[3];
}

// G g: 3 values in, 6 out.
inline void transform_kernel(const float g[3], float t[6]) {
  t[0] = g[0];
  t[1] = (g[0] + a * g[1] + kA2 * g[2]) / kNa;
  t[2] = (g[0] - a * g[1] + kA2 * g[2]) / kNa;
  t[3] = (g[0] + b * g[1] + kB2 * g[2]) / kNb;
  t[4] = (g[0] - b * g[1] + kB2 * g[2]) / kNb;
  t[5] = g[2];
}

// G^T u, the transpose of the above: 6 values in, 3 out.
inline void transform_kernel_back(const float u[6], float g[3]) {
  g[0] = u[0] + (u[1] + u[2]) / kNa + (u[3] + u[4]) / kNb;
  g[1] = a * (u[1] - u[2]) / kNa + b * (u[3] - u[4]) / kNb;
  g[2] = kA2 * (u[1] + u[2]) / kNa + kB2 * (u[3] + u[4]) / kNb + u[5];
}

struct Tile {
  int64_t image, y, x;  // of its first pixel
};

inline Tile tile_at(const Features& f, int64_t number) {
  const int64_t column = number % f.columns(), row = number / f.columns() % f.rows();
  return {number / (f.columns() * f.rows()), 4 * row, 4 * column};
}

alignas(64) const float zeros[kMostMaps] = {};

// Pointers to the first maps of the size x size pixels from (y, x) on; those outside the image point to zeros.
template <int size>
inline void pixels(const Features& f, const float* images, int64_t image, int64_t y, int64_t x,
                   const float* found[size][size]) {
  for (int i = 0; i < size; ++i) {
    for (int j = 0; j < size; ++j) {
      const bool inside = y + i >= 0 && y + i < f.height && x + j >= 0 && x + j < f.width;
      found[i][j] = inside ? images + ((image * f.height + y + i) * f.width + x + j) * f.maps : zeros;
    }
  }
}

// Transformed inputs of `count` tiles from number `first` on, as [36][strip][C].
void transform_inputs(const Features& f, const float* in, int64_t first, int64_t count, float* out) {
  const int64_t step = f.strip() * f.maps;
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(f, first + t);
    const float* from[6][6];
    pixels<6>(f, in, tile.image, tile.y - 1, tile.x - 1, from);
    for (int64_t c = 0; c < f.maps; c += kLanes) {
      Vector columns[6][6];
      for (int j = 0; j < 6; ++j) {
        Vector d[6], column[6];
        for (int i = 0; i < 6; ++i) d[i] = load(from[i][j] + c);
        transform_input(d, column);
        for (int i = 0; i < 6; ++i) columns[i][j] = column[i];
      }
      for (int i = 0; i < 6; ++i) {
        Vector row[6];
        transform_input(columns[i], row);
        for (int j = 0; j < 6; ++j) store(out + (6 * i + j) * step + t * f.maps + c, row[j]);
      }
    }
  }
}

// The same for gradients of outcomes: 4x4 values to 36.
void transform_gradients(const Features& f, const float* grad, int64_t first, int64_t count, float* out) {
  const int64_t step = f.strip() * f.maps;
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(f, first + t);
    const float* from[4][4];
    pixels<4>(f, grad, tile.image, tile.y, tile.x, from);
    for (int64_t c = 0; c < f.maps; c += kLanes) {
      Vector columns[6][4];
      for (int j = 0; j < 4; ++j) {
        Vector e[4], column[6];
        for (int i = 0; i < 4; ++i) e[i] = load(from[i][j] + c);
        transform_gradient(e, column);
        for (int i = 0; i < 6; ++i) columns[i][j] = column[i];
      }
      for (int i = 0; i < 6; ++i) {
        Vector row[6];
        transform_gradient(columns[i], row);
        for (int j = 0; j < 6; ++j) store(out + (6 * i + j) * step + t * f.maps + c, row[j]);
      }
    }
  }
}

// sums[row][v] += over `depth` of left[row * row_step + d * left_step] * right[d * right_step + kLanes * v ..]
template <int rows, int vectors>
inline void multiply(const float* left, int64_t row_step, int64_t left_step, const float* right, int64_t right_step,
                     int64_t depth, Vector sums[rows][vectors]) {
  for (int64_t d = 0; d < depth; ++d) {
    Vector r[vectors];
    for (int v = 0; v < vectors; ++v) r[v] = load(right + d * right_step + kLanes * v);
    for (int row = 0; row < rows; ++row) {
      const Vector l = all(left[row * row_step + d * left_step]);
      for (int v = 0; v < vectors; ++v) sums[row][v] += l * r[v];
    }
  }
}

// Six tiles' products with kLanes * vectors output maps, for each of the 36 frequencies: products[36][strip][kLanes * vectors].
template <int vectors>
void multiply_strip(const Features& f, int64_t count, const float* inputs, const float* weights, float* products) {
  for (int frequency = 0; frequency < 36; ++frequency) {
    const float* left = inputs + frequency * f.strip() * f.maps;
    const float* right = weights + frequency * f.maps * kLanes * vectors;
    float* to = products + frequency * f.strip() * kLanes * vectors;
    for (int64_t t = 0; t < count; t += 6) {  // the last six may hold tiles of an earlier strip, which nobody reads
      Vector sums[6][vectors] = {};
      multiply<6, vectors>(left + t * f.maps, f.maps, 1, right, kLanes * vectors, f.maps, sums);
      for (int row = 0; row < 6; ++row)
        for (int v = 0; v < vectors; ++v) store(to + (t + row) * kLanes * vectors + kLanes * v, sums[row][v]);
    }
  }
}

struct Ending {
  const float *bias, *add, *positive;
  bool relu;
};

// Products of a strip back to pixels, kLanes * vectors maps from number `first_map` on.
template <int vectors>
void finish_strip(const Features& f, int64_t first, int64_t count, int64_t first_map, const float* products,
                  const Ending& ending, float* out) {
  const int64_t step = f.strip() * kLanes * vectors;
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(f, first + t);
    const int64_t height = f.height - tile.y < 4 ? f.height - tile.y : 4;
    const int64_t width = f.width - tile.x < 4 ? f.width - tile.x : 4;
    const int64_t corner = ((tile.image * f.height + tile.y) * f.width + tile.x) * f.maps + first_map;
    for (int v = 0; v < vectors; ++v) {
      const float* from = products + t * kLanes * vectors + kLanes * v;
      Vector rows[4][6];
      for (int j = 0; j < 6; ++j) {
        Vector m[6], column[4];
        for (int i = 0; i < 6; ++i) m[i] = load(from + (6 * i + j) * step);
        transform_output(m, column);
        for (int i = 0; i < 4; ++i) rows[i][j] = column[i];
      }
      const Vector bias = ending.bias ? load(ending.bias + first_map + kLanes * v) : Vector{};
      for (int64_t i = 0; i < height; ++i) {
        Vector y[4];
        transform_output(rows[i], y);
        for (int64_t j = 0; j < width; ++j) {
          const int64_t at = corner + (i * f.width + j) * f.maps + kLanes * v;
          Vector value = y[j] + bias;
          if (ending.add) value += load(ending.add + at);
          if (ending.positive) value = where_positive(load(ending.positive + at), value);
          // max(value, 0) that lets NaN through, as torch's does: a loss that went wrong must show
          if (ending.relu) value = value <= 0.0f ? Vector{} : value;
          store(out + at, value);
        }
      }
    }
  }
}

template <int vectors>
void convolve_maps(const Features& f, int64_t first, int64_t count, int64_t first_map, const float* inputs,
                   const float* weights, const Ending& ending, float* products, float* out) {
  multiply_strip<vectors>(f, count, inputs, weights + 36 * f.maps * first_map, products);
  finish_strip<vectors>(f, first, count, first_map, products, ending, out);
}

template <int rows, int vectors>
inline void accumulate(const Features& f, int64_t count, const float* left, const float* right, float* sums) {
  Vector s[rows][vectors];
  for (int row = 0; row < rows; ++row)
    for (int v = 0; v < vectors; ++v) s[row][v] = load(sums + row * f.maps + kLanes * v);
  multiply<rows, vectors>(left, 1, f.maps, right, f.maps, count, s);
  for (int row = 0; row < rows; ++row)
    for (int v = 0; v < vectors; ++v) store(sums + row * f.maps + kLanes * v, s[row][v]);
}

template <int vectors>
void accumulate_maps(const Features& f, int64_t count, int64_t k, const float* left, const float* right, float* sums) {
  int64_t c = 0;
  for (; c + 6 <= f.maps; c += 6) accumulate<6, vectors>(f, count, left + c, right + k, sums + c * f.maps + k);
  for (; c < f.maps; c += 2) accumulate<2, vectors>(f, count, left + c, right + k, sums + c * f.maps + k);
}

inline int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

void transform_weights(const float* weight, const int64_t* strides, int64_t maps, bool backward, float* transformed) {
  // For each two vectors (or the last one) of output maps: [36][C inputs][2 * kLanes]
  for (int64_t first = 0; first < maps; first += 2 * kLanes) {
    const int64_t many = least(2 * kLanes, maps - first);
    float* block = transformed + 36 * maps * first;
    for (int64_t c = 0; c < maps; ++c) {
      for (int64_t k = 0; k < many; ++k) {
        const float* kernel = weight + (backward ? c * strides[0] + (first + k) * strides[1]
                                                 : (first + k) * strides[0] + c * strides[1]);
        float columns[6][3];
        for (int j = 0; j < 3; ++j) {
          float g[3], column[6];
          for (int i = 0; i < 3; ++i) {
            g[i] = backward ? kernel[(2 - i) * strides[2] + (2 - j) * strides[3]] : kernel[i * strides[2] + j * strides[3]];
          }
          transform_kernel(g, column);
          for (int i = 0; i < 6; ++i) columns[i][j] = column[i];
        }
        for (int i = 0; i < 6; ++i) {
          float row[6];
          transform_kernel(columns[i], row);
          for (int j = 0; j < 6; ++j) block[((6 * i + j) * maps + c) * many + k] = row[j];
        }
      }
    }
  }
}

void convolve(const Features& f, int64_t from, int64_t to, const float* in, const float* weights, const float* bias,
              const float* add, const float* positive, bool relu, float* out, float* scratch) {
  const Ending ending{bias, add, positive, relu};
  float* products = scratch + f.transformed();
  for (int64_t strip = from; strip < to; ++strip) {
    const int64_t first = strip * f.strip(), count = least(f.strip(), f.tiles() - first);
    transform_inputs(f, in, first, count, scratch);
    int64_t map = 0;
    for (; map + 2 * kLanes <= f.maps; map += 2 * kLanes) convolve_maps<2>(f, first, count, map, scratch, weights, ending, products, out);
    if (map < f.maps) convolve_maps<1>(f, first, count, map, scratch, weights, ending, products, out);
  }
}

void weight_gradient(const Features& f, int64_t from, int64_t to, const float* in, const float* grad, float* gradient,
                     float* scratch) {
  float* gradients = scratch + f.transformed();
  for (int64_t strip = from; strip < to; ++strip) {
    const int64_t first = strip * f.strip(), count = least(f.strip(), f.tiles() - first);
    transform_inputs(f, in, first, count, scratch);
    transform_gradients(f, grad, first, count, gradients);
    for (int frequency = 0; frequency < 36; ++frequency) {
      const float* left = scratch + frequency * f.strip() * f.maps;
      const float* right = gradients + frequency * f.strip() * f.maps;
      float* sums = gradient + frequency * f.maps * f.maps;
      int64_t k = 0;
      for (; k + 2 * kLanes <= f.maps; k += 2 * kLanes) accumulate_maps<2>(f, count, k, left, right, sums);
      if (k < f.maps) accumulate_maps<1>(f, count, k, left, right, sums);
    }
  }
}

void transform_back(const float* gradient, int64_t maps, float* weight_gradient) {
  const int64_t step = maps * maps;  // gradient is [36][C inputs][C outputs]
  for (int64_t k = 0; k < maps; ++k) {
    for (int64_t c = 0; c < maps; ++c) {
      const float* from = gradient + c * maps + k;
      float* to = weight_gradient + (k * maps + c) * 9;
      float rows[6][3], largest = 0.0f;
      for (int i = 0; i < 6; ++i) {
        float u[6];
        for (int j = 0; j < 6; ++j) {
          u[j] = from[(6 * i + j) * step];
          const float size = u[j] < 0.0f ? -u[j] : u[j];
          largest = size > largest ? size : largest;
        }
        transform_kernel_back(u, rows[i]);
      }
      // A tap where features and gradients never meet (both are sparse behind ReLUs) has a gradient of exactly 0. Rounding
      // would leave 1e-8 of it, and Adam, which divides by a gradient's own size, make that a full step.
      const float rounding = 2.5e-7f * largest;
      for (int j = 0; j < 3; ++j) {
        float u[6], g[3];
        for (int i = 0; i < 6; ++i) u[i] = rows[i][j];
        transform_kernel_back(u, g);
        for (int i = 0; i < 3; ++i) to[3 * i + j] = g[i] > rounding || g[i] < -rounding || g[i] != g[i] ? g[i] : 0.0f;
      }
    }
  }
}

void mask_and_sum(const float* grad, const float* out, int64_t pixels, int64_t maps, float* masked, float* sums) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (int64_t c = 0; c < maps; c += kLanes) {
      const int64_t at = pixel * maps + c;
      Vector value = load(grad + at);
      if (out) {
        value = where_positive(load(out + at), value);
        store(masked + at, value);
      }
      if (sums) store(sums + c, load(sums + c) + value);
    }
  }
}

constexpr Kernels kTable{kLanes, transform_weights, convolve, weight_gradient, transform_back, mask_and_sum};

}  // namespace
}  // namespace fastsimgan::residual_block_float32
