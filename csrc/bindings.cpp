// rlv2v._native: this file, bind_*.cpp, arrays.h and ring.h alone know Python. They turn arrays into pointers and check their
// type and shape; what the numbers mean is checked by the core. The core runs without the interpreter lock and never asks
// for it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "replay/buffer.h"
#include "replay/checksum.h"
#include "ring.h"

namespace py = pybind11;


namespace {

using rlv2v::Buffer;
using rlv2v::adopt;
using rlv2v::checked;
using rlv2v::copied;
using rlv2v::describe;
using rlv2v::Shape;
using Free = py::call_guard<py::gil_scoped_release>;

// To f32, infinite where it does not fit, which the core refuses.
float narrowed(double value) {
  constexpr double kMost = std::numeric_limits<float>::max();
  return std::abs(value) > kMost ? std::numeric_limits<float>::infinity() : static_cast<float>(value);
}

class PyBuffer {
 public:
  // ring, make_batch, count_users: see Ring. to_ids(anything) -> int64 (n,).
  PyBuffer(std::size_t capacity, Shape frame_shape, std::size_t max_len, double alpha, double beta, bool stratified,
           std::uint64_t seed, std::size_t max_bytes, std::size_t n_step, double gamma, const std::string& path,
           std::size_t ring, py::object make_batch, py::object count_users, py::object to_ids)
      : frame_shape_(std::move(frame_shape)),
        ring_(ring, std::move(make_batch), std::move(count_users)),
        to_ids_(std::move(to_ids)),
        buffer_({capacity, frame_bytes(), max_len, max_bytes / frame_bytes(), alpha, beta, stratified, seed, n_step, gamma, path}) {}

  Buffer& core() { return buffer_; }

  std::uint64_t put_clip(const py::object& frames) {
    const auto array = checked<std::uint8_t>(frames, "clip", batch_shape(-1));
    const py::gil_scoped_release free;
    return buffer_.put_clip(array.data(), static_cast<std::size_t>(array.shape(0)));
  }

  // states, actions, true frames: one array for all rows, or a list of n single ones, or (clip, starts (n), lengths (n)), of
  // single frames (clip, indices (n)).
  std::uint64_t add(const py::object& states, const py::object& actions, const py::object& rewards,
                    const py::object& true_frames, const py::object& positions, const py::object& terminals,
                    const py::object& ends) {
    const auto reward = checked<float>(rewards, "reward", {-1});
    const py::ssize_t count = reward.shape(0);
    const auto position = checked<std::int64_t>(positions, "position", {count});
    const Flags terminal(terminals, "terminal", count);
    const Flags end(ends, "end", count);
    std::vector<rlv2v::Transition> batch(static_cast<std::size_t>(count));
    std::vector<py::object> kept;  // the memory that the transitions point to
    place(states, "state", true, &rlv2v::Transition::state, batch, kept);
    place(actions, "action", false, &rlv2v::Transition::action, batch, kept);
    place(true_frames, "true_frame", false, &rlv2v::Transition::true_frame, batch, kept);
    for (std::size_t k = 0; k < batch.size(); ++k) {
      batch[k].reward = reward.data()[k];
      batch[k].position = position.data()[k];
      batch[k].terminal = terminal[k];
      batch[k].end = end[k];
    }
    const py::gil_scoped_release free;
    return buffer_.add(batch);
  }

  std::uint64_t add_one(const py::object& state, const py::object& action, double reward, const py::object& true_frame,
                        std::int64_t position, bool terminal, bool end) {
    std::vector<py::object> kept;
    const std::vector<rlv2v::Transition> batch{{window(state, "state", true, kept), window(action, "action", false, kept),
                                                window(true_frame, "true_frame", false, kept), narrowed(reward),
                                                position, terminal, end}};
    const py::gil_scoped_release free;
    return buffer_.add(batch);
  }

  py::object sample(std::size_t n) {
    const rlv2v::Slot slot = ring_.free_slot(n);  // a copy: the reference tells other threads that it is in use
    bool shared = false;
    {
      const py::gil_scoped_release free;
      shared = buffer_.sample(n, slot.out, true);
    }
    return shared ? slot.sharing : slot.batch;
  }

