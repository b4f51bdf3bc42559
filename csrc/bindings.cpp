// rlv2v._native. Only the files directly in csrc/ know Python: they turn arrays into pointers and check type and shape.
// The core, in its folders, checks what the numbers mean, and runs without the interpreter lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "arrays.h"
#include "batch_ring.h"
#include "replay/buffer.h"

namespace rlv2v {

void bind_gates(py::module_& m);
void bind_norm(py::module_& m);
void bind_slice(py::module_& m);
void bind_persistent(py::module_& m);

namespace {

using namespace py::literals;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;
using Owners = std::vector<py::object>;  // of the memory that windows point to

// Converts to f32: infinity if it does not fit, which the core refuses.
float to_float(double value) {
  constexpr double kMax = std::numeric_limits<float>::max();
  return std::abs(value) > kMax ? std::numeric_limits<float>::infinity() : static_cast<float>(value);
}

template <class Call>
auto without_gil(const Call& call) {
  const py::gil_scoped_release no_gil;
  return call();
}

class PyBuffer {
 public:
  // ring, make_batch, count_users: see BatchRing. to_ids(anything) -> int64 (n,).
  PyBuffer(std::size_t capacity, Shape frame_shape, std::size_t max_len, double alpha, double beta, bool stratified,
           std::uint64_t seed, std::size_t max_bytes, std::size_t n_step, double gamma, const std::string& path,
           std::size_t ring, py::object make_batch, py::object count_users, py::object to_ids)
      : frame_shape_(std::move(frame_shape)), ring_(ring, std::move(make_batch), std::move(count_users)),
        to_ids_(std::move(to_ids)), buffer_({capacity, frame_bytes(), max_len, max_bytes / frame_bytes(), alpha, beta,
                                             stratified, seed, n_step, gamma, path}) {}

  Buffer& core() { return buffer_; }

  std::uint64_t put_clip(const py::object& frames) {
    const auto array = as_array<std::uint8_t>(frames, "clip", frames_shape(-1));
    const py::gil_scoped_release no_gil;
    return buffer_.put_clip(array.data(), static_cast<std::size_t>(array.shape(0)));
  }

  // states, actions, true_frames: one array for all rows, a list of n single ones, or (clip, starts (n), lengths (n)),
  // of single frames (clip, indices (n)).
  std::uint64_t add(const py::object& states, const py::object& actions, const py::object& rewards,
                    const py::object& true_frames, const py::object& positions, const py::object& terminals,
                    const py::object& ends) {
    const auto reward = as_array<float>(rewards, "reward", {-1});
    const py::ssize_t count = reward.shape(0);
    const auto position = as_array<std::int64_t>(positions, "position", {count});
    const Flags terminal(terminals, "terminal", count);
    const Flags end(ends, "end", count);
    std::vector<Transition> batch(static_cast<std::size_t>(count));
    Owners owners;
    fill_windows(states, "state", true, &Transition::state, batch, owners);
    fill_windows(actions, "action", false, &Transition::action, batch, owners);
    fill_windows(true_frames, "true_frame", false, &Transition::true_frame, batch, owners);
    for (std::size_t k = 0; k < batch.size(); ++k) {
      batch[k].reward = reward.data()[k];
      batch[k].position = position.data()[k];
      batch[k].terminal = terminal[k];
      batch[k].end = end[k];
    }
    const py::gil_scoped_release no_gil;
    return buffer_.add(batch);
  }

  std::uint64_t add_one(const py::object& state, const py::object& action, double reward, const py::object& true_frame,
                        std::int64_t position, bool terminal, bool end) {
    Owners owners;
    const std::vector<Transition> batch{
        {window(state, "state", true, owners), window(action, "action", false, owners),
         window(true_frame, "true_frame", false, owners), to_float(reward), position, terminal, end}};
    const py::gil_scoped_release no_gil;
    return buffer_.add(batch);
  }

  py::object sample(std::size_t n) {
    const Batch batch = ring_.free_batch(n);  // a copy: its references tell other threads that it is in use
    const bool shared = without_gil([&] { return buffer_.sample(n, batch.out, true); });
    return shared ? batch.sharing : batch.tensors;
  }

  // arrays: by the names of ReplayBatch.
  void sample_into(std::size_t n, const py::dict& arrays) {
    const auto rows = static_cast<py::ssize_t>(n);
    const auto len = static_cast<py::ssize_t>(buffer_.max_len());
    SampleOut out{};
    out.for_each([&](const char* name, auto*& pointer, SampleOut::Row row) {
      const Shape shape = row == SampleOut::Row::kNumber    ? Shape{rows}
                          : row == SampleOut::Row::kFrame   ? frames_shape(rows)
                          : row == SampleOut::Row::kState   ? windows_shape(rows, len)
                                                            : windows_shape(rows, len + 1);
      using T = std::remove_reference_t<decltype(*pointer)>;
      pointer = writable<T>(arrays[name], (std::string("out.") + name).c_str(), shape);
    });
    const py::gil_scoped_release no_gil;
    buffer_.sample(n, out);
  }

