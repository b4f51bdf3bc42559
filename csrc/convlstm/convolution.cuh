// The convolution of both passes of the persistent ConvLSTM: a CTA's slice of the weight stays in shared memory, tiles
// of the state are staged next to it, and the tensor cores multiply.
//
// Of the 16 input channels of a segment, lane l holds the four from 4 (l % 4) on, where the PTX ISA's fragment layout
// says 2q, 2q+1, 2q+8, 2q+9 with q = l % 4: a sum has no order, so weight and state need only agree, and a lane's share
// is 8 contiguous bytes. No load from shared memory has a bank conflict if a tile is at least 4 pixels wide.
#pragma once

#include "convlstm/device.cuh"
#include "convlstm/persistent.h"

namespace rlv2v {

// The place of a block in the grid, and of a thread in its block.
struct GridPosition {
  int group, slice, cta, warp, lane;

  RLV2V_DEVICE explicit GridPosition(const PersistentGeometry& geo)
      : group(device::block() / (geo.slices * geo.ctas)), slice(device::block() / geo.ctas % geo.slices),
        cta(device::block() % geo.ctas), warp(device::thread() / 32), lane(device::thread() % 32) {}
};

// Each warp has kRows tiles of 16 pixels by kColumns tiles of 8 columns; kAcross warps share the same pixels.
template <class D, int kRows, int kColumns, int kAcross>
class Convolution {
 public:
  static constexpr int kTiles = kColumns * kAcross;
  using Sums = float[kRows][kColumns][4];
  using Pixels = int[kRows][2];