  void sample_into(std::size_t n, const py::tuple& arrays) {
    const auto rows = static_cast<py::ssize_t>(n);
    const auto len = static_cast<py::ssize_t>(buffer_.max_len());
    const rlv2v::SampleOut out{given<std::uint8_t>(arrays, 0, "out.states", window_shape(rows, len)),
                               given<std::int64_t>(arrays, 1, "out.lengths", {rows}),
                               given<std::uint8_t>(arrays, 2, "out.actions", batch_shape(rows)),
                               given<float>(arrays, 3, "out.rewards", {rows}),
                               given<std::uint8_t>(arrays, 4, "out.next_states", window_shape(rows, len + 1)),
                               given<std::int64_t>(arrays, 5, "out.next_lengths", {rows}),
                               given<float>(arrays, 6, "out.discounts", {rows}),
                               given<std::uint8_t>(arrays, 7, "out.true_frames", batch_shape(rows)),
                               given<std::int64_t>(arrays, 8, "out.positions", {rows}),
                               given<bool>(arrays, 9, "out.terminals", {rows}),
                               given<std::int64_t>(arrays, 10, "out.ids", {rows}),
                               given<float>(arrays, 11, "out.weights", {rows})};
    const py::gil_scoped_release free;
    buffer_.sample(n, out);
  }

  // ids: an array, or a tensor of ids that sample gave out.
  std::size_t update_priorities(const py::object& ids, const py::object& priorities) {
    if (const rlv2v::Slot* slot = ring_.with_ids(ids)) return update(slot->out.ids, slot->rows, priorities);  // the usual case
    const auto array = checked<std::int64_t>(to_ids_(ids), "ids", {-1});
    return update(array.data(), static_cast<std::size_t>(array.size()), priorities);
  }

  py::dict save() {
    rlv2v::Contents contents{};
    {
      const py::gil_scoped_release free;
      contents = buffer_.save();
    }
    const auto size = static_cast<py::ssize_t>(contents.lengths.size());
    const auto num_frames = static_cast<py::ssize_t>(contents.frames.size() / buffer_.frame_bytes());
    py::dict state;
    state["frames"] = adopt(std::move(contents.frames), batch_shape(num_frames));
    state["table"] = adopt(std::move(contents.table), {size, static_cast<py::ssize_t>(buffer_.max_len()) + 2});
    state["lengths"] = adopt(std::move(contents.lengths), {size});
    state["rewards"] = adopt(std::move(contents.rewards), {size});
    state["positions"] = adopt(std::move(contents.positions), {size});
    state["terminals"] = adopt(std::move(contents.terminals), {size});
    state["ends"] = adopt(std::move(contents.ends), {size});
    state["priorities"] = adopt(std::move(contents.priorities), {size});
    state["oldest_id"] = contents.oldest_id;
    state["sampled"] = contents.sampled;
    state["stale"] = contents.stale;
    state["seed"] = contents.seed;
    state["alpha"] = contents.alpha;
    state["beta"] = contents.beta;
    state["max_priority"] = contents.max_priority;
    state["stratified"] = contents.stratified;
    return state;
  }

  void load(const py::dict& state) {
    rlv2v::Contents contents{};
    const auto frames = checked<std::uint8_t>(state["frames"], "frames", batch_shape(-1));  // most of it, and any byte will do
    contents.frames = {frames.data(), static_cast<std::size_t>(frames.size())};
    contents.table = copied<std::int32_t>(state, "table", {-1, static_cast<py::ssize_t>(buffer_.max_len()) + 2});
    contents.lengths = copied<std::int64_t>(state, "lengths", {-1});
    contents.rewards = copied<float>(state, "rewards", {-1});
    contents.positions = copied<std::int64_t>(state, "positions", {-1});
    contents.terminals = copied<std::uint8_t>(state, "terminals", {-1});
    contents.ends = copied<std::uint8_t>(state, "ends", {-1});
    contents.priorities = copied<float>(state, "priorities", {-1});
    contents.oldest_id = state["oldest_id"].cast<std::uint64_t>();
    contents.sampled = state["sampled"].cast<std::uint64_t>();
    contents.stale = state["stale"].cast<std::uint64_t>();
    contents.seed = state["seed"].cast<std::uint64_t>();
    contents.alpha = state["alpha"].cast<double>();
    contents.beta = state["beta"].cast<double>();
    contents.max_priority = state["max_priority"].cast<float>();
    contents.stratified = state["stratified"].cast<bool>();
    const py::gil_scoped_release free;
    buffer_.load(contents);
  }

 private:
  // One bool a row, or None: all false.
  struct Flags {
    Flags(const py::object& value, const char* name, py::ssize_t count) {
      if (!value.is_none()) array = checked<bool>(value, name, {count});
      data = value.is_none() ? nullptr : array.data();
    }
    bool operator[](std::size_t k) const { return data != nullptr && data[k]; }
    py::array_t<bool, py::array::c_style> array;
    const bool* data;
  };

