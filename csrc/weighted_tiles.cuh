// Where the elements of an activation with a learnable weight are: the tensor as a matrix, and the
// tiles that it is cut into.
#pragma once

#include <array>

#include "access.cuh"

namespace fused_act::weighted {

// Of a tile whose columns have weights: one cache line. Wider ones have few rows to sum over.
constexpr int kColumnBytes = 128;
constexpr int kWarp = 32;

// A dense tensor as its memory has it: rows of `columns` elements, the last of which may be short.
// Rows have the weights in turn, or columns have them (channels_last, or a batch of vectors).
struct Matrix {
  int64_t numel;
  int64_t columns;
  int64_t weights;
  int column_blocks;  // tiles beside each other
  int log_across;     // threads beside each other in a tile, the others below: log2 of their number

  __host__ __device__ int across() const { return 1 << log_across; }
  int64_t rows() const { return (numel + columns - 1) / columns; }
};

// A thread of a tile has kWidth elements beside each other in kRuns rows. More elements share the
// cost of weights, sums and places; narrow accesses would need too many registers for as many.
template <typename T, int kWidth>
struct Tile {
  static constexpr bool kWide = kWidth * sizeof(T) == 16;
  static constexpr int kRuns = (kWide ? 64 : 32) / (kWidth * sizeof(T));
  // Blocks per SM that kernels are compiled for: 64 registers a thread, 128 with narrow accesses.
  static constexpr int kBlocks = kWide ? 4 : 2;

  static int64_t row_blocks(const Matrix& matrix) {
    const int64_t rows = kRuns * (kThreads >> matrix.log_across);
    return (matrix.rows() + rows - 1) / rows;
  }

  static int64_t blocks(const Matrix& matrix) { return row_blocks(matrix) * matrix.column_blocks; }

  // `inner` is the stride of the channels, which says where the weights are; of no account for one
  // weight, for which rows are as wide as a block.
  template <bool kByColumn>
  static Matrix matrix(int64_t numel, int64_t weights, int64_t inner) {
    Matrix result{numel, weights == 1 ? kThreads * kWidth : kByColumn ? weights : inner, weights};
    const int widest = kByColumn ? kColumnBytes / (kWidth * static_cast<int>(sizeof(T))) : kThreads;
    // The sum by column takes the threads of a column to be lanes of one number.
    const int limit = kByColumn && widest > kWarp ? kWarp : widest;
    while (result.across() < limit && result.across() * kWidth < result.columns) {
      result.log_across++;
    }
    const int64_t tile_columns = result.across() * kWidth;
    result.column_blocks = static_cast<int>((result.columns + tile_columns - 1) / tile_columns);
    return result;
  }
};

// Where the elements of one thread are.
template <typename T, int kWidth>
struct Place {
  int64_t row;  // that of its first run
  int64_t column;
  int64_t row_block;
  int column_block;
  int row_step;  // from one run to the next
  bool full;     // whether the whole tile lies inside

  __host__ __device__ Place(const Matrix& matrix, int block, int thread) {
    constexpr int kRuns = Tile<T, kWidth>::kRuns;
    row_step = kThreads >> matrix.log_across;
    // Of 32 bits, for a division in 64 costs as much as some elements do. All else has 64: there
    // may be more than 2^31 elements.
    row_block = block / matrix.column_blocks;
    column_block = block % matrix.column_blocks;
    const int64_t first_row = row_block * (kRuns * row_step);
    const int64_t first_column = static_cast<int64_t>(column_block) * (matrix.across() * kWidth);
    const int64_t end = first_column + matrix.across() * kWidth;
    full = end <= matrix.columns &&
           (first_row + kRuns * row_step - 1) * matrix.columns + end <= matrix.numel;
    row = first_row + (thread >> matrix.log_across);
    column = first_column + (thread & (matrix.across() - 1)) * kWidth;
  }

  __host__ __device__ int64_t offset(const Matrix& matrix, int run) const {
    return (row + run * row_step) * matrix.columns + column;
  }

  // How many elements of a run are inside the matrix; none if that is not positive.
  __host__ __device__ int64_t left(const Matrix& matrix, int run) const {
    const int64_t in_row = matrix.columns - column;
    const int64_t in_all = matrix.numel - offset(matrix, run);
    return in_row < in_all ? in_row : in_all;
  }
};

// The shape of the sums that backward makes: the first and the last dimension are still to be
// summed over.
template <bool kByColumn, int kWidth, typename T>
std::array<int64_t, 3> shape_of_sums(const Matrix& matrix) {
  if (kByColumn) {
    return {Tile<T, kWidth>::row_blocks(matrix), matrix.weights, 1};
  }
  return {matrix.rows() / matrix.weights, matrix.weights, matrix.column_blocks};
}

}  // namespace fused_act::weighted