  RLV2V_DEVICE Convolution(const PersistentGeometry& geometry, const GridPosition& position, int inputs)
      : geo_(geometry), inputs_(inputs), segments_((inputs + 15) / 16), lane_(position.lane),
        across_(position.warp % kAcross), weight_(device::shared()), stages_(device::shared() + geometry.weight_bytes) {
    RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
      RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
        const Position in_tile(geo_, tile_row(position.warp, m, half));
        rows_[m][half] = in_tile.row << 16 | in_tile.column | in_tile.image << 8;
        patch_[m][half] = (in_tile.image * geo_.patch_height + in_tile.row) * geo_.patch_width + in_tile.column;
      }
    }
  }

  RLV2V_DEVICE void clear_weight() const {
    for (int offset = 16 * device::thread(); offset < geo_.weight_bytes; offset += 16 * kPersistentThreads) {
      device::store(weight_ + offset, device::Words4{0, 0, 0, 0});
    }
    device::sync_threads();
  }

  // Stores a weight in shared memory in the order in which the lanes load it.
  RLV2V_DEVICE void set_weight(int tap, int input, int column, std::uint16_t value) const {
    constexpr int kTogether = kColumns > 1 ? 2 : 1;  // column tiles that a lane loads at once
    const int tile = column / 8;
    const int lane = column % 8 * 4 + input % 16 / 4;
    const int first = ((tap * segments_ + input / 16) * kTiles + tile / kTogether * kTogether) * 64;
    const int word = first + (lane * kTogether + tile % kTogether) * 2 + input % 4 / 2;
    device::store(weight_ + 4 * word + 2 * (input % 2), value);
  }

  // Finds the pixels in the frame that the lane's sums belong to, -1 outside the frame or past C.
  RLV2V_DEVICE void locate(int tile, int channels, Pixels& pixels) const {
    const Corner corner(geo_, tile);
    RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
      RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
        const int packed = rows_[m][half];
        const int in_frame =
            pixel(corner.image + (packed >> 8 & 255), corner.row + (packed >> 16), corner.column + (packed & 255));
        pixels[m][half] = channels > 0 ? in_frame : -1;
      }
    }
  }

  // Starts to stage the first chunk of a tile.
  RLV2V_DEVICE void begin(int tile, const std::uint16_t* frame) const { stage(tile, 0, buffer_, frame); }

  // sums += the convolution of the frame at the tile, which has begun; also begins the next tile, unless it is -1.
  RLV2V_DEVICE void accumulate(Sums& sums, int tile, int next, const std::uint16_t* frame) {
    const int chunks = (segments_ + geo_.chunk - 1) / geo_.chunk;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool last = chunk + 1 == chunks;
      device::copy_wait();
      device::sync_threads();  // all threads see this stage, and none reads the other one any more
      if (!last) stage(tile, chunk + 1, buffer_ ^ 1, frame);
      if (last && next >= 0) stage(next, 0, buffer_ ^ 1, frame);
      multiply(sums, chunk);
      buffer_ ^= 1;
    }
  }

 private:
  struct Position {
    int image, row, column;
    RLV2V_DEVICE Position(const PersistentGeometry& geo, int index)
        : image(index >> (geo.log_height + geo.log_width)), row(index >> geo.log_width & ((1 << geo.log_height) - 1)),
          column(index & ((1 << geo.log_width) - 1)) {}
  };
  struct Corner {
    int image, row, column;
    RLV2V_DEVICE Corner(const PersistentGeometry& geo, int tile)
        : image(tile / (geo.tiles_width * geo.tiles_height) << geo.log_batch),
          row(tile / geo.tiles_width % geo.tiles_height << geo.log_height),
          column(tile % geo.tiles_width << geo.log_width) {}
  };

  RLV2V_DEVICE int tile_row(int warp, int m, int half) const {
    return (warp / kAcross * kRows + m) * 16 + half * 8 + lane_ / 4;
  }

  RLV2V_DEVICE int pixel(int image, int row, int column) const {
    const bool inside = image < geo_.batch && row >= 0 && row < geo_.height && column >= 0 && column < geo_.width;
    return inside ? (image * geo_.height + row) * geo_.width + column : -1;
  }

  // A patch holds `chunk` segments of 32 bytes a pixel, rotated by the pixel: four neighbours are in different banks.
  RLV2V_DEVICE int rotation(int patch_pixel) const {
    return (geo_.chunk == 2 ? patch_pixel >> 1 : patch_pixel) & (geo_.chunk - 1);
  }
  RLV2V_DEVICE char* stage_at(int buffer) const { return stages_ + buffer * geo_.patch_pixels * geo_.chunk * 32; }

  // Copies a tile and its halo to shared memory: 16 * chunk channels of each pixel, zeros outside the frame and past C.
  RLV2V_DEVICE void stage(int tile, int chunk, int buffer, const std::uint16_t* frame) const {
    const Corner corner(geo_, tile);
    const int halo = geo_.kernel / 2;
    const int first = chunk * geo_.chunk * 16;
    const int channels =
        16 * (segments_ - chunk * geo_.chunk < geo_.chunk ? segments_ - chunk * geo_.chunk : geo_.chunk);
    const bool wide = inputs_ % 8 == 0;  // 16 bytes at a time; else channel by channel
    const int log_units = (geo_.chunk == 4 ? 2 : geo_.chunk - 1) + (wide ? 1 : 4);
    char* const to = stage_at(buffer);
    for (int k = device::thread(); k < geo_.patch_pixels << log_units; k += kPersistentThreads) {
      const int patch_pixel = k >> log_units;
      const int unit = k & ((1 << log_units) - 1);
      const int channel = wide ? 8 * unit : unit;
      if (channel >= channels) continue;  // past the last segment: never read
      const auto image = static_cast<int>(static_cast<std::uint32_t>(patch_pixel) * geo_.per_image >> 20);
      const int in_image = patch_pixel - image * geo_.patch_height * geo_.patch_width;
      const auto row = static_cast<int>(static_cast<std::uint32_t>(in_image) * geo_.per_row >> 20);
      const int column = in_image - row * geo_.patch_width;
      const int from = pixel(corner.image + image, corner.row + row - halo, corner.column + column - halo);
      const bool inside = from >= 0 && first + channel < inputs_;
      const std::uint16_t* source = inside ? frame + from * inputs_ + first + channel : frame;
      char* const target =
          to + (patch_pixel * geo_.chunk + (channel / 16 ^ rotation(patch_pixel))) * 32 + channel % 16 * 2;
      if (wide) {
        device::copy_async(target, source, inside);
      } else {
        device::store(target, inside ? device::load_l2(source) : std::uint16_t{0});
      }
    }
  }

  RLV2V_DEVICE void multiply(Sums& sums, int chunk) const {
    const int first = chunk * geo_.chunk;
    const int segments = segments_ - first < geo_.chunk ? segments_ - first : geo_.chunk;
    const char* const from = stage_at(buffer_) + lane_ % 4 * 8;
    for (int tap = 0, row = 0; row < geo_.kernel; ++row) {
      for (int column = 0; column < geo_.kernel; ++column, ++tap) {
        const int shift = row * geo_.patch_width + column;
        const char* weight = weight_ + ((tap * segments_ + first) * kTiles + across_ * kColumns) * 256;
        for (int segment = 0; segment < segments; ++segment, weight += kTiles * 256) {
          std::uint32_t state[kRows][4];
          RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
            RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
              const int patch_pixel = patch_[m][half] + shift;
              const auto words = device::load<device::Words2>(
                  from + (patch_pixel * geo_.chunk + (segment ^ rotation(patch_pixel))) * 32);
              state[m][half] = words.x;
              state[m][half + 2] = words.y;
            }
          }
          multiply_segment(sums, state, weight);
        }
      }
    }
  }

  RLV2V_DEVICE void multiply_segment(Sums& sums, const std::uint32_t (&state)[kRows][4], const char* weight) const {
    if constexpr (kColumns == 1) {
      const auto words = device::load<device::Words2>(weight + lane_ * 8);
      RLV2V_UNROLL for (int m = 0; m < kRows; ++m)
        device::multiply_add<D>(sums[m][0], state[m], words.x, words.y);
    } else {
      RLV2V_UNROLL for (int n = 0; n < kColumns; n += 2) {
        const auto words = device::load<device::Words4>(weight + n * 256 + lane_ * 16);
        RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
          device::multiply_add<D>(sums[m][n], state[m], words.x, words.y);
          device::multiply_add<D>(sums[m][n + 1], state[m], words.z, words.w);
        }
      }
    }
  }

  const PersistentGeometry& geo_;
  const int inputs_, segments_, lane_, across_;
  char* const weight_;
  char* const stages_;
  int buffer_ = 0;  // of the two stages, the one that is multiplied next
  Pixels rows_;     // of the lane's sums, position in the tile: row, image, column in a byte each
  Pixels patch_;    // the first pixel that each of them sums over
};

}  // namespace rlv2v