  std::size_t update(const std::int64_t* ids, std::size_t count, const py::object& priorities) {
    const Shape shape{static_cast<py::ssize_t>(count)};
    if (py::array_t<float, py::array::c_style>::check_(priorities)) {
      const auto values = checked<float>(priorities, "priorities", shape);
      const py::gil_scoped_release free;
      return buffer_.update_priorities(ids, values.data(), count);
    }
    const auto values = checked<double>(priorities, "priorities", shape);
    const py::gil_scoped_release free;
    return buffer_.update_priorities(ids, values.data(), count);
  }

  // The caller's own memory, never a copy.
  template <class T>
  static T* given(const py::tuple& arrays, std::size_t index, const char* name, const Shape& shape) {
    const py::object value = arrays[index];
    auto array = checked<T>(value, name, shape);
    if (!array.is(value) || !array.writeable()) {
      throw py::value_error("replay: " + std::string(name) + " must be writeable and C-contiguous, got an array that is not");
    }
    return array.mutable_data();
  }

  std::size_t frame_bytes() const {
    std::size_t bytes = 1;
    for (const py::ssize_t size : frame_shape_) {
      constexpr std::size_t kMost = std::size_t{1} << 40;
      if (size < 1 || static_cast<std::size_t>(size) > kMost / bytes) {
        throw py::value_error("replay: frame_shape must have sizes of at least 1 and at most 2^40 bytes, got " +
                              describe(frame_shape_));
      }
      bytes *= static_cast<std::size_t>(size);
    }
    return bytes;
  }

  Shape batch_shape(py::ssize_t count) const {
    Shape shape{count};
    shape.insert(shape.end(), frame_shape_.begin(), frame_shape_.end());
    return shape;
  }

  Shape window_shape(py::ssize_t count, py::ssize_t frames) const {
    Shape shape = batch_shape(frames);
    shape.insert(shape.begin(), count);
    return shape;
  }

  void place(const py::object& value, const char* name, bool is_state, rlv2v::Window rlv2v::Transition::*part,
             std::vector<rlv2v::Transition>& batch, std::vector<py::object>& kept) const {
    const auto count = static_cast<py::ssize_t>(batch.size());
    if (py::isinstance<py::tuple>(value)) {
      const auto reference = py::reinterpret_borrow<py::tuple>(value);
      const auto clip = reference[0].cast<std::uint64_t>();
      const auto starts = checked<std::int64_t>(reference[1], name, {count});
      const auto lengths = is_state ? checked<std::int64_t>(reference[2], name, {count}) : starts;
      for (std::size_t k = 0; k < batch.size(); ++k) {
        batch[k].*part = referred(clip, starts.data()[k], is_state ? lengths.data()[k] : 1, name);
      }
    } else if (py::isinstance<py::list>(value)) {
      const auto rows = py::reinterpret_borrow<py::list>(value);
      if (rows.size() != batch.size()) {
        throw py::value_error("replay: " + std::string(name) + " must have one entry for each of " + std::to_string(count) +
                              " rewards, got " + std::to_string(rows.size()));
      }
      for (std::size_t k = 0; k < batch.size(); ++k) batch[k].*part = window(rows[k], name, is_state, kept);
    } else {
      const auto array = checked<std::uint8_t>(value, name, is_state ? window_shape(count, -1) : batch_shape(count));
      kept.push_back(array);
      const std::size_t length = is_state ? static_cast<std::size_t>(array.shape(1)) : 1;
      const std::size_t bytes = length * buffer_.frame_bytes();
      for (std::size_t k = 0; k < batch.size(); ++k) batch[k].*part = {rlv2v::kNoClip, 0, length, array.data() + k * bytes};
    }
  }

  static rlv2v::Window referred(std::uint64_t clip, std::int64_t start, std::int64_t length, const char* name) {
    if (start < 0 || length < 1) {
      throw py::index_error("replay: " + std::string(name) + " must start at a frame >= 0 and have at least 1, got start " +
                            std::to_string(start) + ", " + std::to_string(length) + " frames");
    }
    return {clip, static_cast<std::size_t>(start), static_cast<std::size_t>(length), nullptr};
  }