  // ids: an array, or a tensor of ids that sample returned.
  std::size_t update_priorities(const py::object& ids, const py::object& priorities) {
    if (const Batch* batch = ring_.find_ids(ids)) return update(batch->out.ids, batch->rows, priorities);
    const auto array = as_array<std::int64_t>(to_ids_(ids), "ids", {-1});
    return update(array.data(), static_cast<std::size_t>(array.size()), priorities);
  }

  py::dict stats() const {
    const BufferStats stats = without_gil([this] { return buffer_.stats(); });
    return py::dict("size"_a = stats.size, "frames"_a = stats.frames, "clips"_a = stats.clips, "added"_a = stats.added,
                    "evicted"_a = stats.evicted, "sampled"_a = stats.sampled, "stale"_a = stats.stale,
                    "max_priority"_a = stats.max_priority, "bytes_used"_a = stats.bytes_used);
  }

  py::dict save() const {
    Contents contents = without_gil([this] { return buffer_.save(); });
    const auto size = static_cast<py::ssize_t>(contents.lengths.size());
    const auto num_frames = static_cast<py::ssize_t>(contents.frames.size() / buffer_.frame_bytes());
    py::dict state;
    state["frames"] = to_numpy(std::move(contents.frames), frames_shape(num_frames));
    state["table"] = to_numpy(std::move(contents.table), {size, table_width()});
    contents.for_columns([&](const char* name, auto& column) { state[name] = to_numpy(std::move(column), {size}); });
    contents.for_numbers([&](const char* name, const auto& value) { state[name] = value; });
    return state;
  }

  void load(const py::dict& state) {
    Contents contents;
    // Frames are not copied: no byte of them needs a check.
    const auto frames = as_array<std::uint8_t>(state["frames"], "frames", frames_shape(-1));
    contents.frames = {frames.data(), static_cast<std::size_t>(frames.size())};
    contents.table = copy_array<std::int32_t>(state["table"], "table", {-1, table_width()});
    contents.for_columns([&](const char* name, auto& column) {
      column = copy_array<std::remove_reference_t<decltype(column[0])>>(state[name], name, {-1});
    });
    contents.for_numbers([&](const char* name, auto& value) {
      try {
        value = state[name].template cast<std::decay_t<decltype(value)>>();
      } catch (const py::cast_error&) {
        throw py::value_error("replay: " + std::string(name) + " must be a number in its range, got " +
                              py::repr(state[name]).cast<std::string>());
      }
    });
    const py::gil_scoped_release no_gil;
    buffer_.load(contents);
  }

 private:
  // One bool a row, or None: all are false.
  struct Flags {
    Flags(const py::object& value, const char* name, py::ssize_t count) {
      if (!value.is_none()) array = as_array<bool>(value, name, {count});
      data = value.is_none() ? nullptr : array.data();
    }
    bool operator[](std::size_t k) const { return data != nullptr && data[k]; }
    Array<bool> array;
    const bool* data;
  };

  std::size_t update(const std::int64_t* ids, std::size_t count, const py::object& priorities) {
    const auto update_by = [&](auto real) {
      const auto values = as_array<decltype(real)>(priorities, "priorities", {static_cast<py::ssize_t>(count)});
      const py::gil_scoped_release no_gil;
      return buffer_.update_priorities(ids, values.data(), count);
    };
    return Array<float>::check_(priorities) ? update_by(float{}) : update_by(double{});
  }

  std::size_t frame_bytes() const {
    std::size_t bytes = 1;
    for (const py::ssize_t size : frame_shape_) {
      constexpr std::size_t kMaxBytes = std::size_t{1} << 40;
      if (size < 1 || static_cast<std::size_t>(size) > kMaxBytes / bytes) {
        throw py::value_error("replay: frame_shape must have sizes of at least 1 and at most 2^40 bytes, got " +
                              describe(frame_shape_));
      }
      bytes *= static_cast<std::size_t>(size);
    }
    return bytes;
  }

  py::ssize_t table_width() const { return static_cast<py::ssize_t>(buffer_.max_len()) + 2; }

  Shape frames_shape(py::ssize_t count) const {
    Shape shape{count};
    shape.insert(shape.end(), frame_shape_.begin(), frame_shape_.end());
    return shape;
  }
  Shape windows_shape(py::ssize_t count, py::ssize_t frames) const {
    Shape shape = frames_shape(frames);
    shape.insert(shape.begin(), count);
    return shape;
  }

