// The ConvLSTM recurrence as plain loops in fp64, on arrays laid out as those of convlstm/persistent.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "convlstm/persistent.h"

namespace rlv2v {

using Doubles = std::vector<double>;

struct Recurrence {
  ConvLstmShape shape;
  std::size_t pixels, c;

  explicit Recurrence(const ConvLstmShape& of)
      : shape(of), pixels(std::size_t(of.batch) * std::size_t(of.height) * std::size_t(of.width)),
        c(std::size_t(of.channels)) {}

  std::size_t frame(int group, int t) const {
    return (std::size_t(group) * std::size_t(shape.steps) + std::size_t(t)) * pixels;
  }

  // Calls f(pixel, neighbour, tap): both are inside the frame, neighbour = pixel + tap - k / 2.
  template <class F>
  void for_neighbours(const F& f) const {
    const int reach = shape.kernel / 2;
    for (int b = 0, pixel = 0; b < shape.batch; ++b) {
      for (int y = 0; y < shape.height; ++y) {
        for (int x = 0; x < shape.width; ++x, ++pixel) {
          for (int tap = 0; tap < shape.kernel * shape.kernel; ++tap) {
            const int dy = tap / shape.kernel - reach;
            const int dx = tap % shape.kernel - reach;
            if (y + dy < 0 || y + dy >= shape.height || x + dx < 0 || x + dx >= shape.width) continue;
            f(std::size_t(pixel), std::size_t(pixel + dy * shape.width + dx), std::size_t(tap));
          }
        }
      }
    }
  }

  double weight(const Doubles& w, int group, std::size_t out, std::size_t in, std::size_t tap) const {
    return w[((std::size_t(group) * 4 * c + out) * c + in) * std::size_t(shape.kernel * shape.kernel) + tap];
  }

  // Empty h0, c0: zero.
  void forward(const Doubles& a, const Doubles& w, const Doubles& h0, const Doubles& c0, Doubles& hs, Doubles& cs,
               Doubles& gates) const {
    gates = a;
    hs.assign(a.size() / 4, 0);
    cs.assign(a.size() / 4, 0);
    for (int group = 0; group < shape.groups; ++group) {
      for (int t = 0; t < shape.steps; ++t) {
        const std::size_t now = frame(group, t);
        const std::size_t state = std::size_t(group) * pixels * c;
        const double* h_prev = t > 0 ? &hs[(now - pixels) * c] : h0.empty() ? nullptr : &h0[state];
        const double* c_prev = t > 0 ? &cs[(now - pixels) * c] : c0.empty() ? nullptr : &c0[state];
        if (h_prev) {
          for_neighbours([&](std::size_t pixel, std::size_t neighbour, std::size_t tap) {
            for (std::size_t out = 0; out < 4 * c; ++out) {
              for (std::size_t in = 0; in < c; ++in) {
                gates[(now + pixel) * 4 * c + out] += weight(w, group, out, in, tap) * h_prev[neighbour * c + in];
              }
            }
          });
        }
        for (std::size_t k = 0; k < pixels * c; ++k) {
          double* gate = &gates[(now + k / c) * 4 * c + k % c];
          for (std::size_t n = 0; n < 3; ++n) gate[n * c] = 1 / (1 + std::exp(-gate[n * c]));
          gate[3 * c] = std::tanh(gate[3 * c]);
          const double cell = gate[c] * (c_prev ? c_prev[k] : 0) + gate[0] * gate[3 * c];
          cs[now * c + k] = cell;
          hs[now * c + k] = gate[2 * c] * std::tanh(cell);
        }
      }
    }
  }

  // gates: activated. Empty dcs, c0: zero.
  void backward(const Doubles& dhs, const Doubles& dcs, const Doubles& gates, const Doubles& cs, const Doubles& c0,
                const Doubles& w, Doubles& da, Doubles& dh0, Doubles& dc0) const {
    da.assign(gates.size(), 0);
    dh0.clear();
    dc0.clear();
    for (int group = 0; group < shape.groups; ++group) {
      Doubles dh(pixels * c), carry(pixels * c);
      for (int t = shape.steps - 1; t >= 0; --t) {
        const std::size_t now = frame(group, t);
        for (std::size_t k = 0; k < pixels * c; ++k) {
          const double* gate = &gates[(now + k / c) * 4 * c + k % c];
          double* to = &da[(now + k / c) * 4 * c + k % c];
          const double i = gate[0], f = gate[c], o = gate[2 * c], g = gate[3 * c];
          const double tanh_c = std::tanh(cs[now * c + k]);
          const double first = c0.empty() ? 0 : c0[std::size_t(group) * pixels * c + k];
          const double c_prev = t > 0 ? cs[(now - pixels) * c + k] : first;
          const double dh_now = dh[k] + dhs[now * c + k];
          const double dc = carry[k] + (dcs.empty() ? 0 : dcs[now * c + k]) + dh_now * o * (1 - tanh_c * tanh_c);
          to[0] = dc * g * i * (1 - i);
          to[c] = dc * c_prev * f * (1 - f);
          to[2 * c] = dh_now * tanh_c * o * (1 - o);
          to[3 * c] = dc * i * (1 - g * g);
          carry[k] = dc * f;
        }
        dh.assign(dh.size(), 0);
        for_neighbours([&](std::size_t pixel, std::size_t neighbour, std::size_t tap) {
          for (std::size_t out = 0; out < 4 * c; ++out) {
            for (std::size_t in = 0; in < c; ++in) {
              dh[neighbour * c + in] += weight(w, group, out, in, tap) * da[(now + pixel) * 4 * c + out];
            }
          }
        });
      }
      dh0.insert(dh0.end(), dh.begin(), dh.end());
      dc0.insert(dc0.end(), carry.begin(), carry.end());
    }
  }
};

}  // namespace rlv2v