  // A state is an array (p, *frame_shape) or (clip, start, p); one frame is an array frame_shape or (clip, index).
  rlv2v::Window window(const py::handle& value, const char* name, bool is_state, std::vector<py::object>& kept) const {
    if (py::isinstance<py::tuple>(value)) {
      const auto part = py::reinterpret_borrow<py::tuple>(value);
      return referred(part[0].cast<std::uint64_t>(), part[1].cast<std::int64_t>(), is_state ? part[2].cast<std::int64_t>() : 1, name);
    }
    const auto array = checked<std::uint8_t>(value, name, is_state ? batch_shape(-1) : frame_shape_);
    kept.push_back(array);
    const std::size_t length = is_state ? static_cast<std::size_t>(array.shape(0)) : 1;
    return {rlv2v::kNoClip, 0, length, array.data()};
  }

  Shape frame_shape_;
  rlv2v::Ring ring_;  // guarded by the interpreter lock
  py::object to_ids_;
  Buffer buffer_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native core of rlv2v; use rlv2v.replay.PrioritizedReplay.";
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {  // a disk that is full, a path that cannot be created
      errno = error.code().value();
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });


  m.def("checksum", [](const py::object& data) {
    const auto bytes = checked<std::uint8_t>(data, "data", {-1});
    const py::gil_scoped_release free;
    return rlv2v::checksum(bytes.data(), static_cast<std::size_t>(bytes.size()));
  }, py::arg("data"));

  py::class_<rlv2v::BufferStats>(m, "ReplayStats")
      .def_readonly("size", &rlv2v::BufferStats::size)
      .def_readonly("frames", &rlv2v::BufferStats::frames)
      .def_readonly("clips", &rlv2v::BufferStats::clips)
      .def_readonly("added", &rlv2v::BufferStats::added)
      .def_readonly("evicted", &rlv2v::BufferStats::evicted)
      .def_readonly("sampled", &rlv2v::BufferStats::sampled)
      .def_readonly("stale", &rlv2v::BufferStats::stale)
      .def_readonly("max_priority", &rlv2v::BufferStats::max_priority)
      .def_readonly("bytes_used", &rlv2v::BufferStats::bytes_used);

  py::class_<PyBuffer>(m, "ReplayBuffer")
      .def(py::init<std::size_t, Shape, std::size_t, double, double, bool, std::uint64_t, std::size_t, std::size_t, double,
                    const std::string&, std::size_t, py::object, py::object, py::object>(),
           py::arg("capacity"), py::arg("frame_shape"), py::arg("max_len"), py::arg("alpha"), py::arg("beta"),
           py::arg("stratified"), py::arg("seed"), py::arg("max_bytes"), py::arg("n_step"), py::arg("gamma"),
           py::arg("path"), py::arg("ring"), py::arg("make_batch"), py::arg("count_users"), py::arg("to_ids"))
      .def("put_clip", &PyBuffer::put_clip, py::arg("frames"))
      .def("release_clip", [](PyBuffer& self, std::uint64_t clip) { self.core().release_clip(clip); }, py::arg("clip"), Free())
      .def("add", &PyBuffer::add, py::arg("states"), py::arg("actions"), py::arg("rewards"), py::arg("true_frames"),
           py::arg("positions"), py::arg("terminals"), py::arg("ends"))
      .def("add_one", &PyBuffer::add_one, py::arg("state"), py::arg("action"), py::arg("reward"), py::arg("true_frame"),
           py::arg("position"), py::arg("terminal"), py::arg("end"))
      .def("sample", &PyBuffer::sample, py::arg("n"))
      .def("sample_into", &PyBuffer::sample_into, py::arg("n"), py::arg("arrays"))
      .def("update_priorities", &PyBuffer::update_priorities, py::arg("ids"), py::arg("priorities"))
      .def("alpha", [](PyBuffer& self) { return self.core().alpha(); }, Free())
      .def("set_alpha", [](PyBuffer& self, double alpha) { self.core().set_alpha(alpha); }, py::arg("alpha"), Free())
      .def("beta", [](PyBuffer& self) { return self.core().beta(); }, Free())
      .def("set_beta", [](PyBuffer& self, double beta) { self.core().set_beta(beta); }, py::arg("beta"), Free())
      .def("stats", [](PyBuffer& self) { return self.core().stats(); }, Free())
      .def("consistent", [](PyBuffer& self) { return self.core().consistent(); }, Free())
      .def("save", &PyBuffer::save)
      .def("load", &PyBuffer::load, py::arg("state"));

  rlv2v::bind_gates(m);
  rlv2v::bind_persistent(m);
}