  void fill_windows(const py::object& value, const char* name, bool is_state, Window Transition::*member,
                    std::vector<Transition>& batch, Owners& owners) const {
    const auto count = static_cast<py::ssize_t>(batch.size());
    if (py::isinstance<py::tuple>(value)) {
      const auto reference = py::reinterpret_borrow<py::tuple>(value);
      const auto clip = reference[0].cast<std::uint64_t>();
      const auto starts = as_array<std::int64_t>(reference[1], name, {count});
      const auto lengths = is_state ? as_array<std::int64_t>(reference[2], name, {count}) : starts;
      for (std::size_t k = 0; k < batch.size(); ++k) {
        batch[k].*member = clip_window(clip, starts.data()[k], is_state ? lengths.data()[k] : 1, name);
      }
    } else if (py::isinstance<py::list>(value)) {
      const auto rows = py::reinterpret_borrow<py::list>(value);
      if (rows.size() != batch.size()) {
        throw py::value_error("replay: " + std::string(name) + " must have one entry for each of " +
                              std::to_string(count) + " rewards, got " + std::to_string(rows.size()));
      }
      for (std::size_t k = 0; k < batch.size(); ++k) batch[k].*member = window(rows[k], name, is_state, owners);
    } else {
      const auto array = as_array<std::uint8_t>(value, name, is_state ? windows_shape(count, -1) : frames_shape(count));
      owners.push_back(array);
      const std::size_t length = is_state ? static_cast<std::size_t>(array.shape(1)) : 1;
      const std::size_t bytes = length * buffer_.frame_bytes();
      for (std::size_t k = 0; k < batch.size(); ++k) batch[k].*member = {kNoClip, 0, length, array.data() + k * bytes};
    }
  }

  static Window clip_window(std::uint64_t clip, std::int64_t start, std::int64_t length, const char* name) {
    if (start < 0 || length < 1) {
      throw py::index_error("replay: " + std::string(name) +
                            " must start at a frame >= 0 and have at least 1, got start " + std::to_string(start) +
                            ", " + std::to_string(length) + " frames");
    }
    return {clip, static_cast<std::size_t>(start), static_cast<std::size_t>(length), nullptr};
  }

  // A state is an array (p, *frame_shape) or (clip, start, p); one frame is an array frame_shape or (clip, index).
  Window window(const py::handle& value, const char* name, bool is_state, Owners& owners) const {
    if (py::isinstance<py::tuple>(value)) {
      const auto reference = py::reinterpret_borrow<py::tuple>(value);
      return clip_window(reference[0].cast<std::uint64_t>(), reference[1].cast<std::int64_t>(),
                         is_state ? reference[2].cast<std::int64_t>() : 1, name);
    }
    const auto array = as_array<std::uint8_t>(value, name, is_state ? frames_shape(-1) : frame_shape_);
    owners.push_back(array);
    return {kNoClip, 0, is_state ? static_cast<std::size_t>(array.shape(0)) : 1, array.data()};
  }

  Shape frame_shape_;
  BatchRing ring_;  // guarded by the interpreter lock
  py::object to_ids_;
  Buffer buffer_;
};

void bind_replay(py::module_& m) {
  py::class_<PyBuffer>(m, "ReplayBuffer")
      .def(py::init<std::size_t, Shape, std::size_t, double, double, bool, std::uint64_t, std::size_t, std::size_t,
                    double, const std::string&, std::size_t, py::object, py::object, py::object>(),
           "capacity"_a, "frame_shape"_a, "max_len"_a, "alpha"_a, "beta"_a, "stratified"_a, "seed"_a, "max_bytes"_a,
           "n_step"_a, "gamma"_a, "path"_a, "ring"_a, "make_batch"_a, "count_users"_a, "to_ids"_a)
      .def("put_clip", &PyBuffer::put_clip)
      .def("release_clip", [](PyBuffer& self, std::uint64_t clip) { self.core().release_clip(clip); }, ReleaseGil())
      .def("add", &PyBuffer::add)
      .def("add_one", &PyBuffer::add_one)
      .def("sample", &PyBuffer::sample)
      .def("sample_into", &PyBuffer::sample_into)
      .def("update_priorities", &PyBuffer::update_priorities)
      .def("alpha", [](PyBuffer& self) { return self.core().alpha(); }, ReleaseGil())
      .def("set_alpha", [](PyBuffer& self, double alpha) { self.core().set_alpha(alpha); }, ReleaseGil())
      .def("beta", [](PyBuffer& self) { return self.core().beta(); }, ReleaseGil())
      .def("set_beta", [](PyBuffer& self, double beta) { self.core().set_beta(beta); }, ReleaseGil())
      .def("stats", &PyBuffer::stats)
      .def("consistent", [](PyBuffer& self) { return self.core().consistent(); }, ReleaseGil())
      .def("save", &PyBuffer::save)
      .def("load", &PyBuffer::load);
}

}  // namespace
}  // namespace rlv2v

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native core of rlv2v; use rlv2v.replay.PrioritizedReplay and rlv2v.kernels.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {  // a full disk, or a path that cannot be created
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
  rlv2v::bind_replay(m);
  rlv2v::bind_gates(m);
  rlv2v::bind_norm(m);
  rlv2v::bind_slice(m);
  rlv2v::bind_persistent(m);
}
